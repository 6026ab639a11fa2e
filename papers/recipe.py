"""papers/recipe.py: what a recipe says, and what every training task shares."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor


# The recipes

@dataclass(frozen=True)
class Numbers:
    """How a recipe is optimised: one column of the table for the paper, one for our toy."""
    lr: float                       # peak learning rate
    batch: int | None               # pictures (or texts) per update; None: not in our sources, give --batch
    steps: int
    warmup: float = 0.05            # linear, a share of the steps; from 1 on: so many steps
    schedule: str = "cosine"        # after the warm-up: cosine (to 2 % of the peak) | constant | linear (to 0)
    weight_decay: float = 0.01      # on matrices only
    beta2: float = 0.98             # AdamW's second β; the first is 0.9
    clip: float = 1.0               # largest gradient norm; 0 = no clipping
    optimizer: str = "adamw"        # adamw | muon (matrices of Linear layers by Muon at muon_lr, the rest by AdamW)
    muon_lr: float = 0.02


@dataclass(frozen=True)
class Recipe:
    """What a system trains, through what, on what: the paper's numbers and our toy's side by side."""
    says: str                                           # paper, what is trained and by which loss
    data: str                                           # the paper's data; a toy has `shapes`
    paper: Numbers
    toy: Numbers
    bridge: str = ""                                    # its bridge, where it has one
    trained: tuple[str, ...] = ("bridge",)              # the parts that learn; the others are frozen
    task: str = "answer"                                # the loss: answer | stage1 | lm | clip
    options: dict = field(default_factory=dict)         # keyword arguments of the bridge, toy sizes; the papers' are its defaults
    captions: float = 0.2                               # share of documents that ask for a caption instead of answers
    template: str = ""                                  # how a conversation is written, a key of data.TEMPLATES; "" = as the model knows it
    form: str = "QCM-LEA"                               # of a multiple choice: reasoning, then the answer (data.scienceqa_text)
    toy_data: str = "shapes"
    start: str = ""                                     # the recipe whose run it starts from


# Tasks: what a batch is, what its loss is, what to write and to report

class Task:
    """What tasks share. A task reads a batch on the CPU (`read`), makes it `ready` on the device, and returns a piece's summed `loss`."""
    mixed = False                                       # whether the final report runs under autocast (frozen parts in bfloat16)

    def freeze(self, learning: tuple[str, ...], stored: torch.dtype) -> None:
        """Parts that learn stay float32; the others are frozen and stored as asked."""
        for name, part in self.module.named_children():
            part.requires_grad_(name in learning)
            if name not in learning and stored != torch.float32:
                part.to(stored)
                self.mixed = True

    def describe(self, step: int) -> str:
        return f"items {step * self.s.batch} to {(step + 1) * self.s.batch - 1} of {self.s.data}"

    def ready(self, pieces: list[dict]) -> list[dict]:
        return [{k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in p.items()} for p in pieces]

    def doctor(self, pieces: list[dict], scales: list[float], out: Path) -> None:
        pass

    def after_step(self) -> None:
        pass

    def work(self) -> float:
        """Floating-point operations of a training step per position of the decoder, see `operations`; 0: not counted."""
        return 0.0

    def vitals(self) -> dict:
        return {}

    def details(self) -> dict:
        return {}
