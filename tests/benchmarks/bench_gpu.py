"""One card, one command, under nine minutes: what it can do, and what training and decoding make of it.

    pip install transformers
    python tests/benchmarks/bench_gpu.py                        every part; a part that does not fit says so
    python tests/benchmarks/bench_gpu.py peak decode-1b --minutes 3
    python tests/benchmarks/bench_gpu.py --device cpu --size tiny      the same code, to see that it runs

Random weights, bfloat16 (on a CPU float32). Parts, in the order of their value:

    peak         operations a second of square products, bytes a second of copying
    llava-1      a step of LLaVA's first stage at 7B: the linear bridge learns, frozen parts in bfloat16
    llava-2      a step of its second: decoder and bridge learn in float32 under autocast, activations
                 recomputed: 16 bytes a parameter, 108 GB
    decode-1b    greedy tokens, plain, compiled, and as a CUDA graph of one step; transformers in the same run
    decode-7b    the same
Of a step: tokens a second, MFU (operations as executed ÷ time ÷ peak), peak memory, and the largest batch
of a few that fits. Of decoding: tokens a second, and bytes of weights ÷ time as a share of reading's
bandwidth. A table to read first, one line of JSON last.
"""
from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
from limits import Products, bandwidth, describe_limits, peak, timed            # noqa: E402  (after the path)
from model import (IGNORE, IMAGE, NO_BRIDGE, VLM, Cache, Context, Decoder, DecoderConfig, ViT,    # noqa: E402
                   ViTConfig, rope_frequencies)
from papers import make_bridge                                                  # noqa: E402

# decoder: layers, width, heads, key heads, feed-forward, words; ViT: image, patch, width, layers, heads, MLP
SIZES = {
    "tiny": ((4, 128, 4, 2, 384, 512), (48, 16, 128, 4, 4, 512)),
    "1b": ((16, 2048, 32, 8, 8192, 128256), (224, 14, 1024, 24, 16, 4096)),
    "7b": ((32, 4096, 32, 32, 11008, 32000), (224, 14, 1024, 24, 16, 4096)),
}
TEXT, PROMPT, NEW = 128, 32, 128                        # tokens: of a training text, of a prompt, generated
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def decoder_of(a, size: str) -> Decoder:
    L, D, H, G, hidden, V = SIZES[size][0]
    config = DecoderConfig(vocab_size=V, width=D, layers=L, heads=H, kv_heads=G, head_width=D // H,
                           hidden=hidden, tied=V > 40000, context=4096)
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder = decoder.to_empty(device=a.device).to(a.dtype)
    for p in decoder.parameters():
        p.data.normal_(0, 0.02) if p.ndim > 1 else p.data.fill_(1)
    return decoder


def vlm_of(a, size: str) -> VLM:
    S, p, Di, L, H, hidden = SIZES[size][1]
    vit = ViT(ViTConfig(S, p, Di, L, H, hidden)).to(a.device, a.dtype).requires_grad_(False)
    decoder = decoder_of(a, size)
    return VLM(vit, make_bridge("linear", decoder.config, Di, reads=-2).to(a.device), decoder).train()


def part_peak(a) -> dict:
    read, copy = bandwidth(a.device)
    found = {str(d)[6:]: peak(d, a.device) for d in {a.dtype, torch.float32}}
    print(describe_limits([*{a.dtype, torch.float32}], a.device))
    return dict(products=found, read=read, copy=copy)


def part_step(a, decoder_learns: bool) -> dict:
    """The training step for growing batches, until one does not fit; the figures are of the last that did."""
    size = a.size or "7b"
    vlm, best = vlm_of(a, size), {}
    vlm.decoder.requires_grad_(decoder_learns)
    if decoder_learns:                                  # what learns is stored in float32, as train.py does
        vlm.decoder.float().checkpoint = True
    parameters = [p for p in vlm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=a.device == "cuda")
    for B in BATCHES if a.device == "cuda" else BATCHES[:2]:
        try:
            best = time_step(a, vlm, parameters, optimizer, B)
        except torch.OutOfMemoryError:
            break
    print(f"    batch {best['batch']} (the largest of {BATCHES} that fits): {best['seconds']:.3f} s a step, "
          f"{best['tokens_per_s']:,.0f} positions/s, MFU {best['mfu']:.0%}, {best['gb']:.1f} GB")
    return best


