"""papers/systems.py: the stages of LLaVA, LLaVA-1.5, BLIP-2 and LLaMA-Adapter, and the numbers that they
share with the recipes of their bridges in train.py.

Run      python train.py --recipe llava | llava-1.5 | blip2 | adapter      the stages, one after the other
         python train.py --list            every recipe, the paper's numbers beside ours
"""
from __future__ import annotations

from papers import blip2_stage1
from papers.recipe import MUON, Numbers, Recipe

# The bundled ViT is probed at layer −2, so every toy bridge reads it there.
LINEAR_OPTIONS, MLP_OPTIONS = dict(reads=-2), dict(reads=-2)
QFORMER_OPTIONS = blip2_stage1.RECIPES["blip2-1"].options
ZERO_INIT_OPTIONS = dict(reads=-2, prompts=16, adapted=4, version=2, width=128, depth=2, heads=4)
LLAVA = dict(weight_decay=0.0, warmup=0.03, beta2=0.999, clip=1.0)
# 2 of 5 epochs warm up. Rate and floor are the code's: 9e-3 for 256 texts is 2.25e-3 for 64.
ADAPTER = dict(weight_decay=0.02, warmup=0.4, beta2=0.95, clip=0, floor=0.0)
ADAPTER_RATE = "5 epochs; the code's learning rate, §4.1 says 0.009"
ADAPTER_V1 = dict(version=1)            # §3.3: one image vector; of which of CLIP's layers is not said
BLIP2 = dict(weight_decay=0.05, clip=0, floor=0.5)      # stage 2: down to 5e-5
# heads · 128 = D = 4096, the width of its decoder; a bridge's own defaults are OpenFlamingo's
FLAMINGO_9B = dict(heads=32, head_width=128, resampler_heads=16, resampler_head_width=128,
                   act="squared_relu", norm_media=True)
FLAMINGO = dict(                        # and of its ablation (round_robin.py)
    data="M3W * 1.0, ALIGN * 0.2, LTIP * 0.2, VTP * 0.03",
    paper=Numbers(1e-4, None, 500000, 5000, "constant", 0.1, 0.999), toy=Numbers(2e-3, 64, 1000, **MUON),
    bridge="flamingo", options=dict(reads=-2, every=1, latents=16, depth=2, heads=4, head_width=32),
    paper_options=FLAMINGO_9B)

