"""DPO (2305.18290v3): a model learns to prefer one answer to another, without a reward model and without RL.

Document 3 names it under "alignment tuning", beside RLHF (papers/ppo.py), without an equation. RLHF fits a
reward to preferences and then climbs it under a KL penalty; DPO puts the optimum of the second step into the
loss of the first, so that the model is its own reward model.

    symbol     shape   here             meaning
    y_w, y_l           chosen, rejected two answers to one prompt x (a picture and its question)
    log π      (2, B)  policy           log-probabilities of the answers, first the chosen, then the rejected
    log π_ref  (2, B)  reference        the same under the start of the training, which stays frozen
    β          ()      beta             how far the model may move: small is far
    h          (B,)    h                how much more than the reference the model prefers y_w

    (D1)  log π(y | x) = Σ_t log p(y_t | x, y_<t)               a SUM over the answer's tokens, no mean
    (D2)  h = (log π(y_w) − log π_ref(y_w)) − (log π(y_l) − log π_ref(y_l))
    (D3)  L = −log σ(βh)                                        the paper's Eq. 7
    (D4)  L = −(1 − ε) log σ(βh) − ε log σ(−βh)                 cDPO: a share ε of the labels is wrong
    (D5)  L = (h − 1/(2β))²                                     IPO: no reward for an ever larger h
    (D6)  r(y) = β (log π(y) − log π_ref(y))                    the implicit reward; r_w − r_l is the margin

∂L/∂ log π(y_w) = −β σ(−βh): a pair that is already told apart teaches nothing. Prompt, picture and padding
carry no loss. (D1) makes a long answer's h large; another library divides by the length for (D5) alone, and
its IPO differs from the authors'. Nothing in (D3) holds log π(y_w) up: both may fall, the rejected faster.
Paper and code: RMSprop at 1e-6 in the paper, 5e-7 in the code's defaults.

The miniature: a captioner names things that are not there. Pairs are a true caption, and the same with
another thing in the place of one, or with one more thing (`support/worlds/pairs.py`). False and missed things
per caption, after DPO and after supervised fine-tuning (SFT) on the chosen captions, from one start. Any run
of any bridge can be the start:

    python train.py --recipe dpo                        from out/mlp-shapes; --recipe dpo-sft to compare
    python train.py --recipe dpo --bridge mapl          from out/mapl-shapes, or from --init RUN

Of LLaVA-RLHF (2309.14525v1), which aims at the same by PPO, our sources have the share of answers with
hallucination .84 before, .55 after more supervised fine-tuning, .57 after RLHF behind that, and POPE's F1
82.7 → 81.5: the gain is the fine-tuning's, and not uniform.
"""
from __future__ import annotations

import collections
import copy
import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data import CAPTION, COLORS, SHAPES, Document, Item, collate, training_document
from model import IGNORE, VLM
from papers.recipe import Numbers, Recipe, Task

PAIR = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b")


def answer_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, T, V), (B, T) with IGNORE where nothing is answered → (B,). The logits at t are about label t+1."""
    target = labels[:, 1:]
    each = -F.cross_entropy(logits[:, :-1].float().mT, target, ignore_index=IGNORE, reduction="none")
    return each.sum(1)                                                          # (D1)


def dpo_loss(policy: Tensor, reference: Tensor, beta: float = 0.1, smoothing: float = 0.0,
             ipo: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probabilities (2, B), chosen then rejected → the loss of each pair (B,), the rewards (2, B)."""
    ratio = policy - reference                                                  # (2, B)
    h = ratio[0] - ratio[1]                                                     # (D2)
    rewards = beta * ratio.detach()                                             # (D6)
    if ipo:
        return (h - 1 / (2 * beta)).square(), rewards                           # (D5)
    loss = -(1 - smoothing) * F.logsigmoid(beta * h) - smoothing * F.logsigmoid(-beta * h)
    return loss, rewards                                                        # (D3)  (D4)