def time_step(a, vlm: VLM, parameters: list, optimizer, B: int) -> dict:
    S, V = vlm.vit.config.image_size, vlm.decoder.config.vocab_size
    tokens = torch.randint(10, V, (B, TEXT), device=a.device)
    tokens[:, 1] = IMAGE
    labels = tokens.masked_fill(torch.arange(TEXT, device=a.device) < TEXT // 2, IGNORE)
    pixels = torch.randn(B, 3, S, S, device=a.device, dtype=a.dtype)

    def step() -> None:
        with torch.no_grad():
            features = vlm.features(pixels)
        with torch.autocast(a.device, a.dtype, enabled=a.dtype != torch.float32):
            total, count = vlm.loss(tokens, labels, features=features)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if a.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with Products() as products:
        step()
    seconds = statistics.median(timed(a.device, step) for _ in range(3))
    positions = B * (TEXT - 1 + vlm.vit.config.side**2)
    memory = torch.cuda.max_memory_allocated() / 1e9 if a.device == "cuda" else float("nan")
    return dict(batch=B, seconds=seconds, tokens_per_s=positions / seconds, gb=memory,
                mfu=products.flops / seconds / peak(a.dtype, a.device))


def part_decode(a, size: str) -> dict:
    """Greedy tokens of one text; each way against transformers, in turns."""
    size = a.size or size
    decoder = decoder_of(a, size).eval()
    tokens = torch.randint(10, decoder.config.vocab_size, (1, PROMPT), device=a.device)
    ways = {"plain": lambda: decoder.generate(tokens, max_new_tokens=NEW)}
    if a.device == "cuda":
        ways["graph"] = graph_of_a_step(decoder, tokens)
    library = library_of(a, size)
    if library is not None:
        ways["transformers"] = lambda: library.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, min_new_tokens=NEW,
            do_sample=False)
    seconds = {way: [] for way in ways}
    for way, run in ways.items():
        run()
    for _ in range(5):
        for way, run in ways.items():
            seconds[way].append(timed(a.device, run))
    if a.device == "cuda":                              # last: it changes the layers
        for layer in decoder.layers:
            layer.compile(dynamic=True)
        torch._dynamo.config.recompile_limit = 64
        first = timed(a.device, ways["plain"])
        seconds["compiled"] = [timed(a.device, ways["plain"]) for _ in range(3)]
        print(f"    the first compiled call took {first:.0f} s")
    tied = decoder.lm_head is None
    weights = sum(p.nbytes for n, p in decoder.named_parameters() if tied or "embed" not in n)
    found = {}
    for way, times in seconds.items():
        middle = statistics.median(times)
        found[way] = dict(tokens_per_s=NEW / middle, gb_per_s=weights * NEW / middle / 1e9,
                          of_reading=weights * NEW / middle / bandwidth(a.device)[0])
        ratio = statistics.median(seconds.get("transformers", [float("nan")])) / middle
        print(f"    {way:13s}{found[way]['tokens_per_s']:9.1f} tokens/s{found[way]['gb_per_s']:9.1f} GB/s, "
              f"{found[way]['of_reading']:.0%} of reading; {ratio:.2f} times transformers")
    return found


