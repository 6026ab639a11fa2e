"""train.py: the hand-written loop; what differs between the papers is data, in one table of recipes.

    python train.py                                     teach the bundled frozen decoder to see: under 3 minutes on a laptop
    python train.py --bridge qformer --minutes 10       another bridge, for longer
    python train.py --recipe llava                      a paper's system through all of its stages (llava-1, then llava-2)
    python train.py --lm FOLDER --data emoji --bridge mapl      a real LLaMA-style model, real drawings
    python train.py --recipe lm | clip                  make the bundled backbones again
    python train.py --resume out/RUN                    go on, to the same bits, after a crash
    torchrun --nproc-per-node 8 train.py …              the same losses from several processes (--shard: parameters in slices)
    python train.py --list                              the table of recipes, the papers' numbers beside ours

A run folder holds config.json, bridge.safetensors, log.jsonl, results.json, samples.html (pictures, answers, right or wrong) and
state.safetensors (for --resume), with matplotlib also loss.png and gates.png; every write is atomic.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import eval as evaluation
from bridges import BRIDGES, Stage1, make_bridge
from model import (CLIP, IGNORE, IMAGE, VLM, Bridge, Checkpoint, Decoder, DecoderConfig, TextConfig, TextTransformer, UserError, ViT,
                   ViTConfig, atomically, fetch, is_hub_name, load_bridge_file, load_decoder, load_vit, nearest, next_token_loss,
                   pinned, print_licence, read_json, save_decoder, save_vit, save_vlm, write_json, write_tensors)

HERE = Path(__file__).parent
WEIGHTS = "weights"                                     # the bundled backbones: weights/decoder, weights/vit


# ------------------------------------------------------------------------------------------------------------------
# The recipes
# ------------------------------------------------------------------------------------------------------------------

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


MUON = dict(optimizer="muon")
# The bundled ViT is probed at layer −2, so every toy bridge reads it there.
LINEAR, MLP = dict(reads_layer=-2), dict(reads_layer=-2)
QFORMER = dict(reads_layer=-2, queries=16, width=128, layers=2, heads=4, hidden=512, dropout=0.0)
ZERO_INIT = dict(reads_layer=-2, prompts=16, adapted=4, version=2, width=128, depth=2, heads=4)
LLAVA = dict(weight_decay=0.0, warmup=0.03, beta2=0.999, clip=1.0)
ADAPTER = dict(weight_decay=0.02, warmup=0.4, beta2=0.95, clip=0)      # 2 of 5 epochs warm up
RECIPES = {
    "linear": Recipe(
        "LLaVA stage 1 (2304.08485v2 §4.2): W learns, log p(answer)", "CC3M, 595K pairs, 1 epoch", Numbers(2e-3, 128, 4650, **LLAVA),
        Numbers(6e-3, 64, 1600), "linear", options=LINEAR),
    "mlp": Recipe(
        "LLaVA-1.5 stage 1 (2310.03744v2 §3): the MLP learns", "LCS-558K, 1 epoch", Numbers(1e-3, 256, 2180, **LLAVA),
        Numbers(6e-3, 64, 1000), "mlp", options=MLP),
    "mapl": Recipe(
        "MAPL (2210.07179v2 §3.3): the mapper learns", "CC-clean, 374K captions: 2,922 steps are an epoch, early stopping says how many",
        Numbers(3e-4, 128, 2922, 1500, "constant", 0.01, 0.95, 0), Numbers(2e-3, 64, 800, **MUON), "mapl",
        options=dict(reads_layer=-2, constants=16, width=128, layers=2, heads=4)),
    "qformer": Recipe(
        "BLIP-2 stage 2 without stage 1 (2301.12597v3 §3.3): the Q-Former learns", "129M pairs",
        Numbers(1e-4, 1920, 80000, 2000, weight_decay=0.05, clip=0), Numbers(2e-3, 64, 1200, **MUON), "qformer", options=QFORMER),
    "zero_init": Recipe(
        "LLaMA-Adapter with images (2303.16199v3 §3.3): prompts, gates and projection learn", "ScienceQA, 5 epochs",
        Numbers(2.25e-3, 64, 1000, **ADAPTER), Numbers(3e-3, 64, 1000, **MUON), "zero_init", options=ZERO_INIT),
    "flamingo": Recipe(
        "Flamingo (2204.14198v2 §2.4): resampler and gated blocks learn; Σ_m λ_m E_m, one update for all data sets",
        "M3W * 1.0, ALIGN * 0.2, LTIP * 0.2, VTP * 0.03", Numbers(1e-4, None, 500000, 5000, "constant", 0.1, 0.999), Numbers(2e-3, 64, 1000, **MUON),
        "flamingo", options=dict(reads_layer=-2, every=1, latents=16, depth=2, heads=4, head_width=32)),
    "flamingo-mixture": Recipe(
        "Flamingo's weighted sum on two toy data sets: single pictures and interleaved pages", "M3W * 1.0, ALIGN * 0.2, LTIP * 0.2, VTP * 0.03",
        Numbers(1e-4, None, 500000, 5000, "constant", 0.1, 0.999), Numbers(2e-3, 64, 1000, **MUON), "flamingo",
        options=dict(reads_layer=-2, every=1, latents=16, depth=2, heads=4, head_width=32), toy_data="shapes + shapes-pages * 0.5"),

    "idefics": Recipe(
        "IDEFICS 9B: resampler, gated blocks and the new words learn", "OBELICS, LAION, Wikipedia, PMD; 1.3M tokens a batch",
        Numbers(1e-5, 1280, 200000, 2000, weight_decay=0.1, beta2=0.999), Numbers(2e-3, 64, 1000, **MUON), "idefics",
        options=dict(reads_layer=-2, every=1, latents=16, depth=2, resampler_heads=4, resampler_head_width=32)),

    "llava-1": Recipe(
        "LLaVA stage 1, captions alone: W learns to align", "CC3M, 595K pairs, 1 epoch", Numbers(2e-3, 128, 4650, **LLAVA),
        Numbers(6e-3, 64, 400), "linear", options=LINEAR, captions=1.0, template="plain"),
    "llava-2": Recipe(
        "LLaVA stage 2 (§4.2): W and the decoder learn from conversations", "Instruct-158K, 3 epochs", Numbers(2e-5, 32, 14800, **LLAVA),
        Numbers(1e-3, 64, 400), "linear", ("bridge", "decoder"), options=LINEAR, start="llava-1"),
    "llava-1.5-1": Recipe(
        "LLaVA-1.5 stage 1, captions alone: the MLP learns to align", "LCS-558K, 1 epoch", Numbers(1e-3, 256, 2180, **LLAVA),
        Numbers(6e-3, 64, 400), "mlp", options=MLP, captions=1.0, template="plain"),
    "llava-1.5-2": Recipe(
        "LLaVA-1.5 stage 2: MLP and decoder learn from academic VQA and conversations", "mix-665K, 1 epoch", Numbers(2e-5, 128, 5200, **LLAVA),
        Numbers(1e-3, 64, 400), "mlp", ("bridge", "decoder"), options=MLP, start="llava-1.5-1"),
    "frozen": Recipe(
        "Frozen (2106.13884v2 §3.2): the vision encoder and its map to 2 tokens learn THROUGH the frozen decoder", "CC3M, 3.3M pairs",
        Numbers(3e-4, 128, 39000, 1, "constant", 0.0, 0.95, 0), Numbers(2e-3, 64, 1000, **MUON), "frozen", ("bridge", "vit"),
        options=dict(reads_layer=-1, tokens=2)),
    "blip2-1": Recipe(
        "BLIP-2 stage 1 (§3.2): ITC + ITM + ITG, no decoder", "129M pairs", Numbers(1e-4, 2320, 250000, 2000, weight_decay=0.05, clip=0),
        Numbers(1e-3, 64, 600), "qformer", task="stage1", options=QFORMER),
    "blip2-2": Recipe(
        "BLIP-2 stage 2 (§3.3): the Q-Former of stage 1 learns to prompt the frozen decoder", "129M pairs",
        Numbers(1e-4, 1920, 80000, 2000, weight_decay=0.05, clip=0), Numbers(2e-3, 64, 800, **MUON), "qformer", options=QFORMER, start="blip2-1"),
    "adapter-1": Recipe(
        "LLaMA-Adapter (§3.1, §4.1): prompts and gates learn instructions without pictures", "Alpaca-52K, 5 epochs",
        Numbers(2.25e-3, 64, 4060, **ADAPTER), Numbers(3e-3, 64, 200, **MUON), "zero_init", options=ZERO_INIT, template="alpaca", toy_data="shapes-words"),
    "adapter-2": Recipe(
        "LLaMA-Adapter (§3.3): prompts, gates and projection learn from pictures", "ScienceQA, 5 epochs",
        Numbers(2.25e-3, 64, 1000, **ADAPTER), Numbers(3e-3, 64, 1000, **MUON), "zero_init", options=ZERO_INIT, template="alpaca", form="QCM-A",
        start="adapter-1"),
    "adapter-rand": Recipe(
        "LLaMA-Adapter's ablation (§4.4, Table 6): gates at random instead of zero", "ScienceQA, 5 epochs",
        Numbers(2.25e-3, 64, 1000, **ADAPTER), Numbers(3e-3, 64, 1000, **MUON), "zero_init", options={**ZERO_INIT, "gate_init": "random"},
        template="alpaca", form="QCM-A"),

    "lm": Recipe(
        "LLaMA (2302.13971v1 §2): next-token loss on text", "1.0T tokens for the 7B, 2,048 in a row", Numbers(3e-4, 2000, 250000, 2000, weight_decay=0.1, beta2=0.95),
        Numbers(3e-3, 64, 6000, beta2=0.95, **MUON), trained=("decoder",), task="lm"),
    "clip": Recipe(
        "CLIP (2103.00020v1 §2): both towers, symmetric contrast", "400M pairs, 32 epochs",
        Numbers(5e-4, 32768, 390000, 2000, weight_decay=0.2, clip=0), Numbers(1.5e-3, 96, 2500, weight_decay=0.05), trained=("vit", "text"), task="clip"),
}
SYSTEMS = {"llava": ("llava-1", "llava-2"), "llava-1.5": ("llava-1.5-1", "llava-1.5-2"), "blip2": ("blip2-1", "blip2-2"),
           "adapter": ("adapter-1", "adapter-2")}      # a system → its stages, run one after the other


def setting(default, help: str, **kw):
    return field(**({"default_factory": list} if default == [] else {"default": default}), metadata={"help": help, **kw})


@dataclass
class Settings:
    """Every flag of the command line. None means: what the recipe says."""
    recipe: str = setting("", "what to train, see --list; default: the bridge's own recipe")
    scale: str = setting("toy", "whose numbers: toy | paper (optimiser, batch, steps, sizes of the bridge)")
    bridge: str = setting("", f"one of: {', '.join(BRIDGES)}; default: the recipe's, or mlp")
    option: list = setting([], "an option of the bridge, name=value; may be repeated", nargs="+", action="extend")
    data: str = setting(None, 'kind[:path][:split], see README; several with weights: "coco:DIR + interleaved:DIR * 0.2"')
    share: float = setting(100.0, "percent of the data set to train on, the same items for the same seed (document 1's 1 %%)")
    examples: int = setting(0, "if not 0: only the first so many items, over and over")
    lm: str = setting(f"{WEIGHTS}/decoder", "the decoder: a folder (Hugging Face or Meta layout) or a name on the hub")
    vit: str = setting(f"{WEIGHTS}/vit", "the ViT: a folder (CLIP, SigLIP) or a name on the hub; random = a new one of the bundled size")
    offline: bool = setting(False, "never touch the network: names on the hub must be in the local cache")
    out: str = setting("", "run folder; default out/<recipe>-<data>")
    init: str = setting("", "run folder to start from: its bridge, and its decoder or ViT where it trained them")
    steps: int = setting(None, "updates")
    minutes: float = setting(0.0, "if not 0: stop after so many minutes of training instead; the schedule follows the clock")
    batch: int = setting(None, "pictures per update, of all processes together")
    accumulate: int = setting(1, "split each batch into so many pieces; changes memory, not the loss")
    turns: int = setting(5, "questions per picture in one document")
    captions: float = setting(None, "share of documents that ask for a caption instead of answers")
    template: str = setting(None, "how a conversation is written, a key of data.TEMPLATES; default: the recipe's, or as the model knows it")
    form: str = setting(None, "order of a multiple choice's parts: QCM-LEA = reasoning first, QCM-ALE = answer first, QCM-A = answer alone")
    longest: int = setting(2048, "longest document in tokens after the images have unfolded; longer ones are cut, and counted")
    lr: float = setting(None, "peak learning rate")
    warmup: float = setting(None, "linear warm-up: a share of the steps, or from 1 on so many steps")
    schedule: str = setting(None, "after the warm-up: cosine | constant | linear")
    weight_decay: float = setting(None, "AdamW's weight decay on matrices")
    beta2: float = setting(None, "AdamW's second beta")
    clip: float = setting(None, "largest gradient norm; 0 = no clipping")
    optimizer: str = setting(None, "adamw | muon")
    ema: float = setting(0.0, "if not 0: save and evaluate the running mean of the trained parameters with this decay, 0.999 say")
    seed: int = setting(0, "of the initial weights and of the data")
    dtype: str = setting("auto", "float32 | bfloat16 (autocast; trained parameters stay float32) | auto")
    frozen: str = setting("auto", "how frozen parts are stored: float32 | bfloat16 | auto (bfloat16 on a GPU that computes in it)")
    device: str = setting("auto", "cpu | cuda | auto")
    threads: int = setting(0, "CPU threads; 0 = PyTorch's choice")
    workers: int = setting(0, "processes that read and decode batches ahead of the step; 0 = none")
    cache: str = setting("", "folder for the frozen ViT's features, computed once per picture and read back from then on")
    pack: bool = setting(False, "put several documents into one row, with walls between them: no padding (prefix bridges, text)")
    checkpoint: bool = setting(False, "recompute the decoder's activations in the backward pass: less memory, about a third more time")
    compile: bool = setting(False, "torch.compile the decoder's layers: the first step takes a minute more, or two")
    shard: bool = setting(False, "under torchrun: parameters, gradients and moments in slices (FSDP2) instead of copies (DDP)")
    log_every: int = setting(50, "steps between two lines")
    check_every: int = setting(0, "steps between two short evaluations; 0 = only at the end")
    save_every: int = setting(250, "steps between two states for --resume")
    samples: int = setting(5, "answers to print at the end")
    eval_items: int = setting(400, "held-out pictures in the final table")
    strict: bool = setting(False, "stop at a broken item of the data set instead of skipping it")


def main(argv: list[str] | None = None) -> nn.Module:
    """Parse, then train: one recipe, or the stages of a system one after the other."""
    asked, resume = settings_from(argv)
    command = " ".join(sys.argv[1:] if argv is None else argv)
    for stage in SYSTEMS.get(asked.recipe, (asked.recipe,)):
        s = asked if resume else with_recipe(asked, stage)
        module = train(s, command, resume)
    return module


def train(s: Settings, command: str = "", resume: bool = False) -> nn.Module:
    # 1. settings --------------------------------------------------------------------------------------------------
    recipe = RECIPES[s.recipe]
    if s.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"              # read by model.fetch and by the hub's own library
    s.lm, s.vit = pinned(s.lm), pinned(s.vit)
    if s.threads:
        torch.set_num_threads(s.threads)
    ranks = Ranks(s)
    device = ranks.device
    dtype, why = pick_dtype(s.dtype, device)
    torch.manual_seed(s.seed)
    out = Path(s.out)
    say = print if ranks.first else lambda *a, **k: None
    say(f"command  python train.py {command}")
    say(f"recipe   {s.recipe}: {recipe.says}")
    say(f"run      {out}   seed {s.seed}   {device}{f' x {ranks.size}' if ranks.size > 1 else ''}   {str(dtype).removeprefix('torch.')} ({why})")

    # 2. data and 3. model: load, freeze, print the table ------------------------------------------------------------
    task = TASKS[recipe.task](s, recipe, ranks)
    task.freeze(recipe.trained, stored := frozen_dtype(s, dtype, device))
    if ranks.first:
        print_modules(task.module)
    forward = ranks.wrap(task, s)
    trained = [(n, p) for n, p in task.module.named_parameters() if p.requires_grad]
    if ranks.rank:                                      # equal weights so far; from here on each process draws its own dropout
        torch.manual_seed(s.seed + ranks.rank)

    # 4. optimiser and schedule --------------------------------------------------------------------------------------
    optimizers = make_optimizers(task.module, trained, s)
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    mean = {n: p.detach().clone() for n, p in trained} if s.ema else {}

    # 5. resume ------------------------------------------------------------------------------------------------------
    step, smooth, spent = 0, None, 0.0
    if resume:
        step, smooth, spent = load_state(ranks, out, trained, optimizers, mean)
        if ranks.first:
            rewind_log(out / "log.jsonl", step)
        say(f"resume   at step {step} of {out}")
    elif ranks.first:
        write_json(out / "config.json", {"settings": dataclasses.asdict(s)})
        for name in ("log.jsonl", "loss.png", "gates.png", "samples.html", "results.json"):     # of an earlier run in this folder
            (out / name).unlink(missing_ok=True)

    # 6. the loop ----------------------------------------------------------------------------------------------------
    task.module.train()
    batches = ahead(task, step, s)
    with eagerly(s), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        work = 0.0 if s.shard else task.work()          # operations per position; where parameters are slices nobody counts
    meter, start = Meter(s.steps, s.minutes, work, getattr(task, "K", 1), ranks.size), time.monotonic() - spent
    bar = tqdm(total=s.steps if not s.minutes else None, initial=step, disable=not (sys.stderr.isatty() and ranks.first), leave=False)
    while True:
        progress = step / s.steps
        if s.minutes:                                   # by the clock of the first process, or one would stop while another goes on
            progress = ranks.collect(min(1.0, (time.monotonic() - start) / (60 * s.minutes)))[0]
        if progress >= 1:
            break
        if step and step % s.save_every == 0:
            save_state(ranks, out, trained, optimizers, mean, step, smooth, time.monotonic() - start)
        if s.check_every and step and step % s.check_every == 0:
            task.module.eval()
            with ranks.aside(forward), torch.autocast(device.type, dtype, enabled=task.mixed):
                check = task.check()
            if ranks.first:
                append(out / "log.jsonl", {"step": step, **check})
                bar.write(f"check  {step:6d}  " + "  ".join(f"{k} {100 * v:.1f}" for k, v in check.items()), file=sys.stdout)
            task.module.train()
        rate = schedule(progress, s.warmup if s.warmup < 1 else s.warmup / s.steps, s.schedule)
        for o, peak in zip(optimizers, peaks):
            for group, lr in zip(o.param_groups, peak):
                group["lr"] = lr * rate

        # ---------------------------------------------------------------------------------------------- the step ---
        pieces = task.ready(next(batches))                                      # `accumulate` parts of one batch, on the device
        scales = ranks.scales(pieces)                                           # λ_m ÷ supervised tokens of the WHOLE update
        loss = torch.zeros((), device=device)
        for i, (piece, scale) in enumerate(zip(pieces, scales)):
            last = i == len(pieces) - 1
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), ranks.quiet(forward, not last):
                part = forward(**piece) * scale                                 # Σ over tokens ÷ tokens of the update
                part.backward()
            loss += part.detach()
        parts = gradient_norms(trained) if step == 0 else ""
        norm = clip_gradients(trained, s.clip)
        loss, norm = ranks.sum(loss), norm.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            save_state(ranks, out, trained, optimizers, mean, step, smooth, time.monotonic() - start)
            raise UserError(f"loss is not finite at step {step} (loss {loss}, gradient norm {norm}; batch: {task.describe(step)}); "
                            f"the state before it is in {out}/state.safetensors; try --lr {s.lr / 3:.0e} or --dtype float32.")
        if step == 0:
            say(f"step 0   loss {loss:.3f}   {task.expect}")
            say(f"gradient {parts}")
            with ranks.aside(forward):
                task.doctor(pieces, scales, out)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        task.after_step()
        for n, p in trained if s.ema else ():
            mean[n].lerp_(p.detach(), 1 - s.ema)                                # m ← β m + (1 − β) θ
        # -----------------------------------------------------------------------------------------------------------

        smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
        meter.add(pieces)
        step += 1
        bar.update()
        if step == 20 and not s.minutes:
            say(meter.forecast(s.steps - step, device))
        if step % s.log_every == 0 or step == 1:
            spent = time.monotonic() - start
            with ranks.aside(forward):
                vitals, details = task.vitals(), task.details()
            line = {"step": step, "loss": loss, "ema": smooth, "grad_norm": norm, "lr": s.lr * rate,
                    **vitals, **meter.rates(device)}
            if ranks.first:
                append(out / "log.jsonl", {**line, "seconds": spent, **details})
                bar.write(meter.line(line, progress if s.minutes else step / s.steps, spent), file=sys.stdout)
    bar.close()
    spent = time.monotonic() - start
    save_state(ranks, out, trained, optimizers, mean, step, smooth, spent)

    # 7. final evaluation and report ---------------------------------------------------------------------------------
    task.module.eval()
    with torch.no_grad():
        for n, p in trained if s.ema else ():
            p.copy_(mean[n])
    ranks.gather(task, stored)                                                  # slices become whole parameters again
    if ranks.first:
        task.save(out, {"settings": dataclasses.asdict(s), "steps": step, "seconds": round(spent, 1),
                        "trained_parameters": sum(p.numel() for n, p in task.module.named_parameters() if p.requires_grad),
                        "training_examples": step * s.batch})
        print(f"\ntrained  {step} steps in {spent / 60:.1f} minutes")
        with eagerly(s), torch.autocast(device.type, dtype, enabled=task.mixed):
            task.report(out)
        with contextlib.suppress(UserError):                                    # without matplotlib a run has no curves, and says nothing
            draw_curves(out)
        print(f"files    {out}/   ({', '.join(sorted(p.name for p in out.iterdir()))})")
    ranks.wait()
    return task.module


# ------------------------------------------------------------------------------------------------------------------
# Tasks: what a batch is, what its loss is, what to write and to report
# ------------------------------------------------------------------------------------------------------------------

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


class AnswerTask(Task):
    """−Σ log p(answer | image, question), through a decoder that is frozen or learns: every recipe but lm, clip and blip2-1."""

    def __init__(self, s: Settings, recipe: Recipe, ranks: Ranks):
        self.s, self.device, self.ranks, self.trained = s, ranks.device, ranks, recipe.trained
        self.sets = [(data.open_data(spec, s.seed, s.strict, s.share / 100), weight) for spec, weight in data_sets(s.data)]
        self.world = self.sets[0][0]                    # the one that is evaluated
        if ranks.size > 1 and s.batch % (ranks.size * len(self.sets)):
            sets = f" of {len(self.sets)} data sets" if len(self.sets) > 1 else ""
            raise UserError(f"--batch {s.batch} does not divide among {ranks.size} processes{sets}; "
                            f"make it a multiple of {ranks.size * len(self.sets)}.")
        self.tokenizer = data.load_tokenizer(resolve(s.lm))
        self.module = self.build()
        self.images = "vit" in recipe.trained           # pixels go into the step, not features
        self.processor = self.module.processor
        self.cache = FeatureCache(s, self.module, ranks.rank) if s.cache and not self.images else None
        self.K = self.unfolded()
        for name in (s.lm, s.vit) if ranks.first and s.vit != "random" else ():
            print_licence(name, resolve(name))
        if s.pack and type(self.module.bridge).prefix is Bridge.prefix:
            raise UserError(f"--pack: a {s.bridge} bridge reaches into the layers, where documents in one row would share its image; "
                            "it packs for prefix bridges only.")
        V = self.module.decoder.config.vocab_size
        self.expect = f"(a uniform guess over the vocabulary: ln {V} = {math.log(V):.2f})"
        self.cut = 0

    def build(self) -> VLM:
        s = self.s
        towers = start_towers(s)
        decoder = load_decoder(resolve(towers["decoder"]), self.device)
        vit = ViT(ViTConfig()).to(self.device) if towers["vit"] == "random" else load_vit(resolve(towers["vit"]), self.device)
        decoder.checkpoint = s.checkpoint
        options = {**(toy_options(s.bridge, s.recipe) if s.scale == "toy" else {}), **parse_options(s.option)}
        bridge = make_bridge(s.bridge, decoder.config, vit.config.width, **options).to(self.device)
        if s.init:
            load_start(bridge, Path(s.init))
        vlm = VLM(vit, bridge, decoder, self.tokenizer.image)
        vlm.processor = data.load_processor(resolve(f"{WEIGHTS}/vit" if s.vit == "random" else s.vit))
        return vlm

    @torch.no_grad()
    def unfolded(self) -> int:
        """K: how many positions one image takes in the decoder."""
        vit, bridge = self.module.vit.config, self.module.bridge
        if type(bridge).prefix is Bridge.prefix:
            return 1
        tokens = vit.tokens - (vit.cls and not bridge.reads_cls)
        return bridge.prefix(bridge.see(next(bridge.parameters()).new_zeros(1, tokens, vit.width))).shape[1]

    def document(self, item: data.Item, index: int) -> data.Document:
        """Captions and answers are learned, everything else is context."""
        rng = np.random.default_rng((self.s.seed, 1, index))
        d = data.lesson(item, self.tokenizer, rng.random() < self.s.captions, self.s.template or None, self.s.form)
        if (places := d.tokens.count(IMAGE)) > len(item.pictures):
            raise UserError(f"{self.s.data}: the text of item {item.id} has {places} <image> for {len(item.pictures)} pictures; repair it.")
        if not any(label != IGNORE for label in d.labels):
            raise UserError(f"{self.s.data}: item {item.id} has nothing to learn: no caption, answer or conversation; choose another split.")
        return d

    def read(self, step: int) -> list[dict]:
        """The pieces of a step, a function of the step alone; each process reads its own slice of every data set's share."""
        pieces = []
        for m, (world, weight) in enumerate(self.sets):
            n = self.s.batch // len(self.sets)
            mine = n // self.ranks.size
            first = step * n + self.ranks.rank * mine
            indices = [i % self.s.examples if self.s.examples else i for i in range(first, first + mine)]
            items = [world.item(i, turns=self.s.turns) for i in indices]
            lessons = [(self.document(item, i), item) for item, i in zip(items, indices)]
            if self.s.accumulate > 1:                                           # rows of similar length share a piece: less padding
                lessons.sort(key=lambda lesson: len(lesson[0].tokens))
            size = math.ceil(mine / self.s.accumulate)
            for k in range(0, mine, size):
                pieces.append(self.piece(lessons[k:k + size], m, weight))
        return pieces

    def piece(self, lessons: list[tuple], m: int, weight: float) -> dict:
        documents = [d for d, _ in lessons]
        self.cut += sum(d.cut(self.s.longest, self.K) for d in documents)
        rows = data.packs(documents, self.s.longest, self.K) if self.s.pack else [[i] for i in range(len(documents))]
        tokens, labels, mask = data.collate([[documents[i] for i in row] for row in rows] if self.s.pack else documents)
        pictures = []                                   # in the order of their places in the rows
        for document, item in (lessons[i] for row in rows for i in row):
            pictures += [(image, f"{m}/{item.id}/{n}") for n, image in enumerate(item.pictures[:document.tokens.count(IMAGE)])]
        size = self.module.vit.config.image_size
        fresh = [n for n, (_, key) in enumerate(pictures) if self.cache is None or key not in self.cache.rows]      # no features yet
        pixels = data.to_pixels([pictures[n][0] for n in fresh], size, self.processor) if fresh else torch.zeros(0, 3, size, size)
        return dict(tokens=tokens, labels=labels, mask=None if mask.dtype == torch.bool and mask.all() else mask, pixels=pixels,
                    keys=[key for _, key in pictures], fresh=fresh, set=m, weight=weight, count=int((labels != IGNORE).sum()))

    def ready(self, pieces: list[dict]) -> list[dict]:
        """On the device; pictures become features unless the ViT learns too."""
        pieces = super().ready(pieces)
        for p in pieces:
            keys, fresh = p.pop("keys"), p.pop("fresh")
            if not self.images:
                p["features"] = self.features(p.pop("pixels"), keys, fresh)
        return pieces

    @torch.no_grad()
    def features(self, pixels: Tensor, keys: list[str], fresh: list[int]) -> Tensor:
        """Features of the pictures named by keys; pixels are those of keys[n] for n in fresh, the others' features are cached."""
        look = lambda pixels: self.module.features(pixels.to(next(self.module.vit.parameters()).dtype))
        return look(pixels) if self.cache is None else self.cache(dict(zip((keys[n] for n in fresh), pixels)), keys, look)

    def loss(self, tokens: Tensor, labels: Tensor, mask: Tensor | None, features: Tensor | None = None, pixels: Tensor | None = None, **_) -> Tensor:
        return self.module.loss(tokens, labels, pixels, mask, features)[0]

    def doctor(self, pieces: list[dict], scales: list[float], out: Path) -> None:
        """What to look at before the evening is spent: is the image used, what is learned, which parts get a gradient?"""
        from PIL import Image
        blind = self.ranks.sum(sum(scale * blind_loss(self.module, p) for p, scale in zip(pieces, scales)))
        counts = self.ranks.collect((sum(p["count"] for p in pieces), sum(p["tokens"].numel() for p in pieces)))
        count, total = map(sum, zip(*counts))
        if not self.ranks.first:
            return
        append(out / "log.jsonl", {"step": 0, "blind": blind})
        print(f"doctor   the decoder without any image: loss {blind:.3f}; {count:,} of {total:,} tokens are learned ({100 * count / total:.0f} %)")
        item = self.world.item(0, turns=self.s.turns)
        for j, image in enumerate(item.pictures[:1]):
            with atomically(out / "first.png") as tmp:
                Image.fromarray(image).save(tmp, "png")
        print(f"first    {out}/first.png, and its text; the second line is what is learned, ~ a blank")
        for line in aligned(self.document(item, 0), self.tokenizer):
            print(f"         {line}")

    def work(self, rows: int = 4) -> float:
        rows, cut = min(rows, math.ceil(self.s.batch / self.s.accumulate)), self.cut           # no more memory than a step takes
        items = [self.world.item(i, turns=self.s.turns) for i in range(rows)]
        piece = self.piece([(self.document(item, i), item) for i, item in enumerate(items)], 0, 1.0)
        self.cut = cut                                  # these documents are counted when they are trained on
        checkpoint, self.module.decoder.checkpoint = self.module.decoder.checkpoint, False      # to compute twice is no more work done
        if self.cache:                                  # the ViT does not run, and what its features are does not matter here
            made = Task.ready(self, [piece | {"features": torch.zeros(len(piece["keys"]), *self.cache.shape, dtype=self.cache.dtype)}])
        flops = operations(lambda: sum(self.loss(**p) for p in (made if self.cache else self.ready([dict(piece)]))), self.module)
        self.module.decoder.checkpoint = checkpoint
        return flops / positions(piece, self.K)

    def vitals(self) -> dict:
        return self.module.bridge.vitals()

    def details(self) -> dict:
        bridge = self.module.bridge
        if not hasattr(bridge, "gates"):
            return {}
        layers = range(bridge.first, self.module.decoder.config.layers, getattr(bridge, "every", 1))
        return {"gates": bridge.gates().tolist(), "layers": list(layers)}       # a row of gates per layer

    def save(self, out: Path, facts: dict) -> None:
        folders = {}
        for part, name in start_towers(self.s).items():                         # a part that learned, or is new, goes into the run
            folders[part] = "" if part in self.trained or name == "random" else portable(name, out)
        save_vlm(self.module, out, facts, folders["vit"], folders["decoder"])
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model") if not folders["decoder"] else ():   # its words go with it
            if (resolve(self.s.lm) / name).exists():
                with atomically(out / "decoder" / name) as tmp:
                    tmp.write_bytes((resolve(self.s.lm) / name).read_bytes())

    def check(self) -> dict:
        items = evaluation.items_of(self.world, self.world.held_out, 100)
        return evaluation.numbers(evaluation.evaluate(self.module, self.tokenizer, items, captions=False))

    def report(self, out: Path) -> None:
        if self.cut:
            print(f"warning: {self.cut} documents were longer than --longest {self.s.longest} and lost their ends", file=sys.stderr)
        try:
            item = data.open_data(held_out(self.world), self.s.seed).item(0)
        except UserError as e:                          # what was trained is saved; only the table has nothing to be made of
            print(f"warning: no final table, {e}", file=sys.stderr)
            return
        if item.image is not None and (item.captions or item.qas):
            return evaluation.report(self.module, self.tokenizer, self.world, out, self.s.eval_items, self.s.samples)
        loss = self.held_out_loss()                     # a conversation, a page or an instruction has no one right answer
        write_json(out / "results.json", {"held-out loss": loss})
        print(f"held-out loss {loss:.3f} on {held_out(self.world)}")

    @torch.no_grad()
    def held_out_loss(self, count: int = 64) -> float:
        """Mean −log p of a learned token on the first items of the split that training does not see."""
        world = data.open_data(held_out(self.world), self.s.seed)
        items = [world.item(i, turns=self.s.turns) for i in range(min(count, len(world)) if isinstance(world, data.Files) else count)]
        pieces = self.ready([self.piece([(self.document(item, i), item)], 0, 1.0) for i, item in enumerate(items)])
        return sum(self.loss(**p).item() for p in pieces) / sum(p["count"] for p in pieces)


