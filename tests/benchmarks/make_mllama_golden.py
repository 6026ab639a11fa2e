"""Writes tests/golden/mllama: a tiny Llama-3.2-Vision of random weights, inputs, and what transformers makes
of them.

    pip install transformers; python tests/benchmarks/make_mllama_golden.py

Nothing is left at a trivial value: gates are open (0.35 to 1.2, both signs), norm weights are not 1, biases
are not 0.
"""
from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.processing_mllama import (convert_sparse_cross_attention_mask_to_dense,
                                                          get_cross_attention_token_mask)

FOLDER = Path(__file__).parents[1] / "golden" / "mllama"
SEED, NEW = 7, 12                                    # NEW: greedy tokens
V, TILES, S = 64, 4, 12
IMAGE = V  # the first id beyond the vocabulary, as in the releases
RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]       # ids count from 1
ASPECT = [6, 2, 1, 7, 4, 5]  # arrangement of each of the six images: 4, 2, 1, 3, 4, 2 tiles
PROMPTS = {
    "start": "I T6",
    "middle": "T4 I T5",
    "two": "T2 I T3 I T3",
    "pair": "T2 I I T3 I T2",
    "text": "T6",
}
ROWS = {
    "start": [0],
    "middle": [1],
    "two": [2, 3],
    "pair": [4, 0, 5],
    "text": [],
}  # images that each prompt uses

TEXT = dict(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-3,
    max_position_embeddings=64,
    cross_attention_layers=[1, 2, 5],
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    hidden_act="silu",
    dropout=0.0,
    tie_word_embeddings=False,
)
THETA = 100.0
SCALING = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=16)
VISION = dict(
    hidden_size=12,
    num_hidden_layers=3,
    num_global_layers=2,
    attention_heads=2,
    intermediate_size=16,
    vision_output_dim=36,
    image_size=S,
    patch_size=4,
    norm_eps=1e-2,
    max_num_tiles=TILES,
    num_channels=3,
    intermediate_layers_indices=[0, 2],
    hidden_act="gelu",
    supported_aspect_ratios=RATIOS,
)


def make_model() -> MllamaForConditionalGeneration:
    text = {**TEXT, "rope_parameters": {"rope_theta": THETA, **SCALING}}
    config = MllamaConfig(vision_config=VISION, text_config=text, image_token_index=IMAGE)
    config._attn_implementation = "eager"
    model = MllamaForConditionalGeneration(config).eval().float()
    g = torch.Generator().manual_seed(SEED)
    gates = 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "gate" in name.rsplit(".", 1)[-1]:  # signs alternate, and no gate is a rounding of another
                p.fill_((0.35 + 0.85 * torch.rand((), generator=g).item()) * (-1) ** gates)
                gates += 1
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.3 * noise)
            elif p.ndim == 1:
                p.copy_(0.3 * noise)
            elif "embed" in name and p.ndim == 2:
                p.copy_(0.7 * noise)
            else:
                p.copy_(1.2 * noise / math.sqrt(p[0].numel()))
    return model


def make_prompt(form: str, g: torch.Generator) -> list[int]:
    ids = []
    for part in form.split():
        ids += [IMAGE] if part == "I" else torch.randint(3, V, (int(part[1:]),), generator=g).tolist()
    return ids


def arguments(
    rows: list[list[int]], images: list[list[int]], pixels, aspect, mask, dtype=torch.float32
) -> dict:
    """What the processor hands to the model for these rows (already padded on the left with 0) and their
    images."""
    ids = torch.tensor(rows)
    real = torch.ones_like(ids)
    for r, row in enumerate(rows):
        real[r, :next(i for i, t in enumerate(row) if t)] = 0
    out = dict(input_ids=ids, attention_mask=real, position_ids=(real.cumsum(-1) - 1).clamp(min=0))
    most = max(map(len, images))
    if most:
        out |= dict(pixel_values=torch.zeros(len(rows), most, *pixels.shape[1:], dtype=dtype),
                    aspect_ratio_ids=torch.zeros(len(rows), most, dtype=torch.long),
                    aspect_ratio_mask=torch.zeros(len(rows), most, TILES, dtype=torch.long))
        out["aspect_ratio_mask"][..., 0] = 1            # as the image processor pads
        for r, row in enumerate(images):
            for i, m in enumerate(row):
                out["pixel_values"][r, i], out["aspect_ratio_ids"][r, i] = pixels[m], aspect[m]
                out["aspect_ratio_mask"][r, i] = mask[m]
        spans = [get_cross_attention_token_mask(row, IMAGE) for row in rows]
        counts = [[int(mask[m].sum()) for m in row] for row in images]
        dense = convert_sparse_cross_attention_mask_to_dense(spans, counts, TILES, ids.shape[1])
        out["cross_attention_mask"] = torch.from_numpy(dense)
    return out


