"""Writes tests/golden/prompt-tuning: a tiny Llama, and what peft's prompts and prefixes make of it.

    pip install transformers peft; python tests/benchmarks/make_prompt_golden.py

Three adapters on one decoder: words at the input, and prefixes with and without the network.
"""
from __future__ import annotations

import json
import math
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file

FOLDER = Path(__file__).parents[1] / "golden" / "prompt-tuning"
SEED, NEW = 33, 10                      # NEW: greedy tokens
COMMON = dict(task_type="CAUSAL_LM", num_virtual_tokens=5)
ADAPTERS = {
    "prompt": peft.PromptTuningConfig(**COMMON),
    "prefix-network": peft.PrefixTuningConfig(**COMMON, prefix_projection=True, encoder_hidden_size=12),
    "prefix-direct": peft.PrefixTuningConfig(**COMMON),
}


def random_(module: torch.nn.Module, g: torch.Generator) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "embedding" in name:
                p.copy_(0.7 * noise)
            elif p.ndim < 2:
                p.copy_(0.3 * noise + ("norm" in name))
            else:
                p.copy_(noise / math.sqrt(p[0].numel()))


def build(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=43, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    random_(model, torch.Generator().manual_seed(SEED))
    return model.to(dtype)


def fixed_loss(y: torch.Tensor) -> torch.Tensor:
    wave = torch.cos(0.37 * torch.arange(y.numel(), dtype=torch.float64) + 0.1).to(y.dtype)
    return 10 * (y.flatten() * wave).mean()


def run(name: str, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[dict, dict, dict]:
    """Tensors of the adapter, what came out, and the smallest gap between the two likeliest tokens."""
    model = peft.get_peft_model(build(dtype), ADAPTERS[name]).eval()
    encoder = model.prompt_encoder["default"]
    random_(encoder.float(), torch.Generator().manual_seed(SEED + 1 + [*ADAPTERS].index(name)))
    encoder.to(dtype)
    y = {"logits": model(input_ids=ids).logits}
    loss = fixed_loss(y["logits"])
    loss.backward()
    y["grad.loss"] = loss
    y |= {f"grad.{n}": p.grad for n, p in encoder.named_parameters()}
    text, gaps = ids[:, :4], []
    with torch.no_grad():
        for _ in range(NEW):                            # without a cache: every step reads the whole text
            best = model(input_ids=text).logits[:, -1].topk(2)
            gaps.append(float((best.values[:, 0] - best.values[:, 1]).min()))
            text = torch.cat((text, best.indices[:, :1]), dim=1)
    y["generated_ids"] = text[:, 4:]
    keep = {n: p.detach().clone() for n, p in encoder.named_parameters()}
    return keep, {k: v.detach() for k, v in y.items()}, {name: min(gaps)}


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    ids = torch.randint(43, (2, 9), generator=torch.Generator().manual_seed(SEED))
    adapters, expected, gaps, distance = {}, {}, {}, 0.0
    for name in ADAPTERS:
        tensors, y, gap = run(name, ids)
        _, exact, _ = run(name, ids, torch.float64)
        distance = max(distance, max(float((y[k] - exact[k]).abs().max()) for k in y if k != "generated_ids"))
        adapters |= {f"{name}.{n}": t for n, t in tensors.items()}
        expected |= {f"grad.{name}.{k[5:]}" if k.startswith("grad.") else f"{name}.{k}": v
                     for k, v in y.items()}
        gaps |= gap
    base = build()
    with torch.no_grad():
        expected["plain.logits"] = base(input_ids=ids).logits
    base.save_pretrained(FOLDER)
    for file in FOLDER.glob("generation_config.json"):
        file.unlink()
    for file, tensors in (("adapters", adapters), ("inputs", {"input_ids": ids}), ("expected", expected)):
        save_file({k: v.contiguous() for k, v in tensors.items()}, FOLDER / f"{file}.safetensors")
    case = {
        "case": "prompt-tuning",
        "reference": {"library": "peft", "version": peft.__version__, "class": "PeftModelForCausalLM",
                      "transformers": transformers.__version__, "attention": "eager",
                      "torch": torch.__version__},
        "seed": SEED,
        "outputs_meaning": {
            "plain.logits": "the frozen Llama alone", "*.logits": "with the adapter; of prompt tuning the "
            "first 5 positions are the prompts", "*.generated_ids": f"{NEW} greedy tokens after "
            "input_ids[:, :4]", "grad.*": "loss of the logits: 10 * mean_i( y_i * cos(0.37*i + 0.1) )"},
        "tolerance": {"atol": 1e-4, "rtol": 1e-4, "grad_rtol_of_max": 1e-3},
        "reference_float32_vs_float64_max_abs": distance,
        "min_top1_top2_logit_gap_while_decoding": gaps,
        "files": {"adapters.safetensors": "ADAPTER.name in peft's prompt encoder"},
        "notes": ["prefix-direct learns the keys and values themselves: 5 x (3 layers, 2, 2 heads, 6)",
                  "a prefix's keys have no rotary turn; the first word stands at position 5"]}
    (FOLDER / "case.json").write_text(json.dumps(case, indent=2) + "\n", encoding="utf-8")
    moved = {n: float((expected[f"{n}.logits"][:, -9:] - expected["plain.logits"]).abs().max())
             for n in ADAPTERS}
    print(f"{gaps=} {distance=} {moved=}", {k: tuple(v.shape) for k, v in adapters.items()})


if __name__ == "__main__":
    main()
