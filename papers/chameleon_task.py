"""Chameleon's task in miniature: scenes of `shapes` are drawn from captions and asked about, by one decoder.

papers/chameleon.py has the model and its loss, papers/vq.py the tokenizer of pictures.
"""
from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

import data
from model import IGNORE, DecoderConfig
from papers.chameleon import Z_WEIGHT, Chameleon, Only, QKLayerNorm, chameleon_loss, z_loss
from papers.recipe import Ingredients, Task
from papers.scene_reader import UNIT, count_by_chance, count_found, draw_scenes, read_scenes


class ChameleonTask(Task):
    """Recipe `chameleon-2`. Takes tokenizer, images (a trained tokenizer of pictures), generate_texts, batch.

    ids: the words of the tokenizer, <boi>, <eoi>, then the codes.
    """
    drawn, norm_behind, qk_norm, z_weight = 24, False, QKLayerNorm, Z_WEIGHT

    def __init__(self, given: Ingredients):
        self.given, self.world, self.words, self.images = given, given.world, given.tokenizer, given.images
        V, K = self.words.vocab_size, len(self.images.codes)
        self.boi, self.eoi, self.first = V, V + 1, V + 2
        self.module = Chameleon(DecoderConfig(V + 2 + K, qk_norm=self.qk_norm), self.norm_behind)
        self.module.init_weights().to(given.device)
        self.expect = f"(a uniform guess over the vocabulary: ln {V + 2 + K} = {math.log(V + 2 + K):.2f})"

    @torch.no_grad()
    def picture(self, pixels: Tensor) -> list[list[int]]:
        """(B, 3, S, S) → <boi>, codes, <eoi> of each."""
        codes = self.images.encode(pixels.to(next(self.images.parameters()))) + self.first
        return [[self.boi, *ids, self.eoi] for ids in codes.tolist()]

    def document(self, ids: list[int], item: data.Item, draws: bool) -> data.Document:
        """A caption (its things in any order) and its picture to draw, or a picture and its questions."""
        d = data.Document(self.words)
        if draws:
            return d.add(item.captions[1]).ids(ids[:1]).ids(ids[1:], learn=True).end()
        d.ids(ids)
        for q in item.qas:
            d.turn(data.QUESTION.format(q.question), q.answer)
        return d

    def is_drawn(self, number: int) -> bool:
        """Even items are drawn, odd ones are asked about."""
        return number % 2 == 0

    def batch(self, step: int) -> list[dict]:
        first, n = step * self.given.batch, self.given.examples
        numbers = [i % n if n else i for i in range(first, first + self.given.batch)]
        items = [self.world.item(i, turns=5) for i in numbers]
        pictures = self.picture(data.to_pixels([item.image for item in items], 48, UNIT))
        rows = [self.document(ids, item, self.is_drawn(i)) for i, ids, item in zip(numbers, pictures, items)]
        tokens, labels, mask = data.collate(rows)
        return [dict(tokens=tokens, labels=labels, mask=mask, set=0, weight=1.0,
                     count=int((labels != IGNORE).sum()))]

    def loss(self, tokens: Tensor, labels: Tensor, mask: Tensor, **_) -> Tensor:
        hidden = self.module.states(tokens, mask)[-1][:, :-1]
        keep = labels[:, 1:] != IGNORE
        return chameleon_loss(self.module.logits(hidden[keep]), labels[:, 1:][keep], self.z_weight)

    @torch.no_grad()
    def draw(self, texts: list[str], temperature: float = 0.0, seed: int = 0) -> Tensor:
        """Pictures (n, 3, 48, 48) in 0 … 1: codes alone, as many as a picture has."""
        generator = torch.Generator(self.given.device).manual_seed(seed)
        N = self.images.encode(torch.zeros(1, 3, 48, 48)).shape[1]
        prompts = [data.Document(self.words).add(text).ids([self.boi]) for text in texts]
        codes = [self.write(prompts[i:i + 50], N, Only(self.first, self.first + len(self.images.codes)),
                            temperature=temperature, generator=generator) for i in range(0, len(prompts), 50)]
        return self.images.decode(torch.cat(codes) - self.first).cpu()

    @torch.no_grad()
    def answer(self, pictures: Tensor, questions: list[str]) -> list[str]:
        """Words alone, about a picture each."""
        prompts = [data.Document(self.words).ids(ids).add(data.QUESTION.format(text))
                   for ids, text in zip(self.picture(pictures), questions)]
        ids = self.write(prompts, 6, Only(0, self.words.vocab_size), stop=self.words.stop)
        return [self.words.answer_text(line).strip() for line in ids.tolist()]

    def write(self, prompts: list[data.Document], longest: int, only: Only, **how) -> Tensor:
        device = self.module.embed.weight.device
        tokens, _, mask = data.collate(prompts, left=True)
        return self.module.generate(tokens.to(device), longest, mask=mask.to(device), bridge=only, **how)

    @torch.no_grad()
    def stability(self) -> dict[str, float]:
        """On the batch that would come next: mean |log Z|, and the largest |q kᵀ| / √E of a layer."""
        scores, (piece,) = [], self.to_device(self.batch(self.given.steps))
        hooks = [layer.attention.attend.register_forward_pre_hook(
            lambda _, args: scores.append((args[0] @ args[1].mT).abs().max() / args[0].shape[-1]**0.5))
            for layer in self.module.layers]
        logits = self.module(piece["tokens"], piece["mask"])[:, :-1][piece["labels"][:, 1:] != IGNORE]
        for hook in hooks:
            hook.remove()
        return {"log Z": z_loss(logits).sqrt().mean().item(), "score": max(scores).item()}

    def report(self, out: Path) -> dict[str, dict]:
        """Held-out captions are drawn and read, held-out pictures asked about. Chance: the next one's."""
        world, n = data.Shapes(self.world.held_out, self.given.seed), min(self.drawn, self.given.eval_items)
        scenes, pixels = draw_scenes(world, 0, n)
        read = read_scenes(self.draw([data.caption_scene(things) for things in scenes]))
        asked = [(i, q) for i in range(n) for q in world.item(i).qas]
        answers = self.answer(pixels[[i for i, _ in asked]], [q.question for _, q in asked])
        shares = {"drawn": count_found(scenes, read), "chance": count_by_chance(scenes, read)}
        right = {"right": sum(a == q.answer for a, (_, q) in zip(answers, asked)) / len(asked),
                 "chance": sum(b.answer == q.answer for (_, q), (_, b) in
                               zip(asked, asked[4:] + asked[:4])) / len(asked)}
        print(f"drawn    from {n} held-out captions; all named pairs of colour and shape are found in "
              + ",  ".join(f"{name}: {100 * s['pictures']:.0f} %" for name, s in shares.items()))
        print(f"answers  to {len(asked)} held-out questions, right: {100 * right['right']:.0f} %,  "
              f"the answer of the next picture: {100 * right['chance']:.0f} %")
        held = self.stability()
        print(f"stable   mean |log Z| {held['log Z']:.3f}, largest score of attention {held['score']:.2f}")
        return {"results.json": {"drawing": shares, "answers": right, "stability": held}}


