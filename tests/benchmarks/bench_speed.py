"""Ours against the libraries that people would use instead: same weights, inputs and dtype, in turns.

    pip install transformers peft
    python tests/benchmarks/bench_speed.py                every case at SmolLM2-135M + ViT-B/16 size, bfloat16
    python tests/benchmarks/bench_speed.py train-mlp generate --size tiny --dtype float32 --rounds 9
    python tests/benchmarks/bench_speed.py train-mapl train-flamingo --cached
    python tests/benchmarks/bench_speed.py --size 1b --device cuda      a GPU; also 7b

Weights are random: transformers builds and saves a model, both sides open the folder. A case first checks
that the two sides compute the same number; then rounds of A B A B. Printed: median seconds of each side,
the median of the rounds' ratios (above 1: ours is faster) with their quartiles, and the peak of memory of
each side, a process of its own that does nothing else (on a CPU VmHWM above the bare imports, on a GPU what
PyTorch allocated). A human's table first, one line of JSON last.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import data
from support.formats.tokenizer_files import load_tokenizer  # noqa: E402  (after the path)
from bench_loading import status                                                # noqa: E402
from model import IGNORE, IMAGE, VLM, next_token_loss
from support.formats.llama import load_decoder
from support.formats.vision import load_vit
from support.formats.vlm import load_bridge, load_vlm     # noqa: E402
from support.plumbing.packed import packed                # noqa: E402

# decoder: layers, width, heads, key heads, feed-forward, words
# ViT: image, patch, width, layers, heads, feed-forward
SIZES = {
    "tiny": ((4, 128, 4, 2, 384, 512), (48, 16, 128, 4, 4, 512)),
    "135m": ((30, 576, 9, 3, 1536, 49152), (224, 16, 768, 12, 12, 3072)),
    "1b": ((16, 2048, 32, 8, 8192, 128256), (224, 14, 1024, 24, 16, 4096)),
    "7b": ((32, 4096, 32, 32, 11008, 32000), (336, 14, 1024, 24, 16, 4096)),
}
TRAINED = (
    torch.float32
)  # trained parameters; the frozen ones have the dtype asked for, and autocast joins them


# ---- Models: the folder that both sides open, and the library's side -------------------------------------

def configs(size: str) -> tuple[dict, dict]:
    (L, D, H, G, hidden, V), (S, p, Di, Lv, Hv, hv) = SIZES[size]
    text = dict(
        num_hidden_layers=L,
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=G,
        intermediate_size=hidden,
        vocab_size=V,
        max_position_embeddings=4096,
        tie_word_embeddings=V > 40000,
        head_dim=D // H,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = dict(
        image_size=S,
        patch_size=p,
        hidden_size=Di,
        num_hidden_layers=Lv,
        num_attention_heads=Hv,
        intermediate_size=hv,
    )
    return text, vision


def build(kind: str, size: str, folder: Path) -> None:
    """A random model of this kind in its own layout, float32."""
    import transformers as t
    text, vision = configs(size)
    torch.manual_seed(0)
    if kind == "llama":
        model = t.LlamaForCausalLM(t.LlamaConfig(**text))
    elif kind == "clip":
        model = t.CLIPVisionModel(t.CLIPVisionConfig(**vision, hidden_act="quick_gelu"))
    elif kind == "llava":
        model = t.LlavaForConditionalGeneration(
            t.LlavaConfig(
                vision_config=t.CLIPVisionConfig(**vision, hidden_act="quick_gelu"),
                text_config=t.LlamaConfig(**text),
                image_token_index=3,
                tie_word_embeddings=text["tie_word_embeddings"],
            )
        )
    elif kind == "instructblip":
        wide = size != "tiny"
        former = dict(
            vocab_size=30523 if wide else 512,
            encoder_hidden_size=vision["hidden_size"],
            **(dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
            **(
                {}
                if wide
                else dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512)
            ),
        )
        config = t.InstructBlipConfig(
            vision_config=dict(vision, hidden_act="gelu", layer_norm_eps=1e-6, qkv_bias=True),
            qformer_config=former,
            text_config=dict(text, model_type="llama"),
            num_query_tokens=32,
            image_token_index=3,
        )
        model = t.InstructBlipForConditionalGeneration(config)
    elif kind == "idefics":
        text.pop("num_key_value_heads"), text.pop("head_dim")
        every = next(
            n for n in (5, 4, 2, 1) if text["num_hidden_layers"] % n == 0
        )  # what is left over makes the library fail
        v = {"embed_dim" if k == "hidden_size" else k: x for k, x in vision.items()}
        config = t.IdeficsConfig(
            **text,
            additional_vocab_size=2,
            cross_layer_interval=every,
            use_resampler=True,
            alpha_initializer="ones",
            vision_config=dict(v, hidden_act="gelu"),
            perceiver_config=dict(
                use_resampler=True,
                resampler_n_latents=64,
                resampler_depth=6,
                resampler_n_heads=8,
                resampler_head_dim=64,
                qk_layer_norms_perceiver=False,
            ),
        )
        model = t.IdeficsForVisionText2Text(config)
    model.save_pretrained(folder, max_shard_size="50GB")


class Composed(nn.Module):
    """What one would write where the library has no class: its ViT, a torch module and its LLaMA."""

    def __init__(self, vit: nn.Module, bridge: nn.Module, lm: nn.Module, layer: int, cls: bool):
        super().__init__()
        self.vit, self.bridge, self.lm, self.layer, self.cls = vit, bridge, lm, layer, cls

    def forward(self, input_ids, pixel_values, labels):
        with torch.no_grad():
            states = self.vit(pixel_values, output_hidden_states=True).hidden_states[self.layer]
        soft = self.bridge(states if self.cls else states[:, 1:])
        words = self.lm.get_input_embeddings()(input_ids)
        at = input_ids == 3
        embeds = words.masked_scatter(at[..., None], soft.to(words.dtype))
        return self.lm(inputs_embeds=embeds, attention_mask=torch.ones_like(input_ids), labels=labels)


class LibraryMAPL(nn.Module):
    """MAPL's mapper out of torch's own transformer; its names are those of the published file."""

    def __init__(self, Di: int, D: int, constants: int = 32, width: int = 256):
        super().__init__()
        self.down, self.up = nn.Linear(Di, width), nn.Linear(width, D)
        self.const = nn.Parameter(torch.randn(constants, width))
        layer = nn.TransformerEncoderLayer(width, 8, 2 * width, 0.0, norm_first=True, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)

    def forward(self, x):
        x = self.down(x)
        x = torch.cat((x, self.const.expand(len(x), -1, -1).to(x.dtype)), dim=1)
        return self.up(self.transformer(x)[:, -len(self.const):])


# ---- Cases: a function of (arguments, folder, side) gives what is timed; both sides return the same number 

def batch(a, image: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens (B, T) with IMAGE at the second place, labels on the last quarter."""
    V = SIZES[a.size][0][5]
    tokens = torch.randint(10, V - 2, (a.batch, a.text), generator=torch.Generator().manual_seed(1))
    if image:
        tokens[:, 1] = IMAGE
    labels = tokens.clone()
    labels[:, :-(a.text // 4)] = IGNORE
    return tokens.to(a.device), labels.to(a.device)


def unfold(
    tokens: torch.Tensor, labels: torch.Tensor, K: int, image: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """The library's prompt holds K image tokens where ours has one IMAGE."""
    wide = lambda x, fill: torch.cat(
        (x[:, :1], torch.full((len(x), K), fill, device=x.device), x[:, 2:]), dim=1
    )
    return wide(tokens, image), wide(labels, IGNORE)


def pictures(a) -> torch.Tensor:
    S = SIZES[a.size][1][0]
    return torch.randn(a.batch, 3, S, S, generator=torch.Generator().manual_seed(2)).to(a.device)


def frozen_but(model: nn.Module, a, *trained: nn.Module) -> list[nn.Parameter]:
    """Everything frozen in the dtype asked for, these parts trained in float32."""
    model.to(a.device, a.dtype).requires_grad_(False)
    for part in trained:
        part.to(TRAINED).requires_grad_(True)
    return [p for part in trained for p in part.parameters()]


def step_of(a, parameters, loss_of, features=lambda: ()):
    """The training step: forward under autocast, backward, clip, AdamW (fused on both sides).

    features: what train.py computes before autocast.
    """
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> float:
        seen = features()
        with torch.autocast(a.device, a.dtype, enabled=a.dtype != torch.float32):
            loss = loss_of(*seen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def ours_step(a, vlm: VLM, parameters, **extra):
    tokens, labels = batch(a, True)
    pixels = pictures(a)

    @torch.no_grad()
    def features():
        return (vlm.features(pixels.to(a.dtype)),)

    def loss(features):
        total, count = vlm.loss(tokens, labels, features=features, **extra)
        return total / count
    if a.cached:
        cached = features()
        return step_of(a, parameters, loss, lambda: cached)
    return step_of(a, parameters, loss, features)


def train_mlp(a, folder: Path, side: str):
    """LLaVA-1.5's first stage against LlavaForConditionalGeneration."""
    if side == "ours":
        vlm = load_vlm(folder("llava"), a.device, a.dtype).train()
        return ours_step(a, vlm, frozen_but(vlm, a, vlm.bridge))
    from transformers import LlavaForConditionalGeneration
    model = LlavaForConditionalGeneration.from_pretrained(folder("llava"), dtype=a.dtype).train()
    parameters = frozen_but(model, a, model.model.multi_modal_projector)
    (tokens, labels), pixels = batch(a, True), pictures(a).to(a.dtype)
    S, p = SIZES[a.size][1][:2]
    tokens, labels = unfold(tokens, labels, (S // p) ** 2)
    mask = torch.ones_like(tokens)
    return step_of(
        a,
        parameters,
        lambda: model(input_ids=tokens, pixel_values=pixels, attention_mask=mask, labels=labels).loss,
    )


def composed(a, folder: Path, side: str, name: str):
    Di, D, (S, p) = SIZES[a.size][1][2], SIZES[a.size][0][1], SIZES[a.size][1][:2]
    from safetensors.torch import save_file
    torch.manual_seed(3)
    bridge = nn.ModuleDict({"map": nn.Linear(Di, D)}) if name == "linear" else LibraryMAPL(Di, D)
    if side == "ours":
        vit, decoder = (
            load_vit(folder("clip"), a.device, a.dtype),
            load_decoder(folder("llama"), a.device, a.dtype),
        )
        if name == "linear":
            from papers import make_bridge
            mine = make_bridge("linear", decoder.config, Di, reads=-2)
            mine.map.load_state_dict(bridge["map"].state_dict())
        else:
            with tempfile.TemporaryDirectory() as tmp:
                save_file(
                    {k: v.contiguous() for k, v in bridge.state_dict().items()},
                    Path(tmp) / "model.safetensors",
                )
                mine = load_bridge("mapl", tmp)
        vlm = VLM(vit, mine, decoder).train()
        return ours_step(a, vlm, frozen_but(vlm, a, vlm.bridge))
    import transformers as t

    vit, lm = (
        t.CLIPVisionModel.from_pretrained(folder("clip"), dtype=a.dtype),
        t.LlamaForCausalLM.from_pretrained(folder("llama"), dtype=a.dtype),
    )
    model = Composed(
        vit,
        bridge["map"] if name == "linear" else bridge,
        lm,
        -2 if name == "linear" else -1,
        name != "linear",
    ).train()
    parameters = frozen_but(model, a, model.bridge)
    (tokens, labels), pixels = batch(a, True), pictures(a).to(a.dtype)
    tokens, labels = unfold(tokens, labels, 32 if name == "mapl" else (S // p) ** 2)
    return step_of(a, parameters, lambda: model(tokens, pixels, labels).loss)


def train_linear(a, folder, side):
    """LLaVA's first stage against CLIPVisionModel + nn.Linear + LlamaForCausalLM."""
    return composed(a, folder, side, "linear")


def train_mapl(a, folder, side):
    """MAPL against CLIPVisionModel + nn.TransformerEncoder + LlamaForCausalLM."""
    return composed(a, folder, side, "mapl")


def train_qformer(a, folder: Path, side: str):
    """InstructBLIP's Q-Former reads the instruction, too; against InstructBlipForConditionalGeneration."""
    words = torch.randint(10, 500, (a.batch, 16), generator=torch.Generator().manual_seed(4)).to(a.device)
    if side == "ours":
        vlm = load_vlm(folder("instructblip"), a.device, a.dtype).train()
        return ours_step(a, vlm, frozen_but(vlm, a, vlm.bridge), bridge_tokens=words)
    from transformers import InstructBlipForConditionalGeneration

    model = InstructBlipForConditionalGeneration.from_pretrained(
        folder("instructblip"), dtype=a.dtype
    ).train()
    parameters = frozen_but(
        model, a, model.qformer, model.language_projection, model.vision_model.post_layernorm
    )
    model.query_tokens.data = model.query_tokens.data.to(TRAINED)
    parameters.append(model.query_tokens.requires_grad_(True))
    (tokens, labels), pixels = batch(a, True), pictures(a).to(a.dtype)
    tokens, labels = unfold(tokens, labels, 32)
    mask = torch.ones_like(tokens)
    return step_of(
        a,
        parameters,
        lambda: (
            model(
                pixel_values=pixels,
                qformer_input_ids=words,
                qformer_attention_mask=torch.ones_like(words),
                input_ids=tokens,
                attention_mask=mask,
                labels=labels,
            ).loss
        ),
    )


def train_zero_init(a, folder: Path, side: str):
    """LLaMA-Adapter on text against peft's AdaptionPrompt: 10 prompts in every layer but the two lowest."""
    import transformers as t
    from peft import AdaptionPromptConfig, get_peft_model
    tokens, labels = batch(a, False)
    L = SIZES[a.size][0][0]
    if side == "theirs" or not (where := Path(folder("llama")) / "adapter").exists():
        torch.manual_seed(5)
        base = t.LlamaForCausalLM.from_pretrained(folder("llama"), dtype=a.dtype)
        model = get_peft_model(
            base, AdaptionPromptConfig(adapter_layers=L - 2, adapter_len=10, task_type="CAUSAL_LM")
        ).train()
        if not (where := Path(folder("llama")) / "adapter").exists():
            model.float().save_pretrained(where)
        if side == "theirs":
            model.to(a.device, a.dtype)
            parameters = [p for p in model.parameters() if p.requires_grad]
            for p in parameters:
                p.data = p.data.to(TRAINED)
            mask = torch.ones_like(tokens)
            return step_of(
                a, parameters, lambda: model(input_ids=tokens, attention_mask=mask, labels=labels).loss
            )
    decoder = load_decoder(folder("llama"), a.device, a.dtype)
    bridge = load_bridge("zero_init", where, a.device)
    both = nn.ModuleDict({"decoder": decoder, "bridge": bridge}).train()
    parameters = frozen_but(both, a, bridge)

    def loss():
        total, count = next_token_loss(decoder, labels, tokens=tokens, bridge=bridge)
        return total / count
    return step_of(a, parameters, loss)


def train_flamingo(a, folder: Path, side: str):
    """Our idefics bridge (a Flamingo) against IdeficsForVisionText2Text; resampler and gated blocks learn."""
    tokens, labels = batch(a, True)
    image = SIZES[a.size][0][5] + 1
    if side == "ours":
        vlm = load_vlm(folder("idefics"), a.device, a.dtype).train()
        return ours_step(a, vlm, frozen_but(vlm, a, vlm.bridge))
    from transformers import IdeficsForVisionText2Text
    model = IdeficsForVisionText2Text.from_pretrained(folder("idefics"), dtype=a.dtype).train()
    parameters = frozen_but(model, a, model.model.perceiver_resampler, model.model.gated_cross_attn_layers)
    tokens, pixels = tokens.masked_fill(tokens == IMAGE, image), pictures(a).to(a.dtype)[:, None]
    seen = torch.ones(*tokens.shape, 1, dtype=torch.long, device=a.device)
    seen[:, 0] = 0
    mask = torch.ones_like(tokens)

    def loss():  # by hand: its own takes the logits of the two new words for another row, and fails
        logits = model(
            input_ids=tokens, attention_mask=mask, pixel_values=pixels, image_attention_mask=seen
        ).logits
        return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
    return step_of(a, parameters, loss)


def llama(a, folder, side: str):
    if side == "ours":
        return load_decoder(folder("llama"), a.device, a.dtype)
    from transformers import LlamaForCausalLM
    return LlamaForCausalLM.from_pretrained(folder("llama"), dtype=a.dtype).to(a.device).eval()


def forward(a, folder, side):
    """The decoder's logits of every position."""
    model, tokens = llama(a, folder, side), batch(a, False)[0]

    @torch.no_grad()
    def run() -> float:
        out = model(tokens)
        return (out if side == "ours" else out.logits).float().square().mean().item()
    return run


def vit(a, folder, side):
    """The image tower: its state at layer −2, which is what a bridge reads."""
    if side == "ours":
        tower = load_vit(folder("clip"), a.device, a.dtype)
    else:
        from transformers import CLIPVisionModel
        tower = CLIPVisionModel.from_pretrained(folder("clip"), dtype=a.dtype).to(a.device).eval()
    pixels = pictures(a).to(a.dtype)

    @torch.no_grad()
    def run() -> float:
        states = (
            tower.features(pixels, -2)
            if side == "ours"
            else tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        )
        return states.float().square().mean().item()
    return run


def generate(a, folder, side, texts: int = 1, same: int = 8):
    """Greedy, texts of 32 tokens, 128 more, with a cache; ours packs its matrices around every call."""
    model, tokens = (
        llama(a, folder, side),
        batch(argparse.Namespace(**{**vars(a), "batch": max(a.batch, texts)}), False)[0][:texts, :32],
    )

    @torch.no_grad()
    def run() -> float:
        if side == "ours":
            with packed(model):
                ids = model.generate(tokens, max_new_tokens=128)
        else:
            ids = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=128,
                min_new_tokens=128,
                do_sample=False,
            )[:, 32:]
        return float(
            ids[0, :same].sum()
        )  # later tokens may differ where two logits of random weights tie in bfloat16

    return run


def generate_batch(a, folder, side):
    """The same for 8 texts at once."""
    return generate(a, folder, side, texts=8, same=4)


def load(a, folder, side):
    """A decoder from its folder, every byte read."""
    def run() -> float:
        if side == "ours":
            model = load_decoder(folder("llama"), a.device, a.dtype)
        else:
            from transformers import LlamaForCausalLM
            model = LlamaForCausalLM.from_pretrained(folder("llama"), dtype=a.dtype).to(a.device)
        return sum(p.float().abs().max().item() for p in model.parameters())
    return run


def preprocess(a, folder, side):
    """16 pictures of 640 × 480 for CLIP at 224 pixels: shortest side, bicubic, the middle."""
    import numpy as np
    images = list(np.random.default_rng(0).integers(0, 256, (16, 480, 640, 3), dtype=np.uint8))
    if side == "ours":
        run = lambda: data.to_pixels(images)
    else:
        from transformers import CLIPImageProcessor
        processor = CLIPImageProcessor()
        run = lambda: processor(images, return_tensors="pt")["pixel_values"]
    return lambda: run().abs().mean().item()


def tokenize(a, folder, side):
    """The README's paragraphs, 20 times, one by one, with the vocabulary of the folder that SMOLLM2 names."""
    where, texts = os.environ["SMOLLM2"], (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n") * 20
    if side == "ours":
        encode = load_tokenizer(where).encode
    else:
        from transformers import (
            PreTrainedTokenizerFast,
        )  # AutoTokenizer takes GPT-2's class, which does not split digits as the file says

        tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{where}/tokenizer.json")
        encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    return lambda: float(sum(len(encode(text)) for text in texts))


CASES = {  # name → its function, the models it needs, whether memory says anything
    "forward": (forward, True),
    "vit": (vit, True),
    "train-linear": (train_linear, True),
    "train-mlp": (train_mlp, True),
    "train-mapl": (train_mapl, True),
    "train-qformer": (train_qformer, True),
    "train-zero_init": (train_zero_init, True),
    "train-flamingo": (train_flamingo, True),
    "generate": (generate, True),
    "generate-batch": (generate_batch, True),
    "load": (load, True),
    "preprocess": (preprocess, False),
    "tokenize": (tokenize, False),
}


# ---- Measuring -------------------------------------------------------------------------------------------


def timed(a, run) -> tuple[float, float]:
    if a.device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = run()
    if a.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, value


def resident(word: str) -> float:
    """MB: VmHWM or VmRSS of this process."""
    return status()[word] / 1e6


def child(a, folder) -> None:
    """One side of one case, alone: MB at the peak, above the bare imports."""
    import peft  # noqa: F401  both sides import the same
    import transformers                                                         # noqa: F401
    transformers.LlamaForCausalLM, transformers.LlavaForConditionalGeneration
    torch.ones(8, 8, dtype=a.dtype, device=a.device) @ torch.ones(8, 8, dtype=a.dtype, device=a.device)
    before = resident("VmRSS")
    run = CASES[a.cases[0]][0](a, folder, a.child)
    for _ in range(2):
        run()
    print(
        json.dumps(
            torch.cuda.max_memory_allocated() / 1e6 if a.device == "cuda" else resident("VmHWM") - before
        )
    )


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; default: all")
    args.add_argument("--size", choices=SIZES, default="135m")
    args.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args.add_argument("--device", default="cpu")
    args.add_argument("--batch", type=int, default=4)
    args.add_argument("--text", type=int, default=64, help="tokens of a text, the image's apart")
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument(
        "--cached",
        action="store_true",
        help="ours reads the frozen ViT's features from a cache, as train.py --cache does after one epoch",
    )
    args.add_argument("--no-memory", action="store_true")
    args.add_argument("--models", help="folder that keeps the random models between calls")
    args.add_argument("--child", help=argparse.SUPPRESS)
    a = args.parse_args()
    if unknown := [c for c in a.cases if c not in CASES]:
        args.error(f"unknown case {unknown[0]}; known: {', '.join(CASES)}")
    flags = [
        f"--size={a.size}",
        f"--dtype={a.dtype}",
        f"--device={a.device}",
        f"--batch={a.batch}",
        f"--text={a.text}",
        *["--cached"] * a.cached,
    ]
    a.dtype = getattr(torch, a.dtype)
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(a.models or tmp) / a.size

        def folder(kind: str) -> str:
            if not (root / kind / "config.json").exists():
                build(kind, a.size, root / kind)
            return str(root / kind)
        if a.child:
            return child(a, folder)
        import transformers

        print(
            f"{a.size}, {str(a.dtype)[6:]}, {a.device} ({platform.machine()}, {torch.get_num_threads()} "
            f"threads), torch {torch.__version__}, transformers {transformers.__version__}; batch {a.batch}, "
            f"{a.text} tokens of text, {a.rounds} rounds\n"
        )
        print(f"{'':16s}{'ours':>10s}{'theirs':>10s}   ratio (quartiles)        peak MB: ours   theirs")
        cases = a.cases or [c for c in CASES if c != "tokenize" or "SMOLLM2" in os.environ]
        rows = [measure(a, case, folder, [*flags, f"--models={root.parent}"]) for case in cases]
    print(
        "\n"
        + json.dumps(
            dict(
                size=a.size,
                dtype=str(a.dtype)[6:],
                device=a.device,
                threads=torch.get_num_threads(),
                rows=rows,
            )
        )
    )


def measure(a, case: str, folder, flags: list[str]) -> dict:
    make, weighs = CASES[case]
    runs = {side: make(a, folder, side) for side in ("theirs", "ours")}
    first = {side: run() for side, run in runs.items()}  # warms up, and both must say the same
    off = abs(first["ours"] - first["theirs"]) / max(1e-6, abs(first["theirs"]))
    assert off < (2e-2 if a.dtype != torch.float32 else 2e-4), (
        f"{case}: ours {first['ours']}, theirs {first['theirs']}"
    )
    seconds = {side: [] for side in runs}
    for _ in range(a.rounds):
        for side, run in runs.items():
            seconds[side].append(timed(a, run)[0])
    del runs
    ratios = sorted(t / o for o, t in zip(seconds["ours"], seconds["theirs"]))
    low, high = (statistics.quantiles(ratios, n=4)[i] for i in (0, 2)) if len(ratios) > 1 else ratios * 2
    row = dict(
        case=case,
        ours_s=statistics.median(seconds["ours"]),
        theirs_s=statistics.median(seconds["theirs"]),
        ratio=statistics.median(ratios),
        low=low,
        high=high,
    )
    if weighs and not a.no_memory:
        for side in ("ours", "theirs"):
            said = subprocess.run(
                [sys.executable, __file__, case, *flags, "--child", side],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            row[f"{side}_mb"] = json.loads(said.splitlines()[-1])
    print(
        f"{case:16s}{1e3 * row['ours_s']:7.0f} ms{1e3 * row['theirs_s']:7.0f} ms   "
        f"{row['ratio']:5.2f} ({low:.2f} to {high:.2f})"
        + (f"{row['ours_mb']:20.0f} {row['theirs_mb']:8.0f}" if "ours_mb" in row else ""),
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