class Stage1Task(Task):
    """BLIP-2's first stage: ITC + ITM + ITG of a Q-Former on the frozen ViT (bridges.Stage1), without any decoder."""

    def __init__(self, s: Settings, recipe: Recipe, ranks: Ranks):
        alone(ranks, s)
        self.s, self.device = s, ranks.device
        self.world = data.open_data(s.data, s.seed, s.strict, s.share / 100)
        self.tokenizer = data.load_tokenizer(resolve(s.lm))
        self.module = self.build()
        self.processor = data.load_processor(resolve(start_towers(s)["vit"]))
        B = s.batch
        self.expect = f"(uniform guesses: ITC ln {B} + ITM ln 2 + ITG ln V = {math.log(B) + math.log(2) + math.log(self.tokenizer.vocab_size):.2f})"

    def build(self) -> Stage1:
        s = self.s
        vit = load_vit(resolve(start_towers(s)["vit"]), self.device)
        options = {**(toy_options("qformer", s.recipe) if s.scale == "toy" else {}), **parse_options(s.option)}
        former = make_bridge("qformer", None, vit.config.width, vocab=self.tokenizer.vocab_size, **options)
        self.options = former.options
        return Stage1(vit, former, contrast=min(256, former.queries.shape[1]), dec=self.tokenizer.image).to(self.device)

    def freeze(self, learning, stored) -> None:
        super().freeze(tuple(n for n, _ in self.module.named_children() if n != "vit"), stored)

    def texts(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """(B, T) ids from [CLS] (the tokenizer's bos) to its eos, and the mask."""
        rows = [data.Document(self.tokenizer).add(c).end() for c in captions]
        tokens, _, mask = data.collate(rows)
        return tokens, mask

    def read(self, step: int) -> list[dict]:
        items = [self.world.item(i % self.s.examples if self.s.examples else i) for i in range(step * self.s.batch, (step + 1) * self.s.batch)]
        chosen = [np.random.default_rng((self.s.seed, 1, step, n)).integers(len(item.captions)) for n, item in enumerate(items)]
        tokens, mask = self.texts([item.captions[c] for item, c in zip(items, chosen)])
        pixels = data.to_pixels([i.image for i in items], self.module.vit.config.image_size, self.processor)
        return [dict(pixels=pixels, tokens=tokens, mask=mask, set=0, weight=1.0, count=1)]

    def loss(self, pixels: Tensor, tokens: Tensor, mask: Tensor, **_) -> Tensor:
        with torch.no_grad():
            features = self.module.features(pixels.to(next(self.module.vit.parameters()).dtype))
        self.last = self.module.losses(features, tokens, mask)
        return sum(self.last.values())

    def vitals(self) -> dict:
        return {name: value.item() for name, value in self.last.items()}

    def save(self, out: Path, facts: dict) -> None:
        tensors = {n: p for n, p in self.module.state_dict().items() if not n.startswith("vit.")}
        write_tensors(out / "stage1.safetensors", tensors, {"stage1": "qformer"})
        write_json(out / "config.json", {**facts, "model_type": "stage1", "bridge_options": self.options,
                                         "contrast": len(self.module.image_head.weight), "dec": self.module.dec,
                                         "vit": portable(start_towers(self.s)["vit"], out)})

    @torch.no_grad()
    def check(self) -> dict:
        """Recall@1 of 100 held-out pictures and their captions, both ways, by ITC; a guess finds 1 %."""
        items = [data.open_data(f"{self.world.name}:{self.world.held_out}", self.s.seed).item(i) for i in range(100)]
        tokens, mask = self.texts([item.captions[0] for item in items])
        pixels = data.to_pixels([item.image for item in items], self.module.vit.config.image_size, self.processor)
        similar = self.module.itc(pixels.to(self.device), tokens.to(self.device), mask.to(self.device))
        own = torch.arange(len(items), device=similar.device)
        return {"image to text R@1": (similar.argmax(1) == own).float().mean().item(), "text to image R@1": (similar.argmax(0) == own).float().mean().item()}

    def report(self, out: Path) -> None:
        result = self.check()
        write_json(out / "results.json", result)
        print("retrieve 100 held-out pictures and captions, %: " + "  ".join(f"{k} {100 * v:.0f}" for k, v in result.items()) + "  (a guess: 1)")


class TextTask(Task):
    """Recipe `lm`: the decoder alone, on worded scenes, questions and answers (data.ShapesText)."""

    def __init__(self, s: Settings, recipe: Recipe, ranks: Ranks):
        alone(ranks, s)
        self.s, self.device = s, ranks.device
        self.tokenizer = data.shapes_tokenizer()
        config = DecoderConfig(vocab_size=self.tokenizer.vocab_size)
        self.module = nn.ModuleDict({"decoder": (load_decoder(Path(s.init) / "decoder") if s.init else Decoder(config).init_weights())}).to(self.device)
        self.decoder = self.module["decoder"]
        self.text = data.ShapesText(self.tokenizer, seed=s.seed)
        self.vlm = VLM(nn.Module(), WordBag(self.decoder), self.decoder)
        self.expect = f"(a uniform guess over the vocabulary: ln {config.vocab_size} = {math.log(config.vocab_size):.2f})"
        self.pool: dict[int, list] = {}

    def describe(self, step: int) -> str:
        return f"documents of block {step // BLOCK}"

    def read(self, step: int) -> list[dict]:
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
            pieces.append(dict(tokens=tokens, labels=labels, mask=mask, features=bags, set=0, weight=1.0, count=int((labels != IGNORE).sum())))
        return pieces

    def loss(self, tokens: Tensor, labels: Tensor, mask: Tensor, features: Tensor, **_) -> Tensor:
        return self.vlm.loss(tokens, labels, None, mask, features)[0]

    def save(self, out: Path, facts: dict) -> None:
        save_decoder(self.decoder, out / "decoder", bos_token_id=self.tokenizer.bos, eos_token_id=self.tokenizer.eos)
        self.tokenizer.save(out / "decoder")
        write_json(out / "config.json", facts)

    def check(self) -> dict:
        return evaluation.reading(self.decoder, self.tokenizer, 50)

    def report(self, out: Path) -> None:
        """The gate: above 97 % per question type and per number of objects, on scenes told in words (three styles; the fourth apart)."""
        result = evaluation.reading(self.decoder, self.tokenizer, self.s.eval_items)
        other = evaluation.reading(self.decoder, self.tokenizer, self.s.eval_items, ["place"])
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
    """Recipe `clip`: CLIP's symmetric contrast (2103.00020v1, Figure 3), with hard negative captions beside the batch's own."""

    def __init__(self, s: Settings, recipe: Recipe, ranks: Ranks):
        alone(ranks, s)
        self.s, self.device = s, ranks.device
        self.world = data.open_data(s.data, s.seed, s.strict, s.share / 100)
        self.tokenizer = data.shapes_tokenizer() if s.data.startswith("shapes") else data.load_tokenizer(resolve(s.lm))
        size = self.world.size
        vit = ViT(ViTConfig(image_size=size))
        nn.init.normal_(vit.positions, std=0.5)         # at CLIP's 0.01 the patches forget where they are: 0.2 % of their variance,
                                                        # a probe finds the cell of 25 %, and every bridge fails on "where is …?"
        text = TextTransformer(TextConfig(self.tokenizer.vocab_size, context=64, end=self.tokenizer.eos))
        self.module = CLIP(vit, text, width=128).to(self.device)
        self.expect = f"(a uniform guess: (ln {3 * s.batch} + ln {s.batch})/2 = {(math.log(3 * s.batch) + math.log(s.batch)) / 2:.2f})"

    def freeze(self, learning, stored) -> None:
        pass

    def read(self, step: int) -> list[dict]:
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
        return [dict(pixels=pixels, tokens=tokens, set=0, weight=1.0, count=1)]

    def loss(self, pixels: Tensor, tokens: Tensor, **_) -> Tensor:
        """½ (CE over the texts of each image + CE over the images of each true text); the hard negatives only add texts."""
        S = self.module(pixels, tokens).float()                                 # (B, B + negatives)
        target = torch.arange(len(S), device=S.device)
        return (F.cross_entropy(S, target) + F.cross_entropy(S[:, :len(S)].T, target)) / 2      # (I4)

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


TASKS = {"answer": AnswerTask, "stage1": Stage1Task, "lm": TextTask, "clip": ClipTask}


# ------------------------------------------------------------------------------------------------------------------
# Below the fold: what is not the method
# ------------------------------------------------------------------------------------------------------------------

class Step(nn.Module):
    """A task's loss as a forward, which is what DistributedDataParallel, FSDP2 and torch.compile hook into."""

    def __init__(self, task: Task):
        super().__init__()
        self.module, self.task = task.module, task

    def forward(self, **piece) -> Tensor:
        """The loss. Every parameter outside the decoder takes part, if only with 0: texts without a picture leave some
        of a bridge's without a gradient, and processes that add up their gradients must all bring the same ones."""
        learns = (p for n, p in self.module.named_parameters() if p.requires_grad and not n.startswith("decoder."))
        return self.task.loss(**piece) + 0 * sum(p.sum() for p in learns)


class Ranks:
    """The processes that torchrun started, or this one alone. Each reads its own slice of a batch; sums go over all of them."""

    def __init__(self, s: Settings):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.s, self.first, self.sharded = s, self.rank == 0, s.shard
        device = ("cuda" if torch.cuda.is_available() else "cpu") if s.device == "auto" else s.device
        self.device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and self.size > 1 else device)
        if s.shard and self.size == 1:
            raise UserError("--shard slices parameters over processes, and this is one; start several: "
                            "torchrun --nproc-per-node 2 train.py …")
        if self.size > 1 and not torch.distributed.is_initialized():            # once for all stages of a system
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            day = timedelta(days=1)                     # the others wait while the first one evaluates
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=day)

    def wrap(self, task: Task, s: Settings) -> nn.Module:
        """The loss as a module: gradients averaged over processes (DDP), or layers and all that learns in slices (FSDP2)."""
        step, decoder = Step(task), getattr(task.module, "decoder", None)
        layers = decoder.layers if decoder is not None else []
        if s.compile:                                   # one graph for all layers, unless a bridge has blocks of its own there
            torch._dynamo.config.recompile_limit = 8 + 2 * len(layers)
            for layer in layers:
                layer.compile(dynamic=True)             # of any length: no second compilation at the second batch
        if s.shard:                                     # a layer is whole while it runs, what else learns during the whole step
            from torch.distributed.fsdp import fully_shard
            mesh = torch.distributed.init_device_mesh(self.device.type, (self.size,))
            for layer in layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(step, mesh=mesh, ignored_params={p for p in step.parameters() if not p.requires_grad})
        elif self.size > 1:
            return nn.parallel.DistributedDataParallel(step)
        return step

    @contextlib.contextmanager
    def aside(self, forward: nn.Module):
        """For what looks at the module beside the step, an evaluation say: slices outside the layers are put together
        meanwhile. Every process must take part, because layers in slices are still put together where they run."""
        with eagerly(self.s):
            if self.sharded:
                forward.unshard()
            yield
            if self.sharded:
                forward.reshard()

    def quiet(self, forward: nn.Module, on: bool):
        """No traffic for a piece that is not the last of its update."""
        if self.sharded:
            forward.set_requires_gradient_sync(not on)
        return forward.no_sync() if on and self.size > 1 and not self.sharded else contextlib.nullcontext()

    def scales(self, pieces: list[dict]) -> list[float]:
        """What each piece's summed loss is multiplied with: Σ_m λ_m (Σ over the tokens of data set m) ÷ (their number everywhere).

        DDP and FSDP2 average gradients over processes, so each process's share counts `size` times.
        """
        counts = torch.zeros(1 + max(p["set"] for p in pieces), dtype=torch.float64, device=self.device)
        for p in pieces:
            counts[p["set"]] += p["count"]
        if self.size > 1:
            torch.distributed.all_reduce(counts)
        return [self.size * p["weight"] / max(counts[p["set"]].item(), 1) for p in pieces]

    def sum(self, loss: Tensor) -> float:
        if self.size > 1:
            torch.distributed.all_reduce(loss)
        return loss.item() / self.size

    def collect(self, value) -> list:
        """The value of every process, by rank."""
        values = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def gather(self, task: Task, stored: torch.dtype) -> None:
        """Slices become whole parameters again, on the first process, in a module without FSDP2's hooks."""
        if self.sharded:
            tensors = host(dict(task.module.named_parameters()), self.first)
        if self.sharded and self.first:
            task.module = task.build()
            task.freeze(task.trained, stored)
            task.module.load_state_dict(tensors)
            task.module.eval()

    def wait(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


def eagerly(s: Settings):
    """Layers compiled for training run as they are written: to generate is to meet a new length with every token."""
    return torch.compiler.set_stance("force_eager") if s.compile else contextlib.nullcontext()


def alone(ranks: Ranks, s: Settings) -> None:
    if ranks.size > 1:
        raise UserError(f"recipe {s.recipe} draws or contrasts a batch as a whole, so it runs in one process; "
                        "start it without torchrun.")


def ahead(task: Task, step: int, s: Settings):
    """The batches of step, step + 1, … on the CPU; with workers, other processes read them ahead and pin them for the GPU."""
    if not s.workers:
        return map(task.read, itertools.count(step))
    steps = type("Steps", (), {"__getitem__": lambda self, i: task.read(i)})()
    return iter(torch.utils.data.DataLoader(steps, sampler=range(step, 2**40), batch_size=None, num_workers=s.workers,
                                            pin_memory=task.device.type == "cuda"))


class FeatureCache:
    """Features of the frozen ViT, computed once per picture: rows of one file, read back through the memory map.

    The file is named by everything that a feature depends on: the ViT's weights and config, the hidden state that is read, and the data
    set with its seed. Rows are appended; `.ids` names the picture of each row, and a row counts once its line there is complete.
    """

    def __init__(self, s: Settings, vlm: VLM, rank: int = 0):
        digest = hashlib.sha256(repr((vlm.vit.config, vlm.bridge.reads_layer, vlm.bridge.reads_cls, s.data, s.seed, s.frozen, s.dtype)).encode())
        for p in vlm.vit.parameters():
            digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
        tokens = vlm.vit.config.tokens - (vlm.vit.config.cls and not vlm.bridge.reads_cls)
        self.shape, self.dtype, self.device = (tokens, vlm.vit.config.width), p.dtype, p.device
        self.bytes = math.prod(self.shape) * self.dtype.itemsize                # of one picture
        folder = Path(s.cache)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{digest.hexdigest()[:16]}-{rank}.features"
        self.names = self.file.with_suffix(".ids")
        lines = self.names.read_text(encoding="utf-8").splitlines(True) if self.names.exists() else []
        self.rows = {line.rstrip("\n"): n for n, line in enumerate(lines) if line.endswith("\n")}

    def __call__(self, pixels: dict[str, Tensor], keys: list[str], look) -> Tensor:
        """Features (m, N, Di) of the pictures named by keys; `look` computes those that are new from their pixels (3, S, S)."""
        new = [key for key in dict.fromkeys(keys) if key not in self.rows]
        if new:
            fresh = look(torch.stack([pixels[key] for key in new])).to(self.dtype)
            with open(self.file, "ab") as f:
                f.truncate(len(self.rows) * self.bytes)                         # what a crash left behind
                f.write(fresh.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            with open(self.names, "a", encoding="utf-8") as f:
                f.writelines(f"{key}\n" for key in new)
            self.rows |= {key: len(self.rows) + n for n, key in enumerate(new)}
        if not keys:
            return torch.zeros(0, *self.shape, dtype=self.dtype, device=self.device)
        held = np.memmap(self.file, np.uint8, "r", shape=(len(self.rows), self.bytes))
        rows = torch.from_numpy(held[[self.rows[key] for key in keys]])         # (m, bytes): a copy of these rows
        return rows.view(self.dtype).view(-1, *self.shape).to(self.device)


def held_out(world) -> str:
    return f"{world.name}:{world.held_out}"


def data_sets(spec: str) -> list[tuple[str, float]]:
    """"coco:DIR + interleaved:DIR * 0.2" → [("coco:DIR", 1.0), ("interleaved:DIR", 0.2)]."""
    sets = []
    for part in spec.split(" + "):
        name, star, weight = part.strip().rpartition(" * ")
        try:
            sets.append((name.strip(), float(weight)) if star else (part.strip(), 1.0))
        except ValueError:
            raise UserError(f'--data "{spec}": the weight "{weight}" is no number; write "SPEC + SPEC * 0.2".') from None
    return sets


def start_towers(s: Settings) -> dict[str, str]:
    """Where the towers come from: the run of --init where it trained them, else --lm and --vit ("random": a new ViT)."""
    held = lambda part: s.init and (Path(s.init) / part / "config.json").exists()
    return {part: str(Path(s.init) / part) if held(part) else name for part, name in (("decoder", s.lm), ("vit", s.vit))}


def load_start(bridge: Bridge, run: Path) -> None:
    """A bridge begins as another run's; after blip2-1 it is that Q-Former without its text branch, and only the projection is new."""
    if not (run / "stage1.safetensors").exists():
        return load_bridge_file(bridge, run / "bridge.safetensors", next(bridge.parameters()).device)
    file = Checkpoint(run / "stage1.safetensors")
    with torch.no_grad():
        for n, p in bridge.named_parameters():
            if not n.startswith("project."):
                if file.missing(f"qformer.{n}") or file.shape(f"qformer.{n}") != tuple(p.shape):
                    raise UserError(f'{file.path}: tensor "qformer.{n}" of shape {tuple(p.shape)} is not there; the run was another Q-Former.')
                p.copy_(file.get(f"qformer.{n}"))


def toy_options(bridge: str, recipe: str) -> dict:
    """The toy sizes of a bridge: the recipe's own where that is its bridge, else those of the bridge's recipe."""
    r = RECIPES[recipe] if RECIPES[recipe].bridge == bridge else RECIPES.get(bridge)
    return r.options if r else {}


@torch.no_grad()
def blind_loss(vlm: VLM, piece: dict) -> Tensor:
    """The summed loss of a piece for the decoder alone: what a bridge that says nothing would score."""
    tokens, labels, mask = piece["tokens"], piece["labels"], piece["mask"]
    inputs, labels = VLM(vlm.vit, Bridge(), vlm.decoder).prepare(tokens, tokens.new_zeros(int((tokens == IMAGE).sum()), 0, 0), mask, labels)
    return next_token_loss(vlm.decoder, labels, **inputs)[0]


def positions(piece: dict, K: int) -> int:
    """Positions that a piece fills in the decoder, padding included: an image takes K of them."""
    images = int((piece["tokens"] == IMAGE).sum())
    return piece["tokens"].numel() + images * (K - 1)


def operations(loss, module: nn.Module) -> float:
    """Floating-point operations of the matrix products in one forward and backward of `loss()`, counted as they are executed.

    So a frozen ViT counts its forward, or nothing where its features are cached; a frozen decoder its forward and the gradients of its
    activations, not of its weights: 4 operations per parameter and position where training it takes 6. The gradients of `module` stay as they are.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    with torch.random.fork_rng(), FlopCounterMode(display=False) as counter:    # dropout's draws stay the run's own
        torch.autograd.grad(loss(), trained, allow_unused=True)
    return float(counter.get_total_flops())


def gradient_norms(trained) -> str:
    """|g| of each part, two names deep: a part that is stuck at zero is seen at the first step."""
    norms: dict[str, float] = {}
    for n, p in trained:
        if p.grad is not None:
            name = ".".join(n.split(".")[:2])
            norms[name] = norms.get(name, 0.0) + whole(p.grad.float().square().sum()).item()
    return "  ".join(f"{name} {math.sqrt(v):.2g}" for name, v in norms.items())


def aligned(document: data.Document, tokenizer, width: int = 110) -> list[str]:
    """Tokens in one line, below each what is learned there (a blank is ~), in pairs of lines of at most `width` columns."""
    say = lambda t: "<image>" if t == IMAGE else "" if t == IGNORE else tokenizer.decode([t], special=True).replace(" ", "~").replace("\n", "↵")
    lines, top, low = [], "", ""
    for t, l in zip(document.tokens, document.labels):
        n = max(len(say(t)), len(say(l))) + 1
        if top and len(top) + n > width:
            lines, top, low = [*lines, top, low], "", ""
        top, low = top + say(t).ljust(n), low + say(l).ljust(n)
    return [*lines, top, low]


def clip_gradients(trained, limit: float) -> Tensor:
    """The norm of all gradients together, which are scaled down to `limit` where it is larger (0: never)."""
    norm = nn.utils.clip_grad_norm_([p for _, p in trained], limit or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def schedule(progress: float, warmup: float, kind: str = "cosine", floor: float = 0.02) -> float:
    """A factor of the peak rate: linear warm-up over the first share of the run, then half a cosine down to `floor`, or as named."""
    if progress < warmup:
        return max(progress / warmup, 0.02)
    rest = (progress - warmup) / (1 - warmup)
    return {"cosine": floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * rest)), "constant": 1.0, "linear": 1 - rest}[kind]


def make_optimizers(module: nn.Module, trained: list[tuple[str, nn.Parameter]], s: Settings) -> list[torch.optim.Optimizer]:
    """AdamW with decay on matrices only. Muon: matrices of Linear layers by Muon, the rest by AdamW.

    Muon is what gets a tiny decoder off the plateau where it knows the words of a scene but not which belong together
    (measured: AdamW stayed there for thousands of steps). On slices (--shard) it is exact but slow: each of its matrix
    products puts them together.
    """
    fused, numbers = trained[0][1].device.type == "cuda", numbers_of(s)
    if s.optimizer == "muon":
        linear = {id(m.weight) for m in module.modules() if isinstance(m, nn.Linear)}
        matrices = [p for _, p in trained if id(p) in linear]
        rest = [p for _, p in trained if id(p) not in linear]
        return [torch.optim.Muon(matrices, lr=numbers.muon_lr * s.lr / numbers.lr, weight_decay=s.weight_decay),
                torch.optim.AdamW(rest, lr=s.lr, betas=(0.9, s.beta2), weight_decay=0.0, fused=fused)]
    groups = [{"params": [p for _, p in trained if p.ndim >= 2], "weight_decay": s.weight_decay},
              {"params": [p for _, p in trained if p.ndim < 2], "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, s.beta2), fused=fused)]


def numbers_of(s: Settings) -> Numbers:
    return RECIPES[s.recipe].paper if s.scale == "paper" else RECIPES[s.recipe].toy


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a slice (every process must ask at once)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def host(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copies on the CPU, slices put together one after the other; who does not keep them gets none."""
    full = ((n, whole(t.detach())) for n, t in tensors.items())
    return {n: t.to("cpu", copy=True) for n, t in full if keep}


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A full tensor cut as `other` is."""
    if not hasattr(other, "full_tensor"):
        return tensor
    return torch.distributed.tensor.distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def save_state(ranks: Ranks, out: Path, trained, optimizers, mean: dict, step: int, smooth: float | None, spent: float) -> None:
    """Everything the next step depends on, in one safetensors file: parameters, optimiser moments, means, random state, counters."""
    tensors = {f"parameter.{n}": p for n, p in trained} | {f"mean.{n}": p for n, p in mean.items()}
    for i, o in enumerate(optimizers):
        for j, state in o.state_dict()["state"].items():
            tensors.update({f"optimizer.{i}.{j}.{k}": v for k, v in state.items() if isinstance(v, Tensor)})
    tensors = host(tensors, ranks.first)
    on_gpu = {"cuda": torch.cuda.get_rng_state(ranks.device)} if ranks.device.type == "cuda" else {}
    random = ranks.collect({"cpu": torch.get_rng_state(), **on_gpu})
    tensors.update({f"random.{rank}.{k}": state for rank, states in enumerate(random) for k, state in states.items()})
    if ranks.first:
        write_tensors(out / "state.safetensors", tensors, {"step": str(step), "smooth": repr(smooth), "spent": repr(spent)})


def load_state(ranks: Ranks, out: Path, trained, optimizers, mean: dict) -> tuple[int, float | None, float]:
    """What save_state wrote, into its places; the number of processes may be another one."""
    file = out / "state.safetensors"
    if not file.exists():
        raise UserError(f"{file}: no state was saved before this run ended; start it again without --resume.")
    halves = (*out.glob(".*.safetensors.*"), *out.glob(".tmp*"))                # of a save that was killed
    for rest in halves if ranks.first else ():
        rest.unlink(missing_ok=True)
    checkpoint = Checkpoint(file)
    with torch.no_grad():
        for n, p in trained:
            p.copy_(like(checkpoint.get(f"parameter.{n}"), p))
        for n, m in mean.items():
            m.copy_(like(checkpoint.get(f"mean.{n}"), m))
    for i, o in enumerate(optimizers):
        state: dict[int, dict] = {}
        owners = [p for group in o.param_groups for p in group["params"]]
        for name in checkpoint.where:
            kind, *rest = name.split(".")
            if kind == "optimizer" and rest[0] == str(i):
                value, owner = checkpoint.get(name), owners[int(rest[1])]
                state.setdefault(int(rest[1]), {})[rest[2]] = like(value, owner) if value.shape == owner.shape else value
        o.load_state_dict({**o.state_dict(), "state": state})
    on_gpu = lambda state: torch.cuda.set_rng_state(state, ranks.device)
    for kind, restore in (("cpu", torch.set_rng_state), ("cuda", on_gpu)):
        if (name := f"random.{ranks.rank}.{kind}") in checkpoint.where:
            restore(checkpoint.get(name))
    facts = checkpoint.files[file].metadata()
    return int(facts["step"]), None if facts["smooth"] == "None" else float(facts["smooth"]), float(facts["spent"])


def rewind_log(file: Path, step: int) -> None:
    """Drop what was logged after the state (it is written again), and a last line that a crash cut off."""
    kept = [json.dumps(x) + "\n" for x in read_log(file) if x["step"] <= step]
    with atomically(file) as tmp:
        tmp.write_text("".join(kept), encoding="utf-8")


def read_log(file: Path) -> list[dict]:
    """The whole lines of a log.jsonl: the last one may be half written."""
    lines = file.read_text(encoding="utf-8").splitlines(True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def draw_curves(out: Path) -> None:
    """log.jsonl as pictures: loss.png and, of a gated bridge, gates.png. Needs matplotlib."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure            # not pyplot: no window, no state shared with a caller
        from matplotlib.ticker import LogLocator
    except ImportError:
        raise UserError("curves are drawn by matplotlib, which is not installed; pip install matplotlib.") from None
    s, log = read_json(out / "config.json")["settings"], read_log(out / "log.jsonl")
    lines = [x for x in log if "loss" in x]
    if not lines:
        raise UserError(f"{out}/log.jsonl: no step is logged, so nothing can be drawn; wait for the run's first line.")
    steps, across = [x["step"] for x in lines], f"step (one update: batch of {s['batch']})"
    figures = {"loss.png": (loss := Figure((8, 5.5), layout="constrained"))}
    top, below = loss.subplots(2, sharex=True, height_ratios=(3, 1))
    top.plot(steps, [x["loss"] for x in lines], ".-", color="tab:blue", alpha=0.3, label="loss of one batch")
    top.plot(steps, [x["ema"] for x in lines], color="tab:blue", linewidth=2, label="running mean, over about 50 steps")
    for x in [x for x in log if "blind" in x][-1:]:
        top.axhline(x["blind"], color="tab:red", linestyle="--", label="blind: the decoder without images, at step 0")
    per = " per learned token" if RECIPES[s["recipe"]].task in ("answer", "lm") else ""
    top.set(ylabel=f"loss (nats{per})", yscale="log")
    top.yaxis.set(major_locator=LogLocator(subs=(1, 1.5, 2, 3, 5, 7)), major_formatter="{x:g}", minor_formatter="")
    top.legend()
    below.plot(steps, [x["lr"] for x in lines], color="tab:green")
    below.set(xlabel=across, ylabel="learning rate")
    if "gates" in lines[-1]:
        heads, layers = s["bridge"] == "zero_init", lines[-1]["layers"]
        values = np.abs([x["gates"] for x in lines])    # (lines, layers, H), or (…, attention and feed-forward)
        parts = [("attention", values)] if heads else zip(("cross-attention", "feed-forward"), np.split(values, 2, 2))
        figures["gates.png"] = gates = Figure((10, 4.2), layout="constrained")
        axes = gates.subplots(1, 2, sharey=not heads)
        for axis, (title, part) in zip(axes, parts):
            axis.set_prop_cycle(color=colormaps["viridis"](np.linspace(0, 0.9, len(layers))))
            lined = axis.plot(steps, part.mean(-1), ".-")                       # a line per layer
            axis.set(title=title, xlabel=across, ylabel="|gate|, 0 = shut" + heads * "; mean of heads", ylim=(0, None))
        gates.legend(lined, [f"layer {n}" for n in layers], loc="outside left center", ncols=1 + len(layers) // 17)
        if heads:
            rows, columns = (range(0, n, 1 + n // 16) for n in values.shape[1:])        # at most 16 numbers
            gates.colorbar(axes[1].imshow(values[-1], aspect="auto", vmin=0), label="|gate|")
            axes[1].set(title=f"after step {steps[-1]}", xlabel="head", ylabel="layer", xticks=columns, yticks=rows)
            axes[1].set_yticklabels([layers[n] for n in rows])
    for name, figure in figures.items():
        figure.suptitle(f"{out.resolve().name}: {s['bridge'] or s['recipe']} on {s['data']}")
        with atomically(out / name) as tmp:
            figure.savefig(tmp, format="png", dpi=120)


PEAKS = {               # of dense bfloat16 products, operations a second, as the makers publish them; an unknown card has no MFU
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}


def peak_of(device: torch.device) -> float:
    """Operations a second that this device's maker promises in bfloat16; 0 where we do not know it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for card, peak in PEAKS.items() if card in name), 0.0)


class Meter:
    """Rates since the last line, and the line itself."""

    def __init__(self, steps: int, minutes: float, work: float = 0.0, K: int = 1, processes: int = 1):
        self.steps, self.minutes, self.processes = steps, minutes, processes
        self.work, self.K = work, K                     # operations of a step per position of the decoder (Task.work), positions of an image
        self.tokens = self.learned = self.images = self.positions = self.passed = 0
        self.since = self.begin = time.monotonic()

    def add(self, pieces: list[dict]) -> None:
        """Of one process; the others have read as many rows, of about this length."""
        self.tokens += self.processes * sum(p["tokens"].numel() for p in pieces)
        self.learned += self.processes * sum(p["count"] for p in pieces)
        self.images += self.processes * sum(len(p["tokens"]) for p in pieces)
        self.positions += self.processes * sum(positions(p, self.K) for p in pieces)

    def forecast(self, left: int, device: torch.device) -> str:
        """After 20 steps: how long the rest takes, and on a GPU how much memory it needs."""
        seconds = (time.monotonic() - self.begin) / 20
        peak = f", {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB at the peak" if device.type == "cuda" else ""
        end = time.strftime("%H:%M", time.localtime(time.time() + left * seconds))
        work = self.work * (self.passed + self.positions) / 20 / 1e12
        work = f"; {work:.2g} TFLOP a step, {work / seconds:.2g} TFLOP/s" if work else ""
        return f"forecast {seconds:.2f} s a step: {left * seconds / 60:.1f} more minutes, until {end}{peak}{work}"

    def rates(self, device: torch.device) -> dict:
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = max(time.monotonic() - self.since, 1e-9)
        rates = {"tokens_per_s": self.tokens / seconds, "learned_per_s": self.learned / seconds, "images_per_s": self.images / seconds}
        if device.type == "cuda":
            rates["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if self.work:                                   # model FLOPs utilisation: operations that the method needs ÷ what the cards could do
            rates["tflop_per_s"] = self.work * self.positions / seconds / 1e12
            rates |= {"mfu": 1e12 * rates["tflop_per_s"] / peak / self.processes} if (peak := peak_of(device)) else {}
        self.passed += self.positions
        self.tokens = self.learned = self.images = self.positions = 0
        self.since = time.monotonic()
        return rates

    def line(self, x: dict, progress: float, spent: float) -> str:
        """At most 120 characters: enough to judge the health of a run and to plan the evening."""
        eta = int(spent / max(progress, 1e-6) * (1 - progress))
        step = f"{x['step']:6d}/{self.steps}" if not self.minutes else f"{x['step']:6d}"
        extra = "".join(f"  {k} {x[k]:.3f}" for k in ("gate", "scale") if k in x)
        memory = f"  {x['memory_gb']:.1f} GB" if "memory_gb" in x else ""
        memory += f"  mfu {100 * x['mfu']:.0f}%" if "mfu" in x else ""
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


def frozen_dtype(s: Settings, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """How frozen parts are stored: on a GPU as they are computed with; a CPU keeps float32, where the toys' tables were measured."""
    if s.frozen not in ("auto", "float32", "bfloat16"):
        raise UserError(f'unknown --frozen "{s.frozen}"; known: auto, float32, bfloat16.')
    return (dtype if device.type == "cuda" else torch.float32) if s.frozen == "auto" else getattr(torch, s.frozen)


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
    """model.fetch, with a word about the bundled towers."""
    if path.startswith(f"{WEIGHTS}/") and not (Path(path).is_dir() or (HERE / path).is_dir()):
        raise UserError(f"{path}: no such folder; make the bundled towers again: python train.py --recipe lm and --recipe clip.")
    return fetch(path)


def portable(name: str, out: Path) -> str:
    """How a run's config.json names a tower: by its name on the hub, inside the run, beside this file, or where it is."""
    if not Path(name).is_dir() and is_hub_name(name):
        return name
    folder = resolve(name).resolve()
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
    parser.add_argument("--curves", metavar="RUN", help="draw loss.png and gates.png of this run folder from its log.jsonl")
    parser.add_argument("--list", action="store_true", help="print the recipes")
    try:
        args, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as e:
        raise UserError(f"{e}; see python train.py --help.") from None
    if unknown:
        flags = ["--" + f.name.replace("_", "-") for f in fields] + ["--resume", "--curves", "--list"]
        raise UserError(f'unknown argument "{unknown[0]}"; {nearest(unknown[0], flags)}')
    if args.list:
        print_recipes()
        raise SystemExit(0)
    if folder := args.resume or args.curves:
        config = read_json(Path(folder) / "config.json")
        if "settings" not in config:
            raise UserError(f'{folder}/config.json: "settings" is missing, so this is no run of train.py; give the folder of one.')
        if args.curves:
            draw_curves(Path(folder))
            raise SystemExit(0)
        return Settings(**{**config["settings"], "out": args.resume}), True
    s = Settings(**{f.name: getattr(args, f.name) for f in fields})
    s.recipe = s.recipe or s.bridge or "mlp"
    if s.recipe not in RECIPES and s.recipe not in SYSTEMS:
        kind, known = ("recipe", {**RECIPES, **SYSTEMS}) if args.recipe else ("bridge", BRIDGES)
        raise UserError(f'unknown {kind} "{s.recipe}"; {nearest(s.recipe, known)}')
    for name, known in (("bridge", ["", *BRIDGES]), ("scale", ["toy", "paper"]), ("template", [None, *data.TEMPLATES]),
                        ("schedule", [None, "cosine", "constant", "linear"]), ("optimizer", [None, "adamw", "muon"])):
        if getattr(s, name) not in known:
            raise UserError(f'unknown {name} "{getattr(s, name)}"; {nearest(getattr(s, name), list(filter(None, known)))}')
    for name in ("steps", "batch", "accumulate", "turns", "log_every", "save_every", "eval_items"):
        if getattr(s, name) is not None and getattr(s, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(s, name)}: must be at least 1.")
    return s, False


def with_recipe(s: Settings, name: str) -> Settings:
    """The settings with everything that the command line left open taken from the recipe."""
    r, system = RECIPES[name], s.recipe != name
    filled = {k: v for k, v in dataclasses.asdict(r.paper if s.scale == "paper" else r.toy).items() if hasattr(s, k)}
    filled |= {"captions": r.captions, "template": r.template, "form": r.form, "data": r.toy_data}
    s = dataclasses.replace(s, recipe=name, bridge=s.bridge or r.bridge, **{k: v for k, v in filled.items() if getattr(s, k) is None})
    if s.batch is None:
        raise UserError(f"the paper's batch of {name} is not in our sources; give --batch beside --scale paper.")
    folder = lambda recipe: f"{s.out}/{recipe}" if s.out and system else f"out/{recipe}-{re.split('[: ]', s.data)[0]}"
    s.out, start = (s.out if s.out and not system else folder(name)), folder(r.start)
    if r.start and not s.init:
        if not Path(start).is_dir():
            raise UserError(f"recipe {name} starts from a run of {r.start}, and there is none at {start}; train that first, give --init RUN, "
                            "or --init none to start fresh.")
        s.init = start
    s.init = "" if s.init == "none" else s.init
    return s


def print_recipes() -> None:
    for name, r in RECIPES.items():
        learns = " + ".join(r.trained) if r.bridge else "everything"
        print(f"{name}" + (f"   (bridge {r.bridge}; learns: {learns}" + (f"; after {r.start}" if r.start else "") + ")" if r.bridge else ""))
        for column, n, where in (("paper", r.paper, r.data), ("toy  ", r.toy, r.toy_data)):
            muon = f"Muon {n.muon_lr:g}, " if n.optimizer == "muon" else ""
            warm = f"{n.warmup:,.0f} warm-up steps" if n.warmup >= 1 else f"{100 * n.warmup:g} % warm-up"
            print(f"    {column}  {muon}AdamW {n.lr:g} (0.9, {n.beta2:g}), wd {n.weight_decay:g}, {n.schedule}, {warm}, clip {n.clip or 'none'}, "
                  f"batch {n.batch or '? (not in our sources)'}, {n.steps:,} steps on {where}")
        print(f"    {r.says}" + (f"; toy sizes: {', '.join(f'{k}={v}' for k, v in r.options.items())}" if r.options else ""))
    for name, stages in SYSTEMS.items():
        print(f"{name}\n    {', then '.join(stages)}")


def run(main_function) -> None:
    """A user's mistake is one sentence on stderr and exit code 2; anything else is a bug and shows its traceback."""
    try:
        main_function()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except UserError as e:
        if int(os.environ.get("RANK", 0)):              # where the first process says the same, torchrun ends this one meanwhile
            time.sleep(5)
        print(str(e), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    run(main)
