"""papers/recipe.py: what a recipe says, and what every training task shares.

Content  Numbers, Recipe               how a system is trained: data, no code
         Ingredients                   what train.py loads and hands to a task
         Task                          parts, batch, loss, report: what train.py's loop asks of a task
"""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor, nn

from model import Bridge, Decoder, ViT
from papers.unread import UNREAD


# ---- Recipes ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Numbers:
    """How a recipe is optimised: one column for the paper, one for our toy."""
    lr: float                       # peak learning rate
    batch: int | None               # pictures (or texts) per update; None: not in our sources, give --batch
    steps: int
    warmup: float = 0.05            # linear, a share of the steps; from 1 on: so many steps
    schedule: str = "cosine"        # after the warm-up: cosine (to `floor`), constant, linear (to 0)
    weight_decay: float = 0.01      # on matrices only
    beta2: float = 0.98             # AdamW's second β; the first is 0.9
    clip: float = 1.0               # largest gradient norm; 0 = no clipping
    optimizer: str = "adamw"        # adamw, or muon: matrices of Linear layers by Muon, the rest by AdamW
    muon_lr: float = 0.02           # Muon's peak learning rate; lr is AdamW's
    floor: float = 0.02             # where a cosine ends, a share of the peak; a paper that names none: ours


MUON = dict(optimizer="muon")


@dataclass(frozen=True)
class Recipe:
    """What a system trains, through what, on what: the paper's numbers and our toy's side by side."""
    summary: str                    # the paper, what is trained, by which loss
    data: str                       # the paper's data
    paper: Numbers | None           # None: no training of the paper's own
    toy: Numbers
    bridge: str = ""                # "": a recipe without a bridge
    trained: tuple[str, ...] = ("bridge",)              # the parts that learn; the others are frozen
    one_file: bool = False          # its run is one file of all that learned, without a folder for a part
    task: str = "answer"            # the loss: a key of train.py's TASKS
    options: dict = field(default_factory=dict)         # of the bridge, in toy sizes
    # of the bridge in the paper, where its defaults are published code's or the recipe is an ablation
    paper_options: dict = field(default_factory=dict)
    captions: float = 0.2           # share of documents that ask for a caption instead of answers
    turns: int = 5                  # questions per picture in the others
    template: str = ""              # a key of support.formats.chat.TEMPLATES; "" = as the model knows it
    form: str = "QCM-LEA"           # order of a multiple choice's parts: reasoning, then the answer
    toy_data: str = "shapes"
    start: str = ""                 # the recipe whose run it starts from

    @property
    def unread(self) -> set[str]:
        """The settings that its task does not read; what learns is neither kept nor stored frozen."""
        learn = {*self.trained}
        return (UNREAD[self.task] | ({"cache"} if "vit" in learn else set())
                | ({"frozen"} if learn >= {"decoder", "vit"} else set()))

    def numbers(self, scale: str) -> Numbers:
        return self.paper if scale == "paper" and self.paper else self.toy


# ---- Tasks -----------------------------------------------------------------------------------------------