def loss_of(y: torch.Tensor) -> torch.Tensor:
    wave = torch.cos(0.37 * torch.arange(y.numel(), dtype=torch.float64) + 0.1).to(y.dtype)
    return 10 * (y.flatten() * wave).mean()


@torch.no_grad()
def greedy(model, inputs: dict) -> tuple[torch.Tensor, float]:
    """By recomputing everything at each step; and the smallest gap between the two largest logits."""
    new, gap = [], math.inf
    for _ in range(NEW):
        top = model(**inputs, use_cache=False).logits[0, -1].topk(2)
        gap = min(gap, float(top.values[0] - top.values[1]))
        new.append(int(top.indices[0]))
        inputs = dict(inputs, input_ids=torch.cat((inputs["input_ids"], torch.tensor([[new[-1]]])), 1))
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
        if (seen := inputs.get("cross_attention_mask")) is not None:
            inputs["cross_attention_mask"] = torch.cat((seen, seen[:, -1:]), 1)
    return torch.tensor([new]), gap


class Zeroed:
    """Meta's own rule on transformers' code: the cross-attention of a word that sees no image is multiplied
    by 0."""

    def __init__(self, model, inputs):
        self.layers = [l.cross_attn for l in model.model.language_model.layers if hasattr(l, "cross_attn")]
        self.sees = inputs["cross_attention_mask"].flatten(2).any(-1, keepdim=True)

    def __enter__(self):
        zero = lambda module, args, out: (out[0] * self.sees, *out[1:])
        self.hooks = [l.register_forward_hook(zero) for l in self.layers]

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def run(model, prompts, batches, pixels, aspect, mask) -> dict[str, torch.Tensor]:
    dtype = next(model.parameters()).dtype
    core, out = model.model, {}
    vision = core.vision_model(pixels[:, None].to(dtype), aspect[:, None], mask[:, None])
    features = vision.last_hidden_state[:, 0]
    out["features"] = features
    out["projected"] = core.multi_modal_projector(features)
    of = lambda rows, images: arguments(rows, images, pixels.to(dtype), aspect, mask, dtype)
    for name, ids in prompts.items():
        inputs = of([ids], [ROWS[name]])
        got = model(**inputs, output_hidden_states=True)
        out[f"{name}.logits"] = got.logits
        if name in ("middle", "pair", "text"):
            layers = []  # of every layer, cross-attention layers too: what it returns
            hooks = [
                l.register_forward_hook(lambda m, a, o: layers.append(o)) for l in core.language_model.layers
            ]
            model(**inputs)
            for hook in hooks:
                hook.remove()
            text = core.language_model
            states = [text.embed_tokens(inputs["input_ids"]), *layers[:-1], text.norm(layers[-1])]
            assert len(states) == len(got.hidden_states)
            assert all(torch.equal(a, b) for a, b in zip(states, got.hidden_states))
            for i, h in enumerate(states):
                out[f"{name}.hidden_states.{i}"] = h
    for name, (rows, images) in batches.items():
        inputs = of(rows, images)
        if name == "batch":
            logits = model(**inputs).logits
        else:
            with Zeroed(model, inputs):
                logits = model(**inputs).logits
        out[f"{name}.logits"] = logits * inputs["attention_mask"][..., None]
    with Zeroed(model, inputs := of([prompts["middle"]], [ROWS["middle"]])):
        out["zeroed.middle.logits"] = model(**inputs).logits
    return out