class ModalityTask(ChameleonTask):
    """Captions that are answered by a picture or by words, as the request says: the paper's fine-tuning (§3).

    Here the decoder learns them from scratch; only the tokenizer of pictures is trained before. Where the
    modalities are unbalanced, the paper says, a model learns a prior of writing the commoner one.
    `pictures`: the share of the requests that ask for one. A quarter of all say "Answer:" for either.
    """
    pictures, wanted, unsaid = 0.5, {True: "\nPicture:", False: "\nWords:"}, "\nAnswer:"

    def is_drawn(self, number: int) -> bool:
        return (number * 0.6180339887) % 1 < self.pictures                      # spread evenly

    def document(self, ids: list[int], item: data.Item, draws: bool) -> data.Document:
        """The caption, what is wanted of it, then its picture, or its words in another order."""
        said = self.wanted[draws] if int(item.id.rpartition("-")[2]) % 4 else self.unsaid
        d = data.Document(self.words).add(item.captions[0] + said)
        return d.ids(ids, learn=True).end() if draws else d.add(" " + item.captions[1], learn=True).end()

    @torch.no_grad()
    def report(self, out: Path) -> dict[str, dict]:
        """Mean P(<boi>), the first token of a picture, behind held-out captions and each request, or none."""
        world, found = data.Shapes(self.world.held_out, self.given.seed), {}
        captions = [world.item(i).captions[0] for i in range(self.given.eval_items)]
        asks = {"asked for a picture": self.wanted[True], "asked for words": self.wanted[False],
                "not said": self.unsaid}
        for name, request in asks.items():
            prompts = [data.Document(self.words).add(caption + request) for caption in captions]
            tokens, _, mask = data.collate(prompts, left=True)
            logits = self.module(tokens.to(self.given.device), mask.to(self.given.device))[:, -1]
            found[name] = logits.float().softmax(-1)[:, self.boi].mean().item()
        print("mean probability that a picture follows: "
              + ",  ".join(f"{name} {100 * p:.1f} %" for name, p in found.items()))
        return {"results.json": found}


CHANGES = {"chameleon": {}, "chameleon-no-qk": {"qk_norm": torch.nn.Identity},
           "chameleon-no-z": {"z_weight": 0.0}, "chameleon-z": {"z_weight": 1000 * Z_WEIGHT}}
TASKS = {name: type(name, (ChameleonTask,), change) for name, change in CHANGES.items()} | {
    "chameleon-even": ModalityTask,
    "chameleon-words": type("chameleon-words", (ModalityTask,), {"pictures": 0.05})}
