"""lab/claims_list.py: the claims and the arms of their experiments, as data."""
from __future__ import annotations

from dataclasses import dataclass

# An arm is a run of train.py, shared by all claims that need it: what differs from COMMON, and what is measured of it. "{mlp}" in its
# flags is the run folder of that arm with the same seed, which is trained first. Every arm sees 32 pictures a step on one core.

COMMON = "--steps 300 --batch 32 --threads 1 --log-every 25 --eval-items 1 --samples 1"
REASONS = "--recipe llava-2 --init {llava-1} --captions 0 --turns 2"
ARMS = {
    "linear": ("--bridge linear", "answers"),
    "mlp": ("--bridge mlp", "answers"),
    "transformer": ("--bridge mapl", "answers"),
    "zero-init": ("--bridge zero_init", "answers loss gates"),
    "random-init": ("--bridge zero_init --option gate_init=random", "answers loss gates"),
    "15 epochs": ("--bridge zero_init --examples 256 --steps 120", "answers loss"),
    "30 epochs": ("--bridge zero_init --examples 256 --steps 240", "answers loss"),
    "60 epochs": ("--bridge zero_init --examples 256 --steps 480", "answers loss"),
    "llava-1": ("--recipe llava-1", ""),
    "stages 1, 2": ("--recipe llava-2 --init {llava-1}", "answers loss"),
    "llava-1-last": ("--recipe llava-1 --option reads=-1", ""),
    "stages 1, 2, last layer": ("--recipe llava-2 --init {llava-1-last} --option reads=-1", "answers"),
    "stage 2 alone": ("--recipe llava-2 --init none", "answers loss"),
    "reasoning first, early": (f"{REASONS} --data shapes-reasons --steps 100", "reasons"),
    "answer first, early": (f"{REASONS} --data shapes-answers --steps 100", "reasons"),
    "reasoning first": (f"{REASONS} --data shapes-reasons", "reasons"),
    "answer first": (f"{REASONS} --data shapes-answers", "reasons"),
    "MAPL": ("--bridge mapl --captions 1", "answers captions blind shots"),
    "MAPL, 1 %": ("--bridge mapl --captions 1 --examples 96", "answers captions"),
    "Frozen": ("--bridge frozen --vit random --captions 1", "answers captions"),
    "Frozen, 1 %": ("--bridge frozen --vit random --captions 1 --examples 96", "answers captions"),
    "MAPL, pages": ("--bridge mapl --data shapes-pages --batch 16", "shots"),
    "MAPL, alt-texts": ("--bridge mapl --captions 1 --data shapes-web", "answers captions"),
    "prefix 1": ("--bridge mapl --captions 1 --option constants=1", "answers captions"),
    "prefix 4": ("--bridge mapl --captions 1 --option constants=4", "answers captions"),
    "blip2-1": ("--recipe blip2-1", ""),
    "BLIP-2, both stages": ("--recipe blip2-2 --init {blip2-1}", "answers"),
    "16 queries": ("--recipe blip2-2 --init none", "answers"),
    "2 queries": ("--recipe blip2-2 --init none --option queries=2", "answers"),
    "4 queries": ("--recipe blip2-2 --init none --option queries=4", "answers"),
    "sees the last image": ("--bridge flamingo --data shapes-pages --batch 16", "answers pages"),
    "sees all images": ("--bridge flamingo --data shapes-pages --batch 16 --option see_all=true", "answers pages"),
}


@dataclass(frozen=True)
class Claim:
    says: str                       # what the document claims, in one sentence
    source: str                     # where, with the paper's numbers
    expect: tuple[tuple[str, ...], ...]     # (arm[: number], ">" or "≥", arm[: number], the paper's numbers for the two)
    columns: str                    # the numbers to show; the first is the one compared where an expectation names none
    note: str = ""                  # written after looking: what was tried where the effect did not appear


