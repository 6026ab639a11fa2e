"""DALL-E (2102.12092v2): text and picture are one stream of tokens; a decoder writes the picture's codes.

Stage 1 makes the codes (papers/dvae.py; the toy takes those of papers/vq.py), stage 2 is here. Document 3
says that the caption is concatenated "with a sample from the dVAE". That holds in training. To draw, nothing
comes from the dVAE's encoder: the decoder samples all codes, the dVAE paints them, and CLIP chooses among
several pictures. Document 4 is right: the picture's tokens see all of the text.

    symbol   shape           here           meaning
    T, N     256, 1024       text, side²    positions of text and codes (toy 36, 144)
    V, K     16384, 8192     pad, codes     sizes of both vocabularies (toy 429, 512)
    w        (B, T) int64    lay_out        the text; an empty position t holds a pad of its own, V + t
    y        (B, N) int64    codes          of the picture, row by row
    r, c     (side, D) × 2   rows, columns  learned, added to the embedding of a code

    (T1)  p(w, y) = Π_t p(w_t | w_<t) Π_n p(y_n | w, y_<n)          words among V + T ids, codes among K
    (T2)  L = (1 · CE(w) + 7 · CE(y)) / 8                           each a mean over its positions
    (T3)  y_n ~ p(· | w, y_<n)^(1/temperature);  the picture: argmax over samples of CLIP(text, picture)
    (T4)  n sees m of the picture: row: side ≥ n − m ≥ 0 in steps of one; column: n ≥ m in steps of side;
          conv: a square behind it. All see all of the text.

The paper has 12 billion parameters in 64 layers; (T4) is sparse: of four layers three by row and one
by column, and by convolution in the last; 10 % BPE dropout; a mean of the iterates is used; CLIP takes the
best of 512. Only the dVAE is published, so the transformer has no reference here. The toy's attention is
dense. It begins as the bundled decoder, with the words of places as rows and columns, and so it reads the
text from the first step on.

The claim in miniature: words become pictures. A reader that knows no words (papers/scene_reader.py) looks for
the named pairs in pictures of held-out captions; chance: in another caption's picture. The best of 8 by CLIP
beats one sample. Paper: preferred over DF-GAN by 90.0 % (realism) and 93.3 % (match with the caption).
"""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from model import Cache, Decoder, DecoderConfig, sample
from papers.recipe import Ingredients, Numbers, Recipe, Task
from papers.scene_reader import count_by_chance, count_found, draw_scenes, read_scenes


def dalle_loss(text: Tensor, image: Tensor) -> Tensor:
    """(T2) of the two mean cross-entropies."""
    return (text + 7 * image) / 8                                               # (T2)