RECIPES = {
    "llava-1": Recipe(
        "LLaVA stage 1, captions alone: W learns to align", "CC3M, 595K pairs, 1 epoch",
        Numbers(2e-3, 128, 4650, **LLAVA), Numbers(6e-3, 64, 400), "linear", options=LINEAR_OPTIONS,
        captions=1.0, template="plain"),
    "llava-2": Recipe(
        "LLaVA stage 2 (§4.2): W and the decoder learn from conversations", "Instruct-158K, 3 epochs",
        Numbers(2e-5, 32, 14800, **LLAVA), Numbers(1e-3, 64, 400), "linear", ("bridge", "decoder"),
        options=LINEAR_OPTIONS, start="llava-1"),
    "llava-1.5-1": Recipe(
        "LLaVA-1.5 stage 1, captions alone: the MLP learns to align", "LCS-558K, 1 epoch",
        Numbers(1e-3, 256, 2180, **LLAVA), Numbers(6e-3, 64, 400), "mlp", options=MLP_OPTIONS,
        captions=1.0, template="plain"),
    "llava-1.5-2": Recipe(
        "LLaVA-1.5 stage 2: MLP and decoder learn from academic VQA and conversations", "mix-665K, 1 epoch",
        Numbers(2e-5, 128, 5200, **LLAVA), Numbers(1e-3, 64, 400), "mlp", ("bridge", "decoder"),
        options=MLP_OPTIONS, start="llava-1.5-1"),
    "blip2-2": Recipe(
        "BLIP-2 stage 2 (§3.3): the Q-Former of stage 1 learns to prompt the frozen decoder", "129M pairs",
        Numbers(1e-4, 1920, 80000, 2000, **BLIP2), Numbers(2e-3, 64, 800, **MUON), "qformer",
        options=QFORMER_OPTIONS, start="blip2-1"),
    "adapter-1": Recipe(
        "LLaMA-Adapter (§3.1, §4.1): prompts and gates learn instructions without pictures",
        f"Alpaca-52K, {ADAPTER_RATE}", Numbers(2.25e-3, 64, 4060, **ADAPTER), Numbers(3e-3, 64, 200, **MUON),
        "zero_init", options=ZERO_INIT_OPTIONS, paper_options=ADAPTER_V1, template="alpaca",
        toy_data="shapes-words"),
    "adapter-2": Recipe(
        "LLaMA-Adapter (§3.3): prompts, gates and projection learn from pictures",
        f"ScienceQA, {ADAPTER_RATE}",
        Numbers(2.25e-3, 64, 1000, **ADAPTER), Numbers(3e-3, 64, 1000, **MUON), "zero_init",
        options=ZERO_INIT_OPTIONS, paper_options=ADAPTER_V1, template="alpaca", form="QCM-A",
        start="adapter-1"),
    "adapter-rand": Recipe(
        "LLaMA-Adapter's ablation (§4.3, Table 5): gates at random instead of zero",
        f"ScienceQA, {ADAPTER_RATE}",
        Numbers(2.25e-3, 64, 1000, **ADAPTER), Numbers(3e-3, 64, 1000, **MUON), "zero_init",
        options={**ZERO_INIT_OPTIONS, "gate_init": "random"}, template="alpaca", form="QCM-A",
        paper_options={**ADAPTER_V1, "gate_init": "random"}),
}
SYSTEMS = {                                             # a system → its stages, run one after the other
    "llava": ("llava-1", "llava-2"), "llava-1.5": ("llava-1.5-1", "llava-1.5-2"),
    "blip2": ("blip2-1", "blip2-2"), "adapter": ("adapter-1", "adapter-2"),
    "dalle": ("vq", "dalle-2"), "chameleon": ("vq", "chameleon-2"), "flava": ("vq", "flava-2"),
    "told": ("told-1", "told-2"), "told-flamingo": ("told-1", "told-2-flamingo"),
}


def print_recipes(recipes: dict[str, Recipe], systems: dict[str, tuple[str, ...]]) -> None:
    """A table on standard output: of each recipe the paper's numbers and ours, of each system its stages."""
    for name, r in recipes.items():
        facts = [f"bridge {r.bridge}", f"learns: {' + '.join(r.trained)}"]
        facts += [f"after {r.start}"] if r.start else []
        print(f"{name}   ({'; '.join(facts)})" if r.bridge else name)
        for column, numbers, data in (("paper", r.paper, r.data), ("toy  ", r.toy, r.toy_data)):
            print(f"    {column}  {describe_numbers(numbers) if numbers else 'no numbers,'} on {data}")
        said = {"toy": r.options, "paper": r.paper_options}
        print(f"    {r.summary}" + "".join(f"; {scale} options: {', '.join(f'{k}={v}' for k, v in o.items())}"
                                           for scale, o in said.items() if o))
    for name, stages in systems.items():
        print(f"{name}\n    {', then '.join(stages)}")


def describe_numbers(n: Numbers) -> str:
    muon = f"Muon {n.muon_lr:g}, " if n.optimizer == "muon" else ""
    warmup = f"{n.warmup:,.0f} warm-up steps" if n.warmup >= 1 else f"{100 * n.warmup:g} % warm-up"
    kind = f"cosine to {100 * n.floor:g} %" if n.schedule == "cosine" else n.schedule
    batch = n.batch or "? (not in our sources)"
    return (f"{muon}AdamW {n.lr:g} (0.9, {n.beta2:g}), wd {n.weight_decay:g}, {kind}, {warmup}, "
            f"clip {n.clip or 'none'}, batch {batch}, {n.steps:,} steps")