@dataclass
class Ingredients:
    """What train.py loads and hands to a task: values, modules and functions. A task opens no file itself.

    A task takes what it needs. What its recipe does not use stays None.
    """
    device: torch.device
    seed: int
    batch: int                      # items per update, of all processes together
    steps: int                      # updates of the run
    world: Any                      # the data set: item(i)
    accumulate: int = 1             # pieces per batch
    examples: int = 0               # if not 0: only the first so many items, over and over
    eval_items: int = 400           # held-out items in the final report
    tokenizer: Any = None
    processor: Any = None           # how the ViT's family prepares a picture (data.Processor)
    vit: ViT | None = None
    decoder: Decoder | None = None
    bridge: Bridge | None = None
    images: Any = None              # a trained tokenizer of pictures: VQ or DVAE
    clip: Any = None                # both towers (clip), their tokenizer, and begin: ids ahead of a text
    generate_texts: Callable | None = None              # eval.generate_texts
    contrastive_pair: Callable | None = None            # (world, i) → picture, true text, false texts
    named_pictures: Callable | None = None              # (world) → known and held-out pictures, their names
    things_with_names: Callable | None = None           # (world, name fits?, whole?, how many) → what to draw
    preference_pair: Callable | None = None             # (world, i) → Item, captions: a true and a false one
    save_grid: Callable | None = None                   # (file, pictures, columns): writes them as one
    open_held_out: Callable[[], Any] | None = None      # opens the split that a report is about
    take_items: Callable | None = None                  # (world, count) → its first readable items
    trained: list | None = None     # the data sets that the parts have met, `world` first
    name_split: Callable[[Any], str] = lambda world: "held-out"     # or trained-on, if the run has met it
    worlds: list = field(default_factory=list)          # all data sets; one * 3 thrice; none: `world` alone
    part: tuple[int, int] = (0, 1)  # of a batch, which this process reads: its number, how many there are
    track: Callable = lambda work, what: work           # (work, "pictures") → work; says how far it has come
    gather: Callable[[Tensor], Tensor] = lambda x: x    # rows (b, …) of all parts → (B, …), with gradients
    begin: Callable[[nn.Module], None] = lambda module: None        # what is new begins as the run of --init
    save: Callable[[Task, Path, dict], None] | None = None      # writes what was trained, and config.json

    def __post_init__(self):
        self.worlds = self.worlds or [self.world]

    def indices(self, step: int, sets: int = 1) -> list[int]:
        """The numbers of the items of this step that this process reads, of one of so many data sets."""
        number, parts = self.part
        batch = self.batch // sets
        first, count = step * batch, batch // parts
        items = range(first + number * count, first + (number + 1) * count)
        return [i % self.examples if self.examples else i for i in items]


class Task:
    """What tasks share: `module` holds the parts, `batch` and `loss` define a step, `report` ends the run.

    A batch is a list of pieces (dicts). Every piece holds its tensors (what `loss` takes as keywords) and
    set: the number of its data set; weight: λ of that data set; count: what its summed loss is divided by.
    """
    splits = False                  # whether several processes may read a batch in parts
    mixed = False                   # whether evaluation runs under autocast (frozen parts in bfloat16)
    expect = ""                     # the loss of a uniform guess, in words
    visual_tokens = 1               # K, the positions of the decoder that an image takes
    last: dict[str, Tensor] = {}    # the losses, by name, of which the last loss was the sum
    module: nn.Module
    given: Ingredients

    def freeze(self, trained: tuple[str, ...], stored: torch.dtype) -> None:
        """Parts that learn stay float32; the others are frozen and stored in the dtype asked for."""
        for name, part in self.module.named_children():
            part.requires_grad_(name in trained)
            if name not in trained and stored != torch.float32:
                part.to(stored)
                self.mixed = True

    def batch(self, step: int) -> list[dict]:
        """The pieces of a step on the CPU, a function of the step alone."""
        raise NotImplementedError

    def to_device(self, pieces: list[dict]) -> list[dict]:
        move = dict(device=self.given.device, non_blocking=True)
        return [{k: v.to(**move) if isinstance(v, Tensor) else v for k, v in p.items()} for p in pieces]

    def loss(self, **piece) -> Tensor:
        """The summed loss of a piece; the loop divides it by the count of the whole update."""
        raise NotImplementedError

    def describe_batch(self, step: int) -> str:
        first = step * self.given.batch
        return f"items {first} to {first + self.given.batch - 1}"

    def first_step(self, pieces: list[dict], scales: list[float], out: Path, loss: float) -> None:
        """What is worth a look after the first backward pass."""

    def after_step(self) -> None:
        """What follows an optimiser step: a clamp, say."""

    def memory(self) -> dict[str, Tensor]:
        """What a step changes beside what learns, a queue say: it is saved for --resume."""
        return {}

    def flops_per_position(self) -> float:
        """Floating-point operations of a training step per position of the decoder; 0: not counted."""
        return 0.0

    def metrics(self) -> dict[str, float]:
        """The task's own numbers in a line of the log: of the last losses the average over the parts."""
        gather = self.given.gather
        return {name: gather(loss.detach()[None]).mean().item() for name, loss in self.last.items()}

    def log_details(self) -> dict:
        """What log.jsonl holds beside the numbers of its line."""
        return {}

    def save(self, out: Path, facts: dict) -> None:
        self.given.save(self, out, facts)

    def check(self) -> dict[str, float]:
        """A short evaluation during training: scores by name."""
        return {}

    def report(self, out: Path) -> dict[str, dict]:
        """Print the final evaluation; returns the JSON files to write into the run folder, by their names."""
        return {}
