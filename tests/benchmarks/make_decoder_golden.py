"""Writes tests/golden/{qwen2-bias, qwen3-qk-norm, mistral-plain, mistral-window, llama-rope-linear,
qwen2-rope-yarn, llama-rope-dynamic}: tiny decoders, what transformers makes of them.

    pip install transformers; python tests/benchmarks/make_decoder_golden.py [CASE …]

Weights are random; norm weights are not 1, biases are not 0. config.json is as the library writes it,
config.hub.json as published checkpoints look.
"""
from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

GOLDEN = Path(__file__).parents[1] / "golden"
SEED, NEW, V = 15, 12, 48                               # NEW: greedy tokens
SIZES = dict(
    vocab_size=V,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
CASES = {  # case → (config class, model class, fields, RoPE, what else a published config.json says, note)
    "qwen2-bias": (
        Qwen2Config,
        Qwen2ForCausalLM,
        dict(rms_norm_eps=1e-6, tie_word_embeddings=True),
        dict(rope_theta=1000.0),
        dict(use_sliding_window=False, sliding_window=32, max_window_layers=2),
        "biases on q, k and v, none on o; the published window is shorter than the context and not in use",
    ),
    "mistral-plain": (
        MistralConfig,
        MistralForCausalLM,
        dict(rms_norm_eps=1e-5, head_dim=10, sliding_window=None),
        dict(rope_theta=1000.0),
        dict(sliding_window=None, head_dim=10),
        "no sliding window, as from version 0.2 on; heads × head_dim is not the width",
    ),
    "qwen3-qk-norm": (
        Qwen3Config,
        Qwen3ForCausalLM,
        dict(rms_norm_eps=1e-6, tie_word_embeddings=True, head_dim=10),
        dict(rope_theta=1000.0),
        dict(use_sliding_window=False, sliding_window=None, max_window_layers=2),
        "no biases, an RMSNorm over each head of q and k ahead of RoPE; heads × head_dim is not the width",
    ),
    "mistral-window": (
        MistralConfig,
        MistralForCausalLM,
        dict(rms_norm_eps=1e-5, sliding_window=5),
        dict(rope_theta=1000.0),
        dict(sliding_window=5),
        "as version 0.1: a token sees itself and 4 tokens before it, texts are longer",
    ),
    "llama-rope-linear": (
        LlamaConfig,
        LlamaForCausalLM,
        dict(rms_norm_eps=1e-5),
        dict(rope_theta=100.0, rope_type="linear", factor=4.0),
        dict(rope_scaling={"type": "linear", "factor": 4.0}),
        "positions divided by 4; the published key is `type`",
    ),
    "qwen2-rope-yarn": (
        Qwen2Config,
        Qwen2ForCausalLM,
        dict(rms_norm_eps=1e-6),
        dict(rope_theta=10000.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
        dict(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
        "some pairs interpolated, all scores larger, as the model cards of Qwen2.5 say for long texts",
    ),
    "llama-rope-dynamic": (
        LlamaConfig,
        LlamaForCausalLM,
        dict(rms_norm_eps=1e-5, max_position_embeddings=18),
        dict(rope_theta=200.0, rope_type="dynamic", factor=4.0),
        dict(rope_scaling={"type": "dynamic", "factor": 4.0}),
        "24 tokens are more than the 18 of pretraining, so all pairs but the fastest turn slower; 18 are not",
    ),
}


def make_model(kind, cls, fields: dict, ropes: dict):
    config = kind(**{**SIZES, **fields}, rope_parameters={"rope_type": "default", **ropes})
    config._attn_implementation = "eager"
    model = cls(config).eval().float()
    g = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            noise *= (
                0.3
                if "norm" in name
                else 0.5
                if p.ndim == 1 or "embed" in name
                else 1 / math.sqrt(p.shape[1])
            )
            p.copy_(noise + ("norm" in name))
    return model


@torch.no_grad()
def run(model, ids, padded, mask) -> dict[str, torch.Tensor]:
    got = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    out = {"logits": got.logits, **{f"hidden_states.{i}": h for i, h in enumerate(got.hidden_states)}}
    padded = model(input_ids=padded, attention_mask=mask, position_ids=place, use_cache=False).logits
    return {**out, "padded_logits": padded * mask[..., None]}


@torch.no_grad()
def greedy(model, ids) -> tuple[torch.Tensor, float]:
    """By recomputing everything at each step; and the smallest gap between the two largest logits."""
    start, gap = ids.shape[1], math.inf
    for _ in range(NEW):
        top = model(input_ids=ids, use_cache=False).logits[:, -1].topk(2)
        gap = min(gap, float((top.values[:, 0] - top.values[:, 1]).min()))
        ids = torch.cat((ids, top.indices[:, :1]), 1)
    return ids[:, start:], gap


def main() -> None:
    for case in sys.argv[1:] or CASES:
        kind, cls, fields, ropes, published, note = CASES[case]
        model, g, folder = (
            make_model(kind, cls, fields, ropes),
            torch.Generator().manual_seed(SEED + 1),
            GOLDEN / case,
        )
        ids, prompt = torch.randint(3, V, (2, 24), generator=g), torch.randint(3, V, (2, 6), generator=g)
        padded, mask = torch.randint(3, V, (3, 13), generator=g), torch.ones(3, 13, dtype=torch.long)
        for row, gap in enumerate((5, 0, 9)):
            padded[row, :gap], mask[row, :gap] = 0, 0
        expected = run(model, ids, padded, mask)
        new, gap = greedy(model, prompt)
        cached = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None)[:, 6:]
        assert gap > 0.01 and torch.equal(new, cached)
        expected["generated_ids"] = new

        folder.mkdir(exist_ok=True)
        model.config.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        ropes = config.pop("rope_parameters")
        config.pop("layer_types", None)
        config["torch_dtype"] = config.pop("dtype", "float32")
        hub = {**config, "rope_theta": ropes["rope_theta"], "rope_scaling": None, **published}
        (folder / "config.hub.json").write_text(json.dumps(hub, indent=2) + "\n")
        save = lambda name, tensors: save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name)
        tied = ("lm_head.weight",) if model.config.tie_word_embeddings else ()
        save("model.safetensors", {k: v for k, v in model.state_dict().items() if k not in tied})
        inputs = dict(input_ids=ids, prompt_ids=prompt, padded_input_ids=padded, padded_attention_mask=mask)
        save("inputs.safetensors", inputs)
        save("expected.safetensors", expected)
        exact = run(
            model.double(), ids, padded, mask
        )  # float64; rows that are masked completely become NaN there
        describe = lambda tensors: {
            k: f"{v.dtype}{list(v.shape)}".removeprefix("torch.") for k, v in tensors.items()
        }
        (folder / "case.json").write_text(
            json.dumps(
                {
                    "case": case,
                    "reference": {
                        "library": "transformers",
                        "version": transformers.__version__,
                        "class": cls.__name__,
                        "attention": "eager",
                        "torch": torch.__version__,
                    },
                    "seed": SEED,
                    "inputs": describe(inputs),
                    "outputs": describe(expected),
                    "outputs_meaning": {
                        "hidden_states.*": "0 = embeddings, i = after layer i, the last after the final norm",
                        "padded_logits": "left-padded batch, positions count real tokens; 0 at padding",
                        "generated_ids": f"{NEW} greedy tokens per prompt (argmax, no stop token)",
                    },
                    "tolerance": {"atol": 1e-4, "rtol": 1e-4},
                    "min_top1_top2_logit_gap_while_decoding": gap,
                    "notes": [note],
                    "reference_float32_vs_float64_max_abs": max(
                        float((expected[k] - exact[k]).abs().max()) for k in exact if k != "padded_logits"
                    ),
                    "files": {
                        "config.json": "as transformers writes it",
                        "config.hub.json": "as published checkpoints look; must load identically",
                    },
                },
                indent=2,
            )
            + "\n"
        )
        print(case, "gap", round(gap, 3), "bytes", sum(f.stat().st_size for f in folder.iterdir()))


if __name__ == "__main__":
    main()
