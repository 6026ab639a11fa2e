"""The training of GLIDE (glide.py): a picture of `shapes`, noise and its caption in, the picture out."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from model import Decoder
from papers.ddpm import Diffusion, cosine_betas
from papers.glide import CONFIG, Denoiser, Painter, read_texts, text_rows
from papers.recipe import Ingredients, Task
from papers.scene_reader import UNIT, count_by_chance, count_found, read_scenes


@torch.no_grad()
def start_at_places(denoiser: Denoiser, decoder: Decoder, tokenizer, gain: float = 4.0) -> None:
    """Every patch begins by reading the phrase of its own place, in each head of each block.

    Nine numbers of a key say of which place a word is the last (least squares on states of captions), nine of
    a query which patch asks.
    """
    world, E, device = data.Shapes(), CONFIG.width // CONFIG.heads, denoiser.positions.device
    scenes = [world.scene(world.rng(i)) for i in range(300)]
    tokens, mask = (x.to(device) for x in text_rows(tokenizer, [data.caption_scene(s) for s in scenes]))
    columns = torch.tensor([tokenizer.encode(f" {word}")[0] for word in data.COLUMNS], device=device)
    target = torch.zeros(*tokens.shape, 9, device=device)
    cells = torch.tensor([thing.cell for things in scenes for thing in things], device=device)
    target[torch.isin(tokens, columns)] = F.one_hot(cells, 9).float()
    X, Y = read_texts(decoder, tokens, mask)[mask], target[mask]                # (words, Dt), (words, 9)
    places = torch.linalg.solve(X.T @ X + torch.eye(X.shape[1], device=device), X.T @ Y).T      # (9, Dt)
    denoiser.positions[:, :9] = 4 * torch.eye(9, device=device)
    for block in denoiser.blocks:
        for head in range(0, CONFIG.width, E):
            block.words.weight[head:head + 9] = gain * places
            block.q.weight[head:head + 9] = gain * torch.eye(9, CONFIG.width, device=device)


class GlideTask(Task):
    """Recipe `glide`: takes world, tokenizer, decoder, save_grid."""
    expect = "(of a grey picture: the mean square of its pixels, about 0.8)"

    def __init__(self, given: Ingredients):
        self.given, self.world = given, given.world
        self.processor = data.Processor(size=CONFIG.image_size, mean=3 * (0.5,), std=3 * (0.5,))
        denoiser = Denoiser(CONFIG, given.decoder.config.width)
        if self.world.says_scenes and self.world.size == CONFIG.image_size:
            start_at_places(denoiser.to(given.device), given.decoder, given.tokenizer)
        self.module = nn.ModuleDict({"denoiser": denoiser, "decoder": given.decoder}).to(given.device)
        self.painter = Painter(denoiser, given.decoder, given.tokenizer, Diffusion(cosine_betas(1000)))

    def batch(self, step: int) -> list[dict]:
        B, rng = self.given.batch, np.random.default_rng((self.given.seed, 4, step))
        items = [self.world.item(i) for i in range(step * B, (step + 1) * B)]
        texts = ["" if rng.random() < 0.2 else str(rng.choice(item.captions)) for item in items]
        tokens, mask = text_rows(self.given.tokenizer, texts)
        pixels = data.to_pixels([item.image for item in items], processor=self.processor)
        noise = torch.from_numpy(rng.standard_normal(pixels.shape, np.float32))
        t = torch.from_numpy(1000 * (1 - rng.random(B)**2)).long().clamp(max=999)
        return [dict(pixels=pixels, tokens=tokens, mask=mask, t=t, noise=noise, set=0, weight=1.0, count=B)]

    def loss(self, pixels: Tensor, tokens: Tensor, mask: Tensor, t: Tensor, noise: Tensor, **_) -> Tensor:
        states = read_texts(self.module["decoder"], tokens, mask)
        x0 = self.module["denoiser"](self.painter.diffusion.add_noise(pixels, t, noise), t, states, mask)
        return (x0.float() - pixels).square().flatten(1).mean(1).sum()          # (G2)

    def report(self, out: Path) -> dict[str, dict]:
        """Pictures of held-out captions in pictures.png; how many of the named things are read in pictures.

        chance: things found in the picture of the next caption.
        """
        g, scores, count = self.given, {}, min(self.given.eval_items, 100)
        items = g.take_items(g.open_held_out(), count)
        g.save_grid(out / "pictures.png", self.painter.draw([item.captions[0] for item in items[:16]]), 4)
        for split in (self.world.seen, self.world.held_out) if self.world.says_scenes else ():
            world = data.Shapes(split, g.seed)
            scenes = [world.scene(world.rng(i)) for i in range(count)]
            drawn = self.painter.draw([data.caption_scene(things) for things in scenes])
            read = read_scenes(data.to_pixels(drawn, self.world.size, UNIT))
            chance = count_by_chance(scenes, read)["things"]
            scores[split] = count_found(scenes, read) | {"chance": chance}
            text = "  ".join(f"{name} {100 * value:.1f}" for name, value in scores[split].items())
            print(f"reader   finds in pictures of {count} captions of {split}, %: {text}")
        return {"pictures.json": scores} if scores else {}


TASKS = {"glide": GlideTask}