def predict(vlm: VLM, tokens: Tensor, labels: Tensor, mask: Tensor | None,
            features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, T', V) and labels (B, T') over the expanded sequence."""
    inputs, labels = vlm.prepare(tokens, features, mask, labels)
    return vlm.decoder(**inputs), labels


def count_false_things(captions: list[str], truths: list[str]) -> dict[str, float]:
    """Per caption: things that are named and not there (false), there and not named (missed), and named.

    A thing is a colour and a shape; truths say what is there. Two that are alike count twice.
    """
    total = collections.Counter()
    for caption, truth in zip(captions, truths):
        said, there = (collections.Counter(PAIR.findall(text)) for text in (caption, truth))
        total.update(false=(said - there).total(), missed=(there - said).total(), named=said.total())
    return {name: n / len(captions) for name, n in total.items()}


class DpoTask(Task):
    """What DPO changes of train.py's answer task, in front of which this class stands: pairs, and the loss.

    Takes preference_pair. The reference is the start: the bridge as it is before the first step.
    """
    beta = 0.1

    def __init__(self, given, *others):
        super().__init__(given, *others)
        vlm = self.module
        start = copy.deepcopy(vlm.bridge).requires_grad_(False).eval()
        self.reference = VLM(vlm.vit, start, vlm.decoder, vlm.image_token)      # π_ref
        self.expect = "(ln 2 = 0.69: the model is its own reference)"

    def example(self, world, index: int) -> tuple[Document, Item]:
        item = self.given.preference_pair(world, index)                         # captions: chosen, rejected
        return self.caption_document(item), item

    def caption_document(self, item: Item) -> Document:
        return training_document(item, self.tokenizer, caption=True)

    def piece(self, pairs: list[tuple[Document, Item]], m: int, weight: float) -> dict:
        """Tokens (2B, T): B chosen captions, then the B rejected ones of the same pictures."""
        rejected = [replace(item, captions=item.captions[1:]) for _, item in pairs]
        both = pairs + [(self.caption_document(item), item) for item in rejected]
        return super().piece(both, m, weight) | {"count": len(pairs)}

    def loss(self, tokens: Tensor, labels: Tensor, mask: Tensor | None, features: Tensor, **_) -> Tensor:
        policy = self.log_probs(self.module, tokens, labels, mask, features)
        with torch.no_grad():
            reference = self.log_probs(self.reference, tokens, labels, mask, features)
        losses, (chosen, rejected) = dpo_loss(policy, reference, self.beta)
        self.last = {"margin": (chosen - rejected).mean(), "right": (chosen > rejected).float().mean()}
        return losses.sum()

    @staticmethod
    def log_probs(vlm: VLM, *batch) -> Tensor:
        return answer_log_probs(*predict(vlm, *batch)).unflatten(0, (2, -1))    # (2, B)

    @torch.no_grad()
    def report(self, out: Path) -> dict[str, dict]:
        """Of held-out pictures: pairs told apart, false things in captions, KL; before and after."""
        files, g = super().report(out), self.given
        try:
            world = g.open_held_out()
            count = min(g.eval_items, len(world)) if world.finite else g.eval_items
            pairs = [self.example(world, i) for i in range(count)]
        except ValueError:                              # no held-out pictures, and that was said
            return files
        batch = self.to_device([self.piece(pairs, 0, 1.0)])[0]
        scores, arguments = {}, [batch[key] for key in ("tokens", "labels", "mask", "features")]
        for name, vlm in (("before", self.reference), ("after", self.module)):
            chosen, rejected = self.log_probs(vlm, *arguments)
            prompts = [Document(self.tokenizer).image().add(CAPTION) for _ in pairs]
            features = batch["features"][:len(pairs)]
            captions = g.generate_texts(vlm, prompts, self.tokenizer, 64, features=features)
            scores[name] = {"told apart": (chosen > rejected).float().mean().item(),
                            **count_false_things(captions, [item.captions[0] for _, item in pairs])}
        scores["after"]["KL"] = self.divergence(captions, features)
        for name, of in scores.items():
            print(f"{name:8} true captions likelier than false {100 * of['told apart']:.1f} % (chance 50); "
                  f"{of['false']:.3f} false things per caption, {of['missed']:.3f} missed")
        print(f"moved    KL from the start {scores['after']['KL']:.3f} nats per caption that it writes")
        return files | {"preferences.json": scores}

    def divergence(self, captions: list[str], features: Tensor) -> float:
        """Σ_t KL(p_t ‖ p_ref,t) along the captions that the model wrote, mean over captions."""
        documents = [Document(self.tokenizer).image().turn(CAPTION, text) for text in captions]
        tokens, labels, mask = (x.to(features.device) for x in collate(documents))
        (p, labels), (q, _) = (predict(vlm, tokens, labels, mask, features)
                               for vlm in (self.module, self.reference))
        p, q = p[:, :-1].float().log_softmax(-1), q[:, :-1].float().log_softmax(-1)
        each = (p.exp() * (p - q)).sum(-1)                                      # (B, T' − 1)
        return (each * (labels[:, 1:] != IGNORE)).sum().item() / len(captions)


class SftTask(DpoTask):
    """The comparison: −log π of the chosen captions, from the same start on the same pictures."""

    def loss(self, tokens: Tensor, labels: Tensor, mask: Tensor | None, features: Tensor, **_) -> Tensor:
        self.last, n = {}, len(tokens) // 2
        mask = None if mask is None else mask[:n]
        return -answer_log_probs(*predict(self.module, tokens[:n], labels[:n], mask, features[:n])).sum()


BETAS = {"dpo": 0.1, "dpo-far": 0.03, "dpo-near": 0.5}
TASKS = {**{name: type(name, (DpoTask,), {"beta": beta}) for name, beta in BETAS.items()}, "dpo-sft": SftTask}
PAPER = Numbers(1e-6, 64, 2500, 150, "constant", 0.0, 0.99, 0)
RECIPES = {
    name: Recipe(summary, "pairs of Anthropic HH, TL;DR, IMDb; RMSprop", PAPER, Numbers(1e-3, 32, 200), "mlp",
                 task=name, options=dict(reads=-2), captions=1.0, start="mlp")
    for name, summary in (
        ("dpo", "DPO (2305.18290v3): the bridge learns to prefer true captions to false ones, β 0.1"),
        ("dpo-far", "DPO with β 0.03: it may move further from its start"),
        ("dpo-near", "DPO with β 0.5: it stays near its start"),
        ("dpo-sft", "DPO's comparison: the bridge learns the chosen captions alone"))}