def graph_of_a_step(decoder: Decoder, tokens: torch.Tensor):
    """Generation whose steps replay one CUDA graph: the kernels' launches cost nothing.

    A graph has fixed shapes, so every step reads the whole cache and masks what is not yet written: positions
    behind the text count as padding.
    """
    longest = PROMPT + NEW
    cache = Cache(decoder.config, 1, longest, tokens.device, decoder.embed.weight.dtype)
    token, place = tokens.new_zeros(1, 1), tokens.new_zeros(1)
    theta = rope_frequencies(decoder.config, tokens.device)
    columns = torch.arange(longest, device=tokens.device)

    class Fixed:                                        # stands in for the cache inside the graph
        def append(self, layer: int, k, v):
            cache.k[layer].index_copy_(2, place, k)
            cache.v[layer].index_copy_(2, place, v)
            return cache.k[layer], cache.v[layer]

    def step() -> torch.Tensor:
        x = decoder.embed(token)
        angle = (place[:, None] * theta).repeat(1, 2)[None, None]
        bias = torch.where(columns <= place, 0.0, -1e30).to(x.dtype)[None, None, None]
        context = Context(angle.cos().to(x.dtype), angle.sin().to(x.dtype), bias, False, Fixed(), NO_BRIDGE)
        for n, layer in enumerate(decoder.layers):
            x = layer(x, None, n, context)
        return decoder.logits(decoder.norm(x))[:, -1].argmax(-1, keepdim=True)

    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):                 # a graph is captured after a warm-up on its stream
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            following = step()

    @torch.no_grad()
    def run() -> torch.Tensor:
        logits, held = decoder.read_prompt(tokens, 1)
        for own, other in ((cache.k, held.k), (cache.v, held.v)):
            own[:, :, :, :PROMPT] = other[:, :, :, :PROMPT]
        token.copy_(logits.argmax(-1, keepdim=True))
        new = [token.clone()]
        for n in range(PROMPT, longest - 1):
            place.fill_(n)
            graph.replay()
            token.copy_(following)
            new.append(token.clone())
        return torch.cat(new, dim=1)

    same = (run() == decoder.generate(tokens, max_new_tokens=NEW)).float().mean().item()
    print(f"    the graph's tokens equal the plain ones in {same:.0%} of the places (ties of random weights)")
    return run


def library_of(a, size: str):
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        print("    pip install transformers to compare with it")
        return None
    L, D, H, G, hidden, V = SIZES[size][0]
    config = LlamaConfig(num_hidden_layers=L, hidden_size=D, num_attention_heads=H, num_key_value_heads=G,
                         head_dim=D // H, intermediate_size=hidden, vocab_size=V,
                         max_position_embeddings=4096, tie_word_embeddings=V > 40000, eos_token_id=None,
                         pad_token_id=0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to_empty(device=a.device).to(a.dtype).eval()
    for p in model.parameters():
        p.data.normal_(0, 0.02) if p.ndim > 1 else p.data.fill_(1)
    rotary = model.model.rotary_emb                     # its buffers were on the meta device, too
    i = torch.arange(0, D // H, 2, device=a.device).float()
    rotary.inv_freq = 1.0 / config.rope_parameters["rope_theta"] ** (i / (D // H))
    rotary.original_inv_freq = rotary.inv_freq
    return model


PARTS = {"peak": part_peak, "llava-1": lambda a: part_step(a, False),
         "decode-1b": lambda a: part_decode(a, "1b"), "decode-7b": lambda a: part_decode(a, "7b"),
         "llava-2": lambda a: part_step(a, True)}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    args.add_argument("--device", default="cuda")
    args.add_argument("--size", choices=SIZES, help="of every model, instead of the part's own")
    args.add_argument("--minutes", type=float, default=9, help="no part begins after so many")
    a = args.parse_args()
    if unknown := [p for p in a.parts if p not in PARTS]:
        args.error(f"unknown part {unknown[0]}; known: {', '.join(PARTS)}")
    a.dtype = torch.bfloat16 if a.device == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if a.device == "cuda" else "CPU"
    start, found = time.monotonic(), {}
    print(f"{name}, torch {torch.__version__}, {str(a.dtype)[6:]}")
    for part in a.parts or PARTS:
        minutes = (time.monotonic() - start) / 60
        if minutes > a.minutes:
            print(f"{part}: left out after {minutes:.1f} minutes")
            continue
        print(part, flush=True)
        try:
            found[part] = PARTS[part](a)
        except torch.OutOfMemoryError:
            print(f"    does not fit into {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB")
        gc.collect()
        if a.device == "cuda":
            torch.cuda.empty_cache()
    print("\n" + json.dumps(dict(device=name, torch=torch.__version__, dtype=str(a.dtype)[6:], parts=found)))


if __name__ == "__main__":
    main()