def sparse_mask(kind: str, text: int, side: int, reach: int = 1) -> Tensor:
    """(text + side², text + side²) bool, True = may attend: DALL-E's row | column | conv attention."""
    n = torch.arange(side**2)
    back = n[:, None] - n                                                       # (N, N) how far behind
    if kind == "row":
        near = back <= side
    elif kind == "column":
        near = back % side == 0
    else:
        up, left = (n[:, None] // side - n // side), (n[:, None] % side - n % side).abs()
        near = (up <= reach) & (left <= reach)
    visible = torch.ones(text + side**2, text + side**2, dtype=torch.bool).tril()
    visible[text:, text:] &= near                                               # (T4)
    return visible


class Dalle(nn.Module):
    """One decoder over [begin, words or pads (T), codes (N)]; ids: words, then T pads, then K codes."""

    def __init__(self, config: DecoderConfig, text: int, codes: int, side: int):
        super().__init__()
        self.text, self.side, self.pad, self.first = text, side, config.vocab_size, config.vocab_size + text
        self.decoder = Decoder(replace(config, vocab_size=self.first + codes)).init_weights()
        self.rows, self.columns = (nn.Parameter(0.02 * torch.randn(side, config.width)) for _ in range(2))

    @torch.no_grad()
    def start_from(self, decoder: Decoder, rows: list[int], columns: list[int]) -> None:
        """Take over a decoder of text; rows, columns: ids of the words that the grid's begin as."""
        for name, p in decoder.named_parameters():
            mine = self.decoder.get_parameter(name)
            mine[:len(p)] = p                                                   # new ids keep their new rows
        for mine, ids in ((self.rows, rows), (self.columns, columns)):
            mine.copy_(decoder.embed.weight[ids].repeat_interleave(self.side // len(ids), 0))

    def lay_out(self, texts: list[list[int]], begin: int) -> Tensor:
        """Ids of texts → (B, 1 + T): every position without a word has its own pad."""
        tokens = torch.arange(self.pad - 1, self.pad + self.text).repeat(len(texts), 1)
        tokens[:, 0] = begin
        for row, ids in zip(tokens, texts):
            if len(ids) > self.text:
                raise ValueError(f"a text has {len(ids)} tokens, this DALL-E reads {self.text}; cut it.")
            row[1:1 + len(ids)] = torch.tensor(ids)
        return tokens

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Tokens that stand from position `start` on."""
        places = (self.rows[:, None] + self.columns).flatten(0, 1)              # (N, D)
        where = torch.arange(start, start + tokens.shape[1], device=tokens.device) - 1 - self.text
        return self.decoder.embed(tokens) + torch.where(where[:, None] < 0, 0, places[where.clamp(min=0)])

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[begin, w, y] (B, 1 + T + N) → logits of w (B, T, V + T) and of y (B, N, K)."""
        h = self.decoder.states(embeds=self.embed(tokens[:, :-1]))[-1]
        E = (self.decoder.lm_head or self.decoder.embed).weight
        return h[:, :self.text] @ E[:self.first].T, h[:, self.text:] @ E[self.first:].T         # (T1)

    def loss(self, tokens: Tensor) -> Tensor:
        words, codes = self(tokens)
        text = F.cross_entropy(words.flatten(0, 1).float(), tokens[:, 1:1 + self.text].flatten())
        y = tokens[:, 1 + self.text:] - self.first
        return dalle_loss(text, F.cross_entropy(codes.flatten(0, 1).float(), y.flatten()))

    @torch.no_grad()
    def draw(self, tokens: Tensor, temperature: float = 1.0, top_k: int = 0,
             generator: torch.Generator | None = None) -> Tensor:
        """[begin, w] (B, 1 + T) → codes (B, N)."""
        E, ids, N = (self.decoder.lm_head or self.decoder.embed).weight, [], self.side**2
        cache = Cache(self.decoder.config, len(tokens), tokens.shape[1] + N, E.device, E.dtype)
        x = self.embed(tokens)
        for n in range(N):
            h = self.decoder.states(embeds=x, cache=cache)[-1][:, -1]
            ids.append(sample(h @ E[self.first:].T, temperature, top_k, 1.0, generator))        # (T3)
            x = self.embed(self.first + ids[-1][:, None], 1 + self.text + n)
        return torch.stack(ids, 1)


def choose_by_clip(clip, texts: list[str], samples: tuple[Tensor, ...]) -> Tensor:
    """Of several pictures (n, 3, S, S) per text the one that CLIP likes best.                  (T3)"""
    vectors = clip.embed_texts(texts)
    arrays = [[*(255 * part).round().byte().movedim(1, -1).numpy()] for part in samples]
    scores = torch.stack([(clip.embed_images(part) * vectors).sum(-1) for part in arrays])
    return torch.stack([*samples])[scores.argmax(0).cpu(), torch.arange(len(texts))]


# Rate, decay and betas of the paper's column as we remember its appendix.
RECIPES = {"dalle-2": Recipe(
    "DALL-E stage 2 (2102.12092v2 §2.2): a decoder learns words and the codes of a picture as one stream",
    "250M pairs", Numbers(4.5e-4, 1024, 430_000, 5000, weight_decay=4.5e-2, beta2=0.96, clip=4),
    Numbers(1.5e-3, 16, 4000), trained=("decoder", "rows", "columns"), task="dalle", start="vq",
    one_file=True)}


class DalleTask(Task):
    """Recipe `dalle-2`. Takes decoder, tokenizer, images (a trained tokenizer of pictures), clip, batch."""
    text, drawn, candidates = 36, 24, 8

    def __init__(self, given: Ingredients):
        self.given, self.world, self.words, self.images = given, given.world, given.tokenizer, given.images
        side = round(self.codes_of(torch.zeros(1, 3, 48, 48)).shape[1] ** 0.5)
        self.module = Dalle(given.decoder.config, self.text, len(self.images.codes), side)
        place = [[self.words.encode(f" {w}")[0] for w in names] for names in (data.ROWS, data.COLUMNS)]
        self.module.start_from(given.decoder, *place)
        self.module.to(given.device)

    @torch.no_grad()
    def codes_of(self, pixels: Tensor) -> Tensor:
        return self.images.encode(pixels.to(next(self.images.parameters())))

    def lay_out(self, scenes: list[list[data.Thing]]) -> Tensor:
        texts = [self.words.encode(data.caption_scene(things)) for things in scenes]
        return self.module.lay_out(texts, self.words.begin[0])

    def batch(self, step: int) -> list[dict]:
        scenes, pixels = draw_scenes(self.world, step * self.given.batch, self.given.batch,
                                     self.given.examples)
        codes = self.codes_of(pixels).cpu() + self.module.first
        return [dict(tokens=torch.cat((self.lay_out(scenes), codes), 1), set=0, weight=1.0, count=1)]

    def loss(self, tokens: Tensor, **_) -> Tensor:
        return self.module.loss(tokens)

    def draw(self, texts: list[str], temperature: float = 1.0, seed: int = 0) -> Tensor:
        """Pictures (n, 3, 48, 48) in 0 … 1."""
        words = [self.words.encode(text) for text in texts]
        tokens = self.module.lay_out(words, self.words.begin[0]).to(self.given.device)
        generator = torch.Generator(self.given.device).manual_seed(seed)
        parts = [self.module.draw(part, temperature, 0, generator) for part in tokens.split(100)]
        with torch.no_grad():
            return torch.cat([self.images.decode(ids) for ids in parts]).cpu()

    def report(self, out: Path) -> dict[str, dict]:
        """What a reader finds in pictures drawn from captions of the held-out split and of the seen one."""
        result, seed = {}, self.given.seed
        for split in (self.world.held_out, self.world.seen):
            world = data.Shapes(split, seed)
            scenes, _ = draw_scenes(world, 0, min(self.drawn, self.given.eval_items))
            texts = [data.caption_scene(things) for things in scenes]
            samples = self.draw(texts * self.candidates, seed=seed).split(len(scenes))
            rows = {"greedy": self.draw(texts, 0.0), "one sample": samples[0],
                    f"best of {self.candidates} by CLIP": choose_by_clip(self.given.clip, texts, samples)}
            read = {name: read_scenes(pictures) for name, pictures in rows.items()}
            shares = {name: count_found(scenes, found) for name, found in read.items()}
            shares["chance"] = count_by_chance(scenes, read["greedy"])
            found = "  ".join(f"{name}: {100 * s['pictures']:.0f} %" for name, s in shares.items())
            print(f"drawn    {len(scenes)} captions of {split}, all named pairs are found in  {found}")
            result[split] = shares
        return {"results.json": result}


TASKS = {"dalle": DalleTask}
