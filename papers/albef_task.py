"""The training of ALBEF (albef.py): pairs that are aligned, then fused.

Run      python train.py --recipe albef
"""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model import IGNORE
from papers.albef import Albef, Towers
from papers.contrasts import recall_at_1
from papers.masked import SPECIAL, PairsTask
from papers.recipe import Ingredients


class AlignTask(PairsTask):
    """Pairs whose vectors are aligned, too. A paper's task also defines `embed`.

    What is drawn for a row (caption, masked words) depends on its item alone, so that several processes read
    what one would read.
    """
    splits = True

    def batch(self, step: int) -> list[dict]:
        g, fill = self.given, dict(tokens=self.sep, mask=False, masked=self.sep, labels=IGNORE)
        rows = [self.row(i, (g.seed, 1, step, i)) for i in g.indices(step)]
        piece = {key: torch.cat([row[key] for row in rows]) for key in rows[0] if key not in ("other", *fill)}
        for key, value in fill.items():
            piece[key] = nn.utils.rnn.pad_sequence([row[key][0] for row in rows], batch_first=True,
                                                   padding_value=value)
        return [piece | dict(set=0, weight=1.0, count=1)]

    def row(self, i: int, seed: tuple[int, ...]) -> dict:
        return self.piece([self.world.item(i)], seed)

    def embed(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, E) of pictures and of texts, of length 1."""
        raise NotImplementedError

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """And the best of up to 100 held-out captions and pictures, by their vectors; equal texts are one."""
        g = self.given
        items = [item for item in g.take_items(g.open_held_out(), 100) if item.captions]
        piece, = self.to_device([self.piece(items, (g.seed, 2), paired=False)])
        f, g = self.embed(piece["pixels"], piece["tokens"], piece["mask"])
        same = (piece["tokens"][:, None] == piece["tokens"]).all(-1)
        return super().check() | recall_at_1(f @ g.T, same)


class AlbefTask(AlignTask):
    """Recipe `albef`: (A3) + (A4) + (A6). The ViT is the one that was given, and learns, too.

    Recipe `albef-fused` does not align first, `albef-easy` asks about the next row's picture and text in the
    place of hard ones, `albef-untaught` has no teacher: the paper's ablations.
    """
    losses, hard, most = ("itc", "itm", "mlm"), True, 0.4                       # most: the last α
    width, momentum = 128, 0.9      # the paper's 0.995 remembers 200 steps of 826,000; these are 500

    def __init__(self, given: Ingredients, queue: int = 512):
        super().__init__(given)
        V = self.words + SPECIAL
        towers = Towers(given.vit, V, width=self.width, layers=4, heads=4, hidden=512, positions=self.context,
                        joint=64, std=self.width**-0.5)                         # see init_bert
        self.module = Albef(towers, queue, self.momentum).to(given.device)
        given.begin(self.module)
        self.module.teacher.load_state_dict(towers.state_dict())
        guess = math.log(given.batch + queue) + math.log(2) + math.log(V)
        self.expect = f"(uniform guesses: ITC ln {given.batch + queue} + ITM ln 2 + MLM ln {V} = {guess:.2f})"

    def freeze(self, trained: tuple[str, ...], stored: torch.dtype) -> None:
        """The teacher stays float32: in bfloat16 the small steps of (A7) would be rounded off."""
        super().freeze(trained, torch.float32)

    def batch(self, step: int) -> list[dict]:
        """alpha rises in the first of 30 epochs, a thirtieth of the run."""
        alpha = self.most * min(1.0, 30 * step / self.given.steps)
        return [piece | {"alpha": alpha} for piece in super().batch(step)]

    def loss(self, pixels: Tensor, tokens: Tensor, mask: Tensor, masked: Tensor, labels: Tensor,
             alpha: float, **_) -> Tensor:
        g, next_rows = self.given, torch.arange(self.given.batch).roll(-1).to(self.given.device)
        found = self.module.losses(pixels, tokens, mask, masked, labels, alpha,
                                   None if self.hard else (next_rows, next_rows), g.gather, g.part[0])
        self.last = {name: found[name] for name in self.losses}
        return sum(self.last.values())

    @torch.no_grad()
    def after_step(self) -> None:
        self.module.temperature.clamp_(0.001, 0.5)
        self.module.enqueue(*self.module.entering)                              # (A8)
        self.module.update_teacher()                                            # (A7), ahead of the next step

    def memory(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.module.state_dict().items()
                if name.startswith("teacher.") or "queue" in name or name == "place"}

    def word_logits(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.module.towers.word_logits(self.module.towers.picture(pixels), tokens, mask)

    def match_scores(self, piece: dict) -> Tensor:
        towers, mask = self.module.towers, piece["mask"]
        picture = towers.picture(piece["pixels"][piece["other"]])
        no, yes = self.module.match_logits(towers.text(piece["tokens"], mask), picture, mask).T
        return yes - no

    def embed(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.module.towers.embed(self.module.towers.picture(pixels),
                                        self.module.towers.text(tokens, mask))


CHANGES = {"albef": {}, "albef-fused": {"losses": ("itm", "mlm"), "hard": False, "splits": False},
           "albef-easy": {"hard": False}, "albef-untaught": {"most": 0.0}}
TASKS = {name: type(name, (AlbefTask,), change) for name, change in CHANGES.items()}
