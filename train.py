"""train.py: the hand-written loop; what differs between the papers is data, in one table of recipes.

    python train.py                                     teach the bundled frozen decoder to see: under 3 minutes on a laptop
    python train.py --bridge qformer --minutes 10       another bridge, for longer
    python train.py --lm FOLDER --data emoji --bridge mapl      a real LLaMA-style model, real drawings
    python train.py --stage lm | clip                   make the bundled backbones again
    python train.py --resume out/RUN                    go on, to the same bits, after a crash
    python train.py --list                              the table of recipes, the papers' numbers beside ours

A run folder holds config.json, bridge.safetensors, log.jsonl and state.safetensors (for --resume); every write is atomic.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import data
import eval as evaluation
from bridges import BRIDGES, make_bridge
from model import (CLIP, IGNORE, VLM, Bridge, Checkpoint, Decoder, DecoderConfig, TextConfig, TextTransformer, UserError, ViT,
                   ViTConfig, atomically, load_bridge_file, load_decoder, load_vit, nearest, read_json, save_decoder, save_vit,
                   save_vlm, write_json, write_tensors)

HERE = Path(__file__).parent
WEIGHTS = "weights"                                     # the bundled backbones: weights/decoder, weights/vit


@dataclass(frozen=True)
class Recipe:
    """What a stage or a bridge trains and how: our toy's numbers, and the paper's in words beside them."""
    paper: str                                          # the paper's own recipe, for --list
    options: dict = field(default_factory=dict)         # keyword arguments of the bridge, toy sizes
    lr: float = 1e-3                                    # peak learning rate
    steps: int = 1000
    batch: int = 64                                     # pictures (or texts) per update
    beta2: float = 0.98                                 # AdamW's second β; the first is 0.9
    weight_decay: float = 0.01                          # on matrices only, as MAPL and BLIP-2 do
    optimizer: str = "adamw"                            # adamw | muon (matrices of Linear layers by Muon at muon_lr, the rest by AdamW)
    muon_lr: float = 0.02


# The bundled ViT is probed at layer −2, so every toy bridge reads it there; published sizes are the classes' own defaults.
RECIPES = {
    "linear": Recipe(
        "LLaVA stage 1: W trained; AdamW 2e-3, wd 0, cosine, warm-up 3 %, batch 128, 1 epoch of CC-595K",
        dict(reads_layer=-2), lr=6e-3, steps=1600),
    "mlp": Recipe(
        "LLaVA-1.5 stage 1: MLP trained; AdamW 1e-3, wd 0, cosine, warm-up 3 %, batch 256, 1 epoch of LCS-558K",
        dict(reads_layer=-2), lr=6e-3),
    "mapl": Recipe(
        "MAPL: mapper trained; AdamW 3e-4 (0.9, 0.95), wd 0.01, 1,500 warm-up steps then constant, batch 128, COCO or CC-clean",
        dict(reads_layer=-2, constants=16, width=128, layers=2, heads=4), lr=2e-3, optimizer="muon", steps=800),
    "qformer": Recipe(
        "BLIP-2 stage 2: Q-Former trained; AdamW 1e-4 (0.9, 0.98), wd 0.05, cosine, 2,000 warm-up steps, batch 1,920, 80k steps",
        dict(reads_layer=-2, queries=16, width=128, layers=2, heads=4, hidden=512, dropout=0.0),
        lr=2e-3, optimizer="muon", steps=1200),
    "zero_init": Recipe(
        "LLaMA-Adapter: prompts, gates, projection trained; AdamW 9e-3 per 256 (0.9, 0.95), wd 0.02, 2 of 5 epochs warm-up, batch 64",
        dict(reads_layer=-2, prompts=16, adapted=4, version=2, width=128, depth=2, heads=4), lr=3e-3, optimizer="muon"),
    "flamingo": Recipe(
        "Flamingo: resampler and gated blocks trained; AdamW 1e-4, wd 0.1 (resampler 0), 5,000 warm-up steps then constant, 500k steps",
        dict(reads_layer=-2, every=1, latents=16, depth=2, heads=4, head_width=32), lr=2e-3, optimizer="muon"),
    "lm": Recipe(
        "LLaMA: next-token loss on text; AdamW 3e-4 (0.9, 0.95), wd 0.1, cosine, 2,000 warm-up steps, 4M tokens a batch",
        lr=3e-3, steps=6000, optimizer="muon", beta2=0.95),
    "clip": Recipe(
        "CLIP: both towers, symmetric contrast; Adam 5e-4, wd 0.2, cosine, 2,000 warm-up steps, batch 32,768, 32 epochs of 400M pairs",
        lr=1.5e-3, steps=2500, batch=96, weight_decay=0.05),
    "finetune": Recipe(
        "LLaVA stage 2: bridge and decoder trained; AdamW 2e-5, wd 0, cosine, warm-up 3 %, batch 128, 3 epochs of Instruct-158K",
        lr=3e-4),
}


def setting(default, help: str, **kw):
    return field(**({"default_factory": list} if default == [] else {"default": default}), metadata={"help": help, **kw})


@dataclass
class Settings:
    """Every flag of the command line. None means: what the recipe says."""
    stage: str = setting("bridge", "bridge (towers frozen) | finetune (bridge and decoder) | lm | clip (the bundled backbones)")
    bridge: str = setting("mlp", f"one of: {', '.join(BRIDGES)}")
    option: list = setting([], "an option of the bridge, name=value; may be repeated", nargs="+", action="extend")
    data: str = setting("shapes", "kind[:path][:split]: shapes, emoji, folder:PATH (captions.jsonl and pictures)")
    lm: str = setting(f"{WEIGHTS}/decoder", "folder of the decoder (Hugging Face Llama layout)")
    vit: str = setting(f"{WEIGHTS}/vit", "folder of the ViT (CLIP layout); --stage clip makes one")
    out: str = setting("", "run folder; default out/<stage or bridge>-<data>")
    init: str = setting("", "run folder to start from: its bridge (bridge, finetune), its decoder (lm)")
    steps: int = setting(None, "updates")
    minutes: float = setting(0.0, "if not 0: stop after so many minutes of training instead; the schedule follows the clock")
    batch: int = setting(None, "pictures per update")
    accumulate: int = setting(1, "split each batch into so many pieces; changes memory, not the loss")
    turns: int = setting(5, "questions per picture in one document")
    captions: float = setting(0.2, "share of documents that ask for a caption instead of answers")
    lr: float = setting(None, "peak learning rate")
    warmup: float = setting(0.05, "share of the steps with a linear warm-up; then cosine to 2 %%")
    weight_decay: float = setting(None, "AdamW's weight decay on matrices")
    beta2: float = setting(None, "AdamW's second beta")
    clip: float = setting(1.0, "largest gradient norm")
    seed: int = setting(0, "of the initial weights and of the data")
    dtype: str = setting("auto", "float32 | bfloat16 (autocast; trained parameters stay float32) | auto")
    device: str = setting("auto", "cpu | cuda | auto")
    threads: int = setting(0, "CPU threads; 0 = PyTorch's choice")
    log_every: int = setting(50, "steps between two lines")
    check_every: int = setting(0, "steps between two short evaluations; 0 = only at the end")
    save_every: int = setting(250, "steps between two states for --resume")
    samples: int = setting(5, "answers to print at the end")
    eval_items: int = setting(400, "held-out pictures in the final table")
    strict: bool = setting(False, "stop at a broken item of the data set instead of skipping it")


def main(argv: list[str] | None = None) -> nn.Module:
    # 1. settings --------------------------------------------------------------------------------------------------
    s, resume = settings_from(argv)
    recipe = RECIPES[s.bridge if s.stage == "bridge" else s.stage]
    for name in ("lr", "steps", "batch", "beta2", "weight_decay"):
        if getattr(s, name) is None:
            setattr(s, name, getattr(recipe, name))
    if s.threads:
        torch.set_num_threads(s.threads)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if s.device == "auto" else s.device)
    dtype, why = pick_dtype(s.dtype, device)
    torch.manual_seed(s.seed)
    out = Path(s.out or f"out/{s.bridge if s.stage == 'bridge' else s.stage}-{s.data.split(':')[0]}")
    print(f"command  python train.py {' '.join(sys.argv[1:] if argv is None else argv)}")
    print(f"run      {out}   seed {s.seed}   {device}   {str(dtype).removeprefix('torch.')} ({why})")

    # 2. data and 3. model: load, freeze, print the table ------------------------------------------------------------
    task = {"lm": TextTask, "clip": ClipTask}.get(s.stage, BridgeTask)(s, recipe, device)
    trained = [(n, p) for n, p in task.module.named_parameters() if p.requires_grad]
    print_modules(task.module)

    # 4. optimiser and schedule --------------------------------------------------------------------------------------
    optimizers = make_optimizers(recipe, task.module, trained, s)
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]

    # 5. resume ------------------------------------------------------------------------------------------------------
    step, smooth, spent = 0, None, 0.0
    if resume:
        step, smooth, spent = load_state(out, trained, optimizers)
        rewind_log(out / "log.jsonl", step)
        print(f"resume   at step {step} of {out}")
    else:
        write_json(out / "config.json", {"settings": dataclasses.asdict(s)})
        (out / "log.jsonl").unlink(missing_ok=True)

    # 6. the loop ----------------------------------------------------------------------------------------------------
    task.module.train()
    meter, start = Meter(s.steps, s.minutes), time.monotonic() - spent
    bar = tqdm(total=s.steps if not s.minutes else None, initial=step, disable=not sys.stderr.isatty(), leave=False)
    while True:
        progress = step / s.steps if not s.minutes else min(1.0, (time.monotonic() - start) / (60 * s.minutes))
        if progress >= 1:
            break
        if step and step % s.save_every == 0:
            save_state(out, trained, optimizers, step, smooth, time.monotonic() - start)
        if s.check_every and step and step % s.check_every == 0:
            task.module.eval()
            append(out / "log.jsonl", {"step": step, **(check := task.check())})
            bar.write(f"check  {step:6d}  " + "  ".join(f"{k} {100 * v:.1f}" for k, v in check.items()), file=sys.stdout)
            task.module.train()
        rate = schedule(progress, s.warmup)
        for o, peak in zip(optimizers, peaks):
            for group, lr in zip(o.param_groups, peak):
                group["lr"] = lr * rate

        # ---------------------------------------------------------------------------------------------- the step ---
        pieces = task.batch(step)                                               # `accumulate` parts of one batch
        count = sum(p.pop("count") for p in pieces)                             # supervised tokens of the WHOLE update
        loss = 0.0
        for piece in pieces:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                part = task.loss(**piece) / count                               # Σ over tokens ÷ tokens of the update
            part.backward()
            loss += part.item()
        norm = nn.utils.clip_grad_norm_([p for _, p in trained], s.clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            save_state(out, trained, optimizers, step, smooth, time.monotonic() - start)
            raise UserError(f"loss is not finite at step {step} (loss {loss}, gradient norm {norm}; batch: {task.describe(step)}); "
                            f"the state before it is in {out}/state.safetensors; try --lr {s.lr / 3:.0e} or --dtype float32.")
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        task.after_step()
        # -----------------------------------------------------------------------------------------------------------

        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        if step == 0:
            print(f"step 0   loss {loss:.3f}   {task.expect}")
        meter.add(pieces, count)
        step += 1
        bar.update()
        if step % s.log_every == 0 or step == 1:
            spent = time.monotonic() - start
            line = {"step": step, "loss": loss, "ema": smooth, "grad_norm": norm, "lr": s.lr * rate,
                    **task.vitals(), **meter.rates(device)}
            append(out / "log.jsonl", {**line, "seconds": spent, **task.details()})
            bar.write(meter.line(line, progress if s.minutes else step / s.steps, spent), file=sys.stdout)
    bar.close()
    spent = time.monotonic() - start
    save_state(out, trained, optimizers, step, smooth, spent)
    task.module.eval()

    # 7. final evaluation and report ---------------------------------------------------------------------------------
    task.save(out, {"settings": dataclasses.asdict(s), "steps": step, "seconds": round(spent, 1),
                    "trained_parameters": sum(p.numel() for _, p in trained), "training_examples": step * s.batch})
    print(f"\ntrained  {step} steps in {spent / 60:.1f} minutes")
    task.report(out)
    print(f"files    {out}/   ({', '.join(sorted(p.name for p in out.iterdir()))})")
    return task.module


# ------------------------------------------------------------------------------------------------------------------
# Tasks: what a batch is, what its loss is, what to write and to report
# ------------------------------------------------------------------------------------------------------------------

class Task:
    """What most tasks do not need: something after each step, numbers for the line of progress, details for log.jsonl."""

    def after_step(self) -> None:
        pass

    def vitals(self) -> dict:
        return {}

    def details(self) -> dict:
        return {}


class BridgeTask(Task):
    """Stages `bridge` and `finetune`: −Σ log p(answer | image, question) through a frozen, or trained, decoder."""

    def __init__(self, s: Settings, recipe: Recipe, device: torch.device):
        self.s, self.device = s, device
        self.world = data.open_data(s.data, s.seed, s.strict)
        self.tokenizer = data.load_tokenizer(resolve(s.lm))
        decoder = load_decoder(resolve(s.lm), device)
        vit = load_vit(resolve(s.vit), device)
        options = {**(RECIPES[s.bridge].options), **parse_options(s.option)}
        bridge = make_bridge(s.bridge, decoder.config, vit.config.width, **options).to(device)
        self.module = VLM(vit, bridge, decoder, self.tokenizer.image)
        if s.init:
            load_bridge_file(bridge, Path(s.init) / "bridge.safetensors", device)
        for part, learns in ((vit, False), (bridge, True), (decoder, s.stage == "finetune")):
            part.requires_grad_(learns)
        self.vocab = decoder.config.vocab_size
        self.expect = f"(a uniform guess over the vocabulary: ln {self.vocab} = {math.log(self.vocab):.2f})"

    def describe(self, step: int) -> str:
        return f"items {step * self.s.batch} to {(step + 1) * self.s.batch - 1} of {self.s.data}"

    def documents(self, step: int) -> tuple[list[np.ndarray], list[data.Document]]:
        images, documents = [], []
        for i in range(step * self.s.batch, (step + 1) * self.s.batch):
            rng = np.random.default_rng((self.s.seed, 1, i))
            item = self.world.item(i, turns=self.s.turns)
            d = data.Document(self.tokenizer).image()
            if rng.random() < self.s.captions or not item.qas:
                d.turn(data.CAPTION, item.captions[0])
            else:
                for q in item.qas:
                    d.turn(data.QUESTION.format(q.question), q.answer)
            images.append(item.image)
            documents.append(d)
        return images, documents

    def batch(self, step: int) -> list[dict]:
        images, documents = self.documents(step)
        with torch.no_grad():
            features = self.module.features(data.to_pixels(images, self.module.vit.config.image_size).to(self.device))
        pieces, size = [], math.ceil(len(documents) / self.s.accumulate)
        for i in range(0, len(documents), size):
            tokens, labels, mask = data.collate(documents[i:i + size])
            pieces.append(dict(tokens=tokens.to(self.device), labels=labels.to(self.device), features=features[i:i + size],
                               mask=None if mask.all() else mask.to(self.device), count=int((labels != IGNORE).sum())))
        return pieces

    def loss(self, **piece) -> Tensor:
        return self.module.loss(**piece)[0]

    def vitals(self) -> dict:
        return self.module.bridge.vitals()

    def details(self) -> dict:
        gates = getattr(self.module.bridge, "gates", None)
        return {"gates": gates().tolist()} if gates else {}

    def save(self, out: Path, facts: dict) -> None:
        decoder = "" if self.s.stage == "finetune" else portable(resolve(self.s.lm), out)
        save_vlm(self.module, out, facts, portable(resolve(self.s.vit), out), decoder)
        for name in ("tokenizer.json", "tokenizer_config.json") if not decoder else ():      # a trained decoder takes its words along
            if (resolve(self.s.lm) / name).exists():
                with atomically(out / "decoder" / name) as tmp:
                    tmp.write_bytes((resolve(self.s.lm) / name).read_bytes())

    def check(self) -> dict:
        items = evaluation.items_of(self.world, self.world.held_out, 100)
        return evaluation.numbers(evaluation.evaluate(self.module, self.tokenizer, items, captions=False))

    def report(self, out: Path) -> None:
        evaluation.report(self.module, self.tokenizer, self.world, out, self.s.eval_items, self.s.samples)


class TextTask(Task):
    """Stage `lm`: the decoder alone, on worded scenes, questions and answers (data.ShapesText)."""

    def __init__(self, s: Settings, recipe: Recipe, device: torch.device):
        self.s, self.device = s, device
        self.tokenizer = data.shapes_tokenizer()
        config = DecoderConfig(vocab_size=self.tokenizer.vocab_size)
        self.module = (load_decoder(Path(s.init) / "decoder") if s.init else Decoder(config).init_weights()).to(device)
        self.text = data.ShapesText(self.tokenizer, seed=s.seed)
        self.vlm = VLM(nn.Module(), WordBag(self.module), self.module)
        self.expect = f"(a uniform guess over the vocabulary: ln {config.vocab_size} = {math.log(config.vocab_size):.2f})"
        self.pool: dict[int, list] = {}

    def describe(self, step: int) -> str:
        return f"documents of block {step // BLOCK}"

    def batch(self, step: int) -> list[dict]:
        """Documents are drawn in blocks of 8 batches and sorted by length inside a block: less padding, same mixture."""
        block = step // BLOCK
        if block not in self.pool:
            n = self.s.batch * BLOCK
            progress = 1.0 if self.s.init else block * BLOCK / self.s.steps     # drills come first, once
            documents = sorted((self.text.document(block * n + i, progress) for i in range(n)), key=lambda d: len(d[0].tokens))
            order = np.random.default_rng((self.s.seed, 2, block)).permutation(BLOCK)
            self.pool = {block: [documents[i * self.s.batch:(i + 1) * self.s.batch] for i in order]}
        documents = self.pool[block][step % BLOCK]
        pieces, size = [], math.ceil(len(documents) / self.s.accumulate)
        for i in range(0, len(documents), size):
            tokens, labels, mask = data.collate([d for d, _ in documents[i:i + size]])
            bags = torch.tensor([bag for _, bags in documents[i:i + size] for bag in bags], dtype=torch.long).view(-1, data.BAG)
            pieces.append(dict(tokens=tokens.to(self.device), labels=labels.to(self.device), mask=mask.to(self.device),
                               features=bags.to(self.device), count=int((labels != IGNORE).sum())))
        return pieces

    def loss(self, **piece) -> Tensor:
        return self.vlm.loss(**piece)[0]

    def save(self, out: Path, facts: dict) -> None:
        save_decoder(self.module, out / "decoder", bos_token_id=self.tokenizer.bos, eos_token_id=self.tokenizer.eos)
        self.tokenizer.save(out / "decoder")
        write_json(out / "config.json", facts)

    def check(self) -> dict:
        return evaluation.reading(self.module, self.tokenizer, 50)

    def report(self, out: Path) -> None:
        """The gate: above 97 % per question type and per number of objects, on scenes told in words (three styles; the fourth apart)."""
        result = evaluation.reading(self.module, self.tokenizer, self.s.eval_items)
        other = evaluation.reading(self.module, self.tokenizer, self.s.eval_items, ["place"])
        write_json(out / "decoder" / "reading.json", {"gate": result, 'style "place"': other})
        for name, r in (("worded scenes", result), ('style "place"', other)):
            print(f"reading  {name}, exact answers in %: " + "  ".join(f"{k} {100 * v:.1f}" for k, v in r.items()))
        worst = min(result.values())
        print(f"gate     {'PASSED' if worst > 0.97 else 'NOT PASSED'}: the lowest is {100 * worst:.1f} %, the gate is 97 %")


BLOCK = 8                                               # batches that are sorted by length together


class WordBag(Bridge):
    """Not a bridge to images: several words in one position, as the sum of their embeddings (stage `lm`, the oracle's bag form)."""
    name = "bag"

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.embed = (decoder.embed,)                   # in a tuple: its parameters stay the decoder's

    def prefix(self, visual: Tensor) -> Tensor:
        there = visual != data.EMPTY                                            # (ΣM, BAG)
        words = self.embed[0](visual.clamp(min=0))                              # (ΣM, BAG, D)
        return (words * there[..., None]).sum(1, keepdim=True)                  # (ΣM, 1, D)


class ClipTask(Task):
    """Stage `clip`: CLIP's symmetric contrast (2103.00020v1, Figure 3), with hard negative captions beside the batch's own."""

    def __init__(self, s: Settings, recipe: Recipe, device: torch.device):
        self.s, self.device = s, device
        self.world = data.open_data(s.data, s.seed, s.strict)
        self.tokenizer = data.shapes_tokenizer() if s.data.startswith("shapes") else data.load_tokenizer(resolve(s.lm))
        size = self.world.size
        vit = ViT(ViTConfig(image_size=size))
        nn.init.normal_(vit.positions, std=0.5)         # at CLIP's 0.01 the patches forget where they are: 0.2 % of their variance,
                                                        # a probe finds the cell of 25 %, and every bridge fails on "where is …?"
        text = TextTransformer(TextConfig(self.tokenizer.vocab_size, context=64, end=self.tokenizer.eos))
        self.module = CLIP(vit, text, width=128).to(device)
        self.expect = f"(a uniform guess: (ln {3 * s.batch} + ln {s.batch})/2 = {(math.log(3 * s.batch) + math.log(s.batch)) / 2:.2f})"

    def describe(self, step: int) -> str:
        return f"items {step * self.s.batch} to {(step + 1) * self.s.batch - 1} of {self.s.data}"

    def batch(self, step: int) -> list[dict]:
        images, texts, negatives = [], [], []
        for i in range(step * self.s.batch, (step + 1) * self.s.batch):
            image, text, wrong = self.world.pair(i)
            images.append(image)
            texts.append(text)
            negatives += wrong
        pixels = data.to_pixels(images, self.module.vit.config.image_size)
        limit = self.module.text.config.context - 1
        ids = [self.tokenizer.encode(t)[:limit] + [self.tokenizer.eos] for t in texts + negatives]
        tokens = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
        for row, t in zip(tokens, ids):
            row[:len(t)] = torch.tensor(t)
        return [dict(pixels=pixels.to(self.device), tokens=tokens.to(self.device), count=1)]

    def loss(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """½ (CE over the texts of each image + CE over the images of each true text); the hard negatives only add texts."""
        S = self.module(pixels, tokens).float()                                 # (B, B + negatives)
        target = torch.arange(len(S), device=S.device)
        return (F.cross_entropy(S, target) + F.cross_entropy(S[:, :len(S)].T, target)) / 2

    def after_step(self) -> None:
        with torch.no_grad():
            self.module.logit_scale.clamp_(max=math.log(100))                   # CLIP §2.5: logits scaled by at most 100

    def vitals(self) -> dict:
        return {"scale": self.module.logit_scale.exp().item()}

    def save(self, out: Path, facts: dict) -> None:
        save_vit(self.module.vit, out / "vit")
        write_json(out / "config.json", facts)

    def check(self) -> dict:
        return evaluation.probe(self.module.vit, train=1000, test=500) if self.world.name == "shapes" else {}

    def report(self, out: Path) -> None:
        """The gate: one token at the layer that bridges read names colour, shape and place of a held-out pair above 95 %."""
        if self.world.name != "shapes":
            return
        result = evaluation.probe(self.module.vit)
        write_json(out / "vit" / "probe.json", result)
        print("probe    one token at layer -2, held-out pairs, %: " + "  ".join(f"{k} {100 * v:.1f}" for k, v in result.items()))
        worst = min(result[k] for k in ("color", "shape", "place"))
        print(f"gate     {'PASSED' if worst > 0.95 else 'NOT PASSED'}: the lowest of colour, shape and place is {100 * worst:.1f} %, the gate is 95 %")


# ------------------------------------------------------------------------------------------------------------------
# Below the fold: what is not the method
# ------------------------------------------------------------------------------------------------------------------

def schedule(progress: float, warmup: float, floor: float = 0.02) -> float:
    """Linear warm-up over the first share of the run, then half a cosine down to `floor`; a factor of the peak rate."""
    if progress < warmup:
        return max(progress / warmup, 0.02)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def make_optimizers(recipe: Recipe, module: nn.Module, trained: list[tuple[str, nn.Parameter]], s: Settings) -> list[torch.optim.Optimizer]:
    """AdamW with decay on matrices only. Muon: matrices of Linear layers by Muon, the rest by AdamW.

    Muon is what gets a tiny decoder off the plateau where it knows the words of a scene but not which belong together
    (measured: AdamW stayed there for thousands of steps).
    """
    fused = trained[0][1].device.type == "cuda"
    if recipe.optimizer == "muon":
        linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
        matrices = [p for _, p in trained if id(p) in linear]
        rest = [p for _, p in trained if id(p) not in linear]
        return [torch.optim.Muon(matrices, lr=recipe.muon_lr * s.lr / recipe.lr, weight_decay=s.weight_decay),
                torch.optim.AdamW(rest, lr=s.lr, betas=(0.9, s.beta2), weight_decay=0.0, fused=fused)]
    groups = [{"params": [p for _, p in trained if p.ndim >= 2], "weight_decay": s.weight_decay},
              {"params": [p for _, p in trained if p.ndim < 2], "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, s.beta2), fused=fused)]


def save_state(out: Path, trained, optimizers, step: int, smooth: float | None, spent: float) -> None:
    """Everything the next step depends on, in one safetensors file: parameters, optimiser moments, random state, counters."""
    tensors = {f"parameter.{n}": p for n, p in trained}
    for i, o in enumerate(optimizers):
        for j, state in o.state_dict()["state"].items():
            tensors.update({f"optimizer.{i}.{j}.{k}": v for k, v in state.items() if isinstance(v, Tensor)})
    tensors["random"] = torch.get_rng_state()
    write_tensors(out / "state.safetensors", {k: v.cpu().clone() for k, v in tensors.items()},
                  {"step": str(step), "smooth": repr(smooth), "spent": repr(spent)})


def rewind_log(file: Path, step: int) -> None:
    """Drop what was logged after the state (it is written again), and a last line that a crash cut off."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(True) if file.exists() else []:
        try:
            kept += [line] if json.loads(line)["step"] <= step else []
        except ValueError:
            continue
    with atomically(file) as tmp:
        tmp.write_text("".join(kept), encoding="utf-8")


def load_state(out: Path, trained, optimizers) -> tuple[int, float | None, float]:
    file = out / "state.safetensors"
    if not file.exists():
        raise UserError(f"{file}: no state was saved before this run ended; start it again without --resume.")
    for rest in out.glob(".*.safetensors.*"):                                   # a save that was killed half way
        rest.unlink()
    checkpoint = Checkpoint(file)
    with torch.no_grad():
        for n, p in trained:
            p.copy_(checkpoint.get(f"parameter.{n}"))
    for i, o in enumerate(optimizers):
        state: dict[int, dict] = {}
        for name in checkpoint.where:
            kind, *rest = name.split(".")
            if kind == "optimizer" and rest[0] == str(i):
                state.setdefault(int(rest[1]), {})[rest[2]] = checkpoint.get(name)
        o.load_state_dict({**o.state_dict(), "state": state})
    torch.set_rng_state(checkpoint.get("random"))
    facts = checkpoint.files[file].metadata()
    return int(facts["step"]), None if facts["smooth"] == "None" else float(facts["smooth"]), float(facts["spent"])


class Meter:
    """Rates since the last line, and the line itself."""

    def __init__(self, steps: int, minutes: float):
        self.steps, self.minutes = steps, minutes
        self.tokens = self.learned = self.images = 0
        self.since = time.monotonic()

    def add(self, pieces: list[dict], count: int) -> None:
        self.tokens += sum(p["tokens"].numel() for p in pieces)
        self.learned += count
        self.images += sum(len(p["tokens"]) for p in pieces)

    def rates(self, device: torch.device) -> dict:
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = max(time.monotonic() - self.since, 1e-9)
        rates = {"tokens_per_s": self.tokens / seconds, "learned_per_s": self.learned / seconds, "images_per_s": self.images / seconds}
        if device.type == "cuda":
            rates["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.tokens = self.learned = self.images = 0
        self.since = time.monotonic()
        return rates

    def line(self, x: dict, progress: float, spent: float) -> str:
        """At most 120 characters: enough to judge the health of a run and to plan the evening."""
        eta = int(spent / max(progress, 1e-6) * (1 - progress))
        step = f"{x['step']:6d}/{self.steps}" if not self.minutes else f"{x['step']:6d}"
        extra = "".join(f"  {k} {x[k]:.3f}" for k in ("gate", "scale") if k in x)
        memory = f"  {x['memory_gb']:.1f} GB" if "memory_gb" in x else ""
        return (f"step {step} {100 * progress:3.0f}%  loss {x['loss']:.3f} (ema {x['ema']:.3f})  |g| {x['grad_norm']:.2f}{extra}  lr {x['lr']:.1e}  "
                f"{x['learned_per_s'] / 1e3:.1f}/{x['tokens_per_s'] / 1e3:.1f}k tok/s{memory}  eta {eta // 60}m{eta % 60:02d}s")


def print_modules(module: nn.Module) -> None:
    """The first thing to check of a run: what is trained and what is frozen."""
    rows = [(n, sum(p.numel() for p in m.parameters()), sum(p.numel() for p in m.parameters() if p.requires_grad),
             sum(p.numel() * p.element_size() for p in m.parameters())) for n, m in module.named_children()]
    rows += [(n, p.numel(), p.numel() * p.requires_grad, p.numel() * p.element_size()) for n, p in module.named_parameters(recurse=False)]
    print(f"{'module':18s}{'parameters':>14s}{'trained':>14s}{'MB':>9s}")
    for name, total, trained, size in rows:
        print(f"{name:18s}{total:14,d}{trained:14,d}{size / 1e6:9.1f}   {'trained' if trained else 'frozen'}")


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    if name == "auto":
        if device.type == "cuda":
            return (torch.bfloat16, "this GPU has it") if torch.cuda.is_bf16_supported() else (torch.float32, "this GPU has no bfloat16")
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            return torch.bfloat16, "this CPU has bfloat16 instructions: about 2x faster here"
        return torch.float32, "this CPU has no bfloat16 instructions"
    if name not in ("float32", "bfloat16"):
        raise UserError(f'unknown dtype "{name}"; known: auto, float32, bfloat16.')
    return getattr(torch, name), "as asked"


def resolve(path: str) -> Path:
    """A folder as given, or beside this file (weights/ works from anywhere)."""
    p = Path(path)
    if p.is_dir():
        return p
    if (HERE / path).is_dir():
        return HERE / path
    raise UserError(f"{path}: no such folder; give one with config.json and *.safetensors"
                    + (", or make the bundled ones again: python train.py --stage lm and --stage clip." if path.startswith(WEIGHTS) else "."))


def portable(folder: Path, out: Path) -> str:
    """How a run's config.json names a tower: inside the run, beside this file, or where it is."""
    folder = folder.resolve()
    for base in (out.resolve(), HERE.resolve()):
        if folder.is_relative_to(base):
            return str(folder.relative_to(base))
    return str(folder)


def parse_options(pairs: list[str]) -> dict:
    options = {}
    for pair in pairs:
        name, eq, value = pair.partition("=")
        if not eq:
            raise UserError(f'--option {pair}: write name=value, for example --option version=1.')
        try:
            options[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def append(path: Path, line: dict) -> None:
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")


def settings_from(argv: list[str] | None) -> tuple[Settings, bool]:
    """Flags generated from the fields of Settings; their comments are the help texts."""
    fields = dataclasses.fields(Settings)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     exit_on_error=False, allow_abbrev=False)
    for f in fields:
        extra = {k: v for k, v in f.metadata.items() if k != "help"}
        default = "none" if f.type == "list" or f.default == "" else f.default if f.default is not None else "by recipe"
        flag, text = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default: {default})"
        if f.type == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        elif f.type == "list":
            parser.add_argument(flag, default=[], help=text, **extra)
        else:
            parser.add_argument(flag, type={"int": int, "float": float, "str": str}[f.type], default=f.default, help=text)
    parser.add_argument("--resume", metavar="RUN", help="go on with this run folder, with the settings it was started with")
    parser.add_argument("--list", action="store_true", help="print the recipes")
    try:
        args, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise UserError(f"{e}; see python train.py --help.") from None
    if unknown:
        flags = ["--" + f.name.replace("_", "-") for f in fields] + ["--resume", "--list"]
        raise UserError(f'unknown argument "{unknown[0]}"; {nearest(unknown[0], flags)}')
    if args.list:
        print_recipes()
        raise SystemExit(0)
    if args.resume:
        config = read_json(Path(args.resume) / "config.json")
        if "settings" not in config:
            raise UserError(f'{args.resume}/config.json: "settings" is missing, so this is no run of train.py that can be resumed.')
        return Settings(**{**config["settings"], "out": args.resume}), True
    s = Settings(**{f.name: getattr(args, f.name) for f in fields})
    if s.stage not in ("bridge", "finetune", "lm", "clip"):
        raise UserError(f'unknown stage "{s.stage}"; known: bridge, finetune, lm, clip.')
    if s.bridge not in BRIDGES:
        raise UserError(f'unknown bridge "{s.bridge}"; {nearest(s.bridge, BRIDGES)}')
    for name in ("steps", "batch", "accumulate", "turns", "log_every", "save_every", "eval_items"):
        if getattr(s, name) is not None and getattr(s, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)}: must be at least 1.")
    return s, False


def print_recipes() -> None:
    for name, r in RECIPES.items():
        print(f"{name}\n    paper  {r.paper}")
        muon = f"Muon {r.muon_lr:g}, " if r.optimizer == "muon" else ""
        print(f"    toy    {muon}AdamW {r.lr:g} (0.9, {r.beta2:g}), wd {r.weight_decay:g}, cosine, batch {r.batch}, {r.steps} steps"
              + (f"; {', '.join(f'{k}={v}' for k, v in r.options.items())}" if r.options else ""))


def run(main_function) -> None:
    """A user's mistake is one sentence on stderr and exit code 2; anything else is a bug and shows its traceback."""
    try:
        main_function()
    except UserError as e:
        print(str(e), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    run(main)