def main() -> None:
    torch.manual_seed(SEED)
    model = make_model()
    g = torch.Generator().manual_seed(SEED + 1)
    prompts = {name: make_prompt(form, g) for name, form in PROMPTS.items()}
    aspect = torch.tensor(ASPECT)
    mask = torch.tensor([[int(t < math.prod(RATIOS[a - 1])) for t in range(TILES)] for a in ASPECT])
    pixels = torch.randn(len(ASPECT), TILES, 3, S, S, generator=g) * mask[..., None, None, None]
    pad = lambda names: [
        [0] * (max(len(prompts[n]) for n in names) - len(prompts[n])) + prompts[n] for n in names
    ]
    batches = {
        name: (pad(rows), [ROWS[r] for r in rows])
        for name, rows in (("batch", ("start", "middle")), ("zeroed.mixed", ("middle", "two", "text")))
    }

    with torch.no_grad():
        expected = run(model, prompts, batches, pixels, aspect, mask)
    gaps, cached = {}, True
    for name, ids in prompts.items():
        inputs = arguments([ids], [ROWS[name]], pixels, aspect, mask)
        expected[f"{name}.generated_ids"], gaps[name] = greedy(model, inputs)
        inputs.pop("position_ids")
        again = model.generate(
            **inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        cached &= torch.equal(again[:, len(ids):], expected[f"{name}.generated_ids"])

    def gradients(m, dtype=torch.float32):
        m.zero_grad()
        loss = loss_of(
            m(**arguments([prompts["pair"]], [ROWS["pair"]], pixels.to(dtype), aspect, mask, dtype)).logits
        )
        loss.backward()
        layers = [f"model.language_model.layers.{l}." for l in TEXT["cross_attention_layers"]]
        grads = {f"grad.{n}": p.grad.clone() for n, p in m.named_parameters()
                 if n.startswith(("model.multi_modal_projector.", *layers))}
        return {"grad.loss": loss.detach(), **grads}
    expected |= gradients(model)
    everything = sum(loss_of(t) for t in run(model, prompts, batches, pixels, aspect, mask).values())
    model.zero_grad()
    everything.backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or float(p.grad.abs().max()) < 1e-9]
    # weights as transformers writes them, and under the names it has in memory
    keys = dict(model.state_dict())
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp)
        written = load_file(Path(tmp) / "model.safetensors")
        config = json.loads((Path(tmp) / "config.json").read_text())
        same = torch.equal(MllamaForConditionalGeneration.from_pretrained(tmp, attn_implementation="eager")(
            **arguments([prompts["pair"]], [ROWS["pair"]], pixels, aspect, mask)
        ).logits, expected["pair.logits"])
    with tempfile.TemporaryDirectory() as tmp:
        save_file(
            {n: t.contiguous() for n, t in keys.items()}, Path(tmp) / "model.safetensors", {"format": "pt"}
        )
        (Path(tmp) / "config.json").write_text(json.dumps(config))
        same &= torch.equal(
            MllamaForConditionalGeneration.from_pretrained(tmp, attn_implementation="eager")(
                **arguments([prompts["pair"]], [ROWS["pair"]], pixels, aspect, mask)
            ).logits,
            expected["pair.logits"],
        )
    assert {"language_model.model.layers.1.cross_attn.q_proj.weight", "language_model.lm_head.weight"} <= set(
        written
    )
    assert {"model.language_model.layers.1.cross_attn.q_proj.weight", "lm_head.weight"} <= set(keys)

    exact = model.double()
    with torch.no_grad():
        precise = run(exact, prompts, batches, pixels.double(), aspect, mask)
    fine = gradients(exact, torch.float64)
    distance = max(float((precise[k] - expected[k].double()).abs().max()) for k in precise)
    relative = max(float((fine[k] - expected[k].double()).abs().max() / fine[k].abs().max()) for k in fine)

    def put(name, tensors):
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, FOLDER / name, {"format": "pt"})

    inputs = {"pixel_values": pixels, "aspect_ratio_ids": aspect, "aspect_ratio_mask": mask,
              **{f"{n}.input_ids": torch.tensor([ids]) for n, ids in prompts.items()}}
    for name, (rows, _) in batches.items():
        inputs |= {
            f"{name}.input_ids": torch.tensor(rows),
            f"{name}.attention_mask": (torch.tensor(rows) != 0).long(),
        }
    put("model.safetensors", written)
    memory = {w: next(k for k, u in keys.items() if torch.equal(u, t)) for w, t in written.items()}
    assert sorted(memory.values()) == sorted(keys)
    put("inputs.safetensors", inputs)
    put("expected.safetensors", expected)
    hub = dict(
        architectures=["MllamaForConditionalGeneration"],
        image_token_index=IMAGE,
        model_type="mllama",
        text_config={**TEXT, "model_type": "mllama_text_model", "rope_theta": THETA, "rope_scaling": SCALING},
        torch_dtype="float32",
        transformers_version="4.45.0",
        vision_config={**VISION, "model_type": "mllama_vision_model"},
    )
    kind = lambda v: f"{str(v.dtype).removeprefix('torch.')}[{', '.join(map(str, v.shape))}]"
    describe = lambda tensors: {k: kind(v) for k, v in tensors.items()}
    case = {
        "case": "mllama",
        "reference": {
            "library": "transformers",
            "version": transformers.__version__,
            "class": "MllamaForConditionalGeneration",
            "attention": "eager",
            "torch": torch.__version__,
        },
        "seed": SEED,
        "inputs": describe(inputs),
        "inputs_meaning": {
            "pixel_values": "6 images [image, tile, 3, S, S], absent tiles are zeros; 'pixel_values_rows' "
            "says which each prompt uses",
            "aspect_ratio_ids": "arrangement of each image's tiles, from 1, in the config's "
            "supported_aspect_ratios",
            "aspect_ratio_mask": "1 = a tile, 0 = no tile here",
            **{
                f"{n}.input_ids": f"prompt '{n}' ({form}; T = text, I = image), "
                                  "ONE image_token_index per image"
                for n, form in PROMPTS.items()
            },
            "batch.input_ids": "prompts 'start' and 'middle', left-padded with 0",
            "zeroed.mixed.input_ids": "prompts 'middle', 'two' and 'text', left-padded with 0",
            "*.attention_mask": "1 = real position",
        },
        "outputs": describe(expected),
        "outputs_meaning": {
            "features": "[image, tile, patches + 1, vision_output_dim]: last_hidden_state of the vision "
            "model",
            "projected": "the same after multi_modal_projector: what cross-attention sees",
            "*.hidden_states.*": "0 = embeddings, i + 1 = output of layer i of ALL layers (cross-attention "
            "too), the last one after the final norm; a text without images skips the cross-attention layers",
            "*.logits": "vocab_size columns; rows at pad positions of a batch set to 0",
            "zeroed.*": "Meta's own rule: the cross-attention of a word that sees no image is multiplied by "
            "0, here by a hook on transformers' layers, which zero that word's MLP only; the rows of "
            "zeroed.mixed have 1, 2 and 0 images",
            "*.generated_ids": f"{NEW} greedy tokens, no stop token",
            "grad.loss": "scalar loss of pair.logits: loss = 10 * mean_i( y_i * cos(0.37*i + 0.1) ), i = "
            "C-order flat index over the named output, cosines computed in float64 then cast to float32",
            "grad.*": "its gradient with respect to projector and cross-attention layers, by their names in "
            "memory",
        },
        "tolerance": {"atol": 1e-4, "rtol": 1e-4, "grad_rtol_of_max": 1e-3},
        "reference_float32_vs_float64_max_abs": distance,
        "reference_float32_vs_float64_gradients_relative_to_largest_entry": relative,
        "min_top1_top2_logit_gap_while_decoding": gaps,
        "weights_without_effect_on_outputs": idle,
        "files": {
            "model.safetensors + config.json": "as transformers 5 writes them: the names of the published "
            "checkpoints (language_model.model.*, language_model.lm_head.weight, "
            "multi_modal_projector.*, vision_model.*)",
            "config.hub.json": "the same in the form of the published config.json (rope_theta, rope_scaling)",
            "names_in_memory.json": "name in model.safetensors: name of the same tensor in memory, which a "
            "file may have too (model.language_model.*, model.vision_model.*, "
            "model.multi_modal_projector.*, lm_head.weight)",
        },
        "cross_checks": {
            "both_layouts_give_identical_logits": bool(same),
            "generate_with_cache_equals_full_recompute": bool(cached),
        },
        "pixel_values_rows": ROWS,
        "notes": [
            "cross-attention masks come from the processor's own functions",
            "layernorm_pre and layernorm_post have ε 1e-5, whatever norm_eps says",
            "hidden size 12 with 2 taps: channel c of tap j is column 12 + 2 c + j of the features",
        ],
    }
    texts = {"config.json": config, "config.hub.json": hub, "case.json": case, "names_in_memory.json": memory}
    for name, value in texts.items():
        (FOLDER / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for file in FOLDER.iterdir():
        file.chmod(0o644)
    leak = float((expected["middle.logits"] - expected["zeroed.middle.logits"]).abs().max())
    largest = max(float(t.abs().max()) for t in expected.values() if t.is_floating_point())
    size = sum(f.stat().st_size for f in FOLDER.iterdir()) / 1000
    print(
        f"largest output {largest:.2f}; the two rules differ by {leak:.2f}; float32 - float64: "
        f"{distance:.1e}, "
        f"gradients {relative:.1e}; smallest gap {min(gaps.values()):.3f}; {same=} {cached=}; {size:.0f} kB; "
        f"{idle=}"
    )


if __name__ == "__main__":
    main()