BY_KIND = "mean color count existence position"
CLAIMS = {
    "zero-init": Claim(
        "Attention whose gates start at zero ends far better than with random gates.", "document 0, LLaMA-Adapter on ScienceQA",
        (("zero-init", ">", "random-init", "83.85, 40.77"),
         ("random-init: first loss", ">", "zero-init: first loss", "early training is disturbed"),
         ("random-init: loss", ">", "zero-init: loss", "its curve is higher")), f"{BY_KIND} first_loss loss",
        "Random gates, N(0, 1), are our reading of an ablation that the paper does not define. Looked at: the logs. They disturb the first "
        "batch, as the paper says, but recover within 25 steps and then learn faster: an open gate gives its prompts a gradient at once, a "
        "shut one takes about 150 steps to reach half of theirs. Four layers are not deep enough for the disturbance to last."),
    "gates": Claim(
        "The gates grow through training, and more in upper layers.", "document 0, LLaMA-Adapter on Alpaca, a figure without numbers",
        (("zero-init: gate at the end", ">", "zero-init: gate halfway", ""), ("zero-init: upper layers", ">", "zero-init: lower layers", "")),
        "gate_halfway gate_at_the_end lower_layers upper_layers"),
    "epochs": Claim(
        "More epochs on the same pictures hardly overfit: the training loss falls, the accuracy stays.",
        "document 0, LLaMA-Adapter on ScienceQA",
        (("15 epochs: loss", ">", "60 epochs: loss", "0.022, 0.001"), ("60 epochs", "≥", "15 epochs", "83.94, 82.08"),
         ("60 epochs", "≥", "30 epochs", "83.94, 83.85")), f"{BY_KIND} loss"),
    "layer": Claim(
        "Features before the last layer of the ViT serve better than the last.", "document 2, LLaVA on ScienceQA",
        (("stages 1, 2", ">", "stages 1, 2, last layer", "90.92, 89.96"),), BY_KIND),
    "alignment": Claim(
        "Without pre-training for alignment, the fine-tuned system is worse.", "document 2, LLaVA on ScienceQA",
        (("stages 1, 2", ">", "stage 2 alone", "90.92, 85.81"),), f"{BY_KIND} loss"),
    "reasoning": Claim(
        "Reasoning before the answer converges sooner, but ends no higher.", "document 2, LLaVA on ScienceQA",
        (("reasoning first, early", ">", "answer first, early", "89.77 after 6 epochs against 12"),
         ("answer first", "≥", "reasoning first", "89.77, 89.77")), BY_KIND,
        "Reasoning is the caption of the scene. Looked at: what is written. The decoder was taught to answer about a scene at once, so the "
        "answer needs no help; a thing that the caption leaves out or gets wrong spoils it, and some captions never end. Tried before: "
        "ScienceQA's letters (shapes-choices; options in random and in fixed order), where both orders chose by chance after 300 steps."),
    "data": Claim(
        "MAPL beats Frozen and its own blind self, and needs little data.", "document 1, trained on CC-clean, four caption sets together",
        (("MAPL", ">", "Frozen", "CIDEr 44.49, 10.94"), ("MAPL", ">", "MAPL: blind cider", "CIDEr 44.49, 3.69"),
         ("MAPL, 1 %", ">", "Frozen, 1 %", "CIDEr 11.94, 3.71"), ("MAPL", ">", "MAPL, 1 %", "CIDEr 44.49, 11.94"),
         ("MAPL: mean", ">", "Frozen: mean", "0-shot VQA 16.84, 10.23")), f"cider {BY_KIND} blind_cider blind_mean"),
    "domain": Claim(
        "Training on the domain's own captions beats training on alt-texts from the web.", "document 1, MAPL with COCO against CC-clean",
        (("MAPL", ">", "MAPL, alt-texts", "CIDEr on COCO 125.2, 54.3"),
         ("MAPL: mean", ">", "MAPL, alt-texts: mean", "0-shot VQAv2 43.51, 33.54")), f"cider {BY_KIND}"),
    "shots": Claim(
        "Examples in the prompt help: four much, four more little.", "document 1, MAPL, four VQA sets together",
        (("MAPL: 4 shots", ">", "MAPL: 0 shots", "24.18, 16.84"), ("MAPL: 8 shots", "≥", "MAPL: 4 shots", "24.36, 24.18"),
         ("MAPL, pages: 4 shots", ">", "MAPL, pages: 0 shots", "")), "0_shots 1_shots 4_shots 8_shots",
        "The decoder has read one scene per document and never an example; we think that it takes a second picture for more of the first. "
        "Tried: one example, which already ruins the answer, and training on pages of two to four pictures (MAPL, pages)."),
    "stage-1": Claim(
        "Without its first stage, the Q-Former answers much worse.", "document 1, BLIP-2 Figure 5, curves without numbers",
        (("BLIP-2, both stages", ">", "16 queries", ""),), BY_KIND,
        "Looked at: retrieval after stage 1 (seed 0), where one picture in eight finds its caption among 100: 300 steps of 32 pictures align "
        "too little to be a start. Both arms saw the same second stage; the paper's first stage has three times the steps of its second."),
    "queries": Claim(
        "A fixed number of queries, whatever the resolution, may lose information.", "document 0, BLIP-2, a question without numbers",
        (("16 queries", ">", "2 queries", ""), *((f"16 queries: {what}", ">", f"2 queries: {what}", "") for what in
                                                 ("color", "count", "position", "1 thing", "4 things")), ("4 queries", ">", "2 queries", "")),
        f"{BY_KIND} 1_thing 4_things"),
    "mapping": Claim(
        "Other maps than LLaVA's linear one may serve better; with a frozen decoder it must be a transformer.",
        "document 0, a plan without numbers; document 4, ClipCap",
        (("mlp", ">", "linear", ""), ("transformer", ">", "linear", ""), ("transformer", ">", "mlp", "")), BY_KIND,
        "At 300 steps of 32 pictures the mlp is in the middle of its fall, so seeds differ much; at the recipes' own steps (README) it leads."),
    "prefix": Claim(
        "A longer prefix is better.", "document 4, ClipCap, without numbers",
        (("prefix 4", ">", "prefix 1", ""), ("MAPL", ">", "prefix 4", ""), ("MAPL: mean", ">", "prefix 1: mean", "")), f"cider {BY_KIND}",
        "MAPL has 16 tokens. A scene has at most four things, and four tokens hold them."),
    "last-image": Claim(
        "Words that attend to the last image alone do better than words that attend to all images before them.",
        "document 4, Flamingo-3B's ablation", (("sees the last image", ">", "sees all images", "68.4, 60.8"),),
        "3_pictures_before 0_pictures_before",
        "Both are near the commonest answer (32 %): 300 steps of 16 pages teach little of the pictures, so the size of the difference says "
        "little; its direction is the paper's."),
}
