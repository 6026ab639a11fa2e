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
import math
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
from eval import evaluate, first_items, report_run, scalar_scores
from model import Bridge, IGNORE, IMAGE, VLM, ViT, ViTConfig
from papers import ALL_BRIDGES, make_bridge
from papers.blip2_stage1 import Stage1Task
from papers.clip import ClipTask
from papers.recipe import Numbers, Recipe, Task
from support.formats.chat import TEMPLATES
from support.formats.checkpoint import Checkpoint
from support.formats.files import UserError, atomically, nearest, read_json, write_json
from support.formats.hub import fetch, is_hub_name, pin_revision, print_licence
from support.formats.llama import load_decoder
from support.formats.pictures import load_processor
from support.formats.tokenizer_files import load_tokenizer
from support.formats.vision import load_vit
from support.formats.vlm import load_bridge_file, save_vlm
from support.plumbing.cli import parse_options, run_cli
from support.plumbing.curves import draw_curves
from support.plumbing.device import frozen_dtype, pick_dtype
from support.plumbing.doctor import align_tokens, blind_loss, gradient_norms, print_modules
from support.plumbing.features import FeatureCache
from support.plumbing.log import append_line, rewind_log
from support.plumbing.meter import Meter, count_flops, count_positions
from support.plumbing.ranks import Ranks, eager_layers, prefetch
from support.plumbing.state import load_state, save_state
from support.worlds import open_data
from support.worlds.files import Files
from support.worlds.text import TextTask

HERE = Path(__file__).parent
WEIGHTS = "weights"                                     # the bundled backbones: weights/decoder, weights/vit
MUON = dict(optimizer="muon")

# The bundled ViT is probed at layer −2, so every toy bridge reads it there.
LINEAR_OPTIONS, MLP_OPTIONS = dict(reads=-2), dict(reads=-2)
QFORMER_OPTIONS = dict(reads=-2, queries=16, width=128, layers=2, heads=4, hidden=512, dropout=0.0)
ZERO_INIT_OPTIONS = dict(reads=-2, prompts=16, adapted=4, version=2, width=128, depth=2, heads=4)
LLAVA_NUMBERS = dict(weight_decay=0.0, warmup=0.03, beta2=0.999, clip=1.0)
ADAPTER_NUMBERS = dict(weight_decay=0.02, warmup=0.4, beta2=0.95, clip=0)      # 2 of 5 epochs warm up
RECIPES = {
    "linear": Recipe(
        "LLaVA stage 1 (2304.08485v2 §4.2): W learns, log p(answer)", "CC3M, 595K pairs, 1 epoch", Numbers(2e-3, 128, 4650, **LLAVA_NUMBERS),
        Numbers(6e-3, 64, 1600), "linear", options=LINEAR_OPTIONS),
    "mlp": Recipe(
        "LLaVA-1.5 stage 1 (2310.03744v2 §3): the MLP learns", "LCS-558K, 1 epoch", Numbers(1e-3, 256, 2180, **LLAVA_NUMBERS),
        Numbers(6e-3, 64, 1000), "mlp", options=MLP_OPTIONS),
    "mapl": Recipe(
        "MAPL (2210.07179v2 §3.3): the mapper learns", "CC-clean, 374K captions: 2,922 steps are an epoch, early stopping says how many",
        Numbers(3e-4, 128, 2922, 1500, "constant", 0.01, 0.95, 0), Numbers(2e-3, 64, 800, **MUON), "mapl",
        options=dict(reads=-2, constants=16, width=128, layers=2, heads=4)),
    "qformer": Recipe(
        "BLIP-2 stage 2 without stage 1 (2301.12597v3 §3.3): the Q-Former learns", "129M pairs",
        Numbers(1e-4, 1920, 80000, 2000, weight_decay=0.05, clip=0), Numbers(2e-3, 64, 1200, **MUON), "qformer", options=QFORMER_OPTIONS),
    "zero_init": Recipe(
        "LLaMA-Adapter with images (2303.16199v3 §3.3): prompts, gates and projection learn", "ScienceQA, 5 epochs",
        Numbers(2.25e-3, 64, 1000, **ADAPTER_NUMBERS), Numbers(3e-3, 64, 1000, **MUON), "zero_init", options=ZERO_INIT_OPTIONS),
    "flamingo": Recipe(
        "Flamingo (2204.14198v2 §2.4): resampler and gated blocks learn; Σ_m λ_m E_m, one update for all data sets",
        "M3W * 1.0, ALIGN * 0.2, LTIP * 0.2, VTP * 0.03", Numbers(1e-4, None, 500000, 5000, "constant", 0.1, 0.999), Numbers(2e-3, 64, 1000, **MUON),
        "flamingo", options=dict(reads=-2, every=1, latents=16, depth=2, heads=4, head_width=32)),
    "flamingo-mixture": Recipe(
        "Flamingo's weighted sum on two toy data sets: single pictures and interleaved pages", "M3W * 1.0, ALIGN * 0.2, LTIP * 0.2, VTP * 0.03",
        Numbers(1e-4, None, 500000, 5000, "constant", 0.1, 0.999), Numbers(2e-3, 64, 1000, **MUON), "flamingo",
        options=dict(reads=-2, every=1, latents=16, depth=2, heads=4, head_width=32), toy_data="shapes + shapes-pages * 0.5"),

    "idefics": Recipe(
        "IDEFICS 9B: resampler, gated blocks and the new words learn", "OBELICS, LAION, Wikipedia, PMD; 1.3M tokens a batch",
        Numbers(1e-5, 1280, 200000, 2000, weight_decay=0.1, beta2=0.999), Numbers(2e-3, 64, 1000, **MUON), "idefics",
        options=dict(reads=-2, every=1, latents=16, depth=2, resampler_heads=4, resampler_head_width=32)),

    "llava-1": Recipe(
        "LLaVA stage 1, captions alone: W learns to align", "CC3M, 595K pairs, 1 epoch", Numbers(2e-3, 128, 4650, **LLAVA_NUMBERS),
        Numbers(6e-3, 64, 400), "linear", options=LINEAR_OPTIONS, captions=1.0, template="plain"),
    "llava-2": Recipe(
        "LLaVA stage 2 (§4.2): W and the decoder learn from conversations", "Instruct-158K, 3 epochs", Numbers(2e-5, 32, 14800, **LLAVA_NUMBERS),
        Numbers(1e-3, 64, 400), "linear", ("bridge", "decoder"), options=LINEAR_OPTIONS, start="llava-1"),
    "llava-1.5-1": Recipe(
        "LLaVA-1.5 stage 1, captions alone: the MLP learns to align", "LCS-558K, 1 epoch", Numbers(1e-3, 256, 2180, **LLAVA_NUMBERS),
        Numbers(6e-3, 64, 400), "mlp", options=MLP_OPTIONS, captions=1.0, template="plain"),
    "llava-1.5-2": Recipe(
        "LLaVA-1.5 stage 2: MLP and decoder learn from academic VQA and conversations", "mix-665K, 1 epoch", Numbers(2e-5, 128, 5200, **LLAVA_NUMBERS),
        Numbers(1e-3, 64, 400), "mlp", ("bridge", "decoder"), options=MLP_OPTIONS, start="llava-1.5-1"),
    "frozen": Recipe(
        "Frozen (2106.13884v2 §3.2): the vision encoder and its map to 2 tokens learn THROUGH the frozen decoder", "CC3M, 3.3M pairs",
        Numbers(3e-4, 128, 39000, 1, "constant", 0.0, 0.95, 0), Numbers(2e-3, 64, 1000, **MUON), "frozen", ("bridge", "vit"),
        options=dict(reads=-1, tokens=2)),
    "blip2-1": Recipe(
        "BLIP-2 stage 1 (§3.2): ITC + ITM + ITG, no decoder", "129M pairs", Numbers(1e-4, 2320, 250000, 2000, weight_decay=0.05, clip=0),
        Numbers(1e-3, 64, 600), "qformer", task="stage1", options=QFORMER_OPTIONS),
    "blip2-2": Recipe(
        "BLIP-2 stage 2 (§3.3): the Q-Former of stage 1 learns to prompt the frozen decoder", "129M pairs",
        Numbers(1e-4, 1920, 80000, 2000, weight_decay=0.05, clip=0), Numbers(2e-3, 64, 800, **MUON), "qformer", options=QFORMER_OPTIONS, start="blip2-1"),
    "adapter-1": Recipe(
        "LLaMA-Adapter (§3.1, §4.1): prompts and gates learn instructions without pictures", "Alpaca-52K, 5 epochs",
        Numbers(2.25e-3, 64, 4060, **ADAPTER_NUMBERS), Numbers(3e-3, 64, 200, **MUON), "zero_init", options=ZERO_INIT_OPTIONS, template="alpaca", toy_data="shapes-words"),
    "adapter-2": Recipe(
        "LLaMA-Adapter (§3.3): prompts, gates and projection learn from pictures", "ScienceQA, 5 epochs",
        Numbers(2.25e-3, 64, 1000, **ADAPTER_NUMBERS), Numbers(3e-3, 64, 1000, **MUON), "zero_init", options=ZERO_INIT_OPTIONS, template="alpaca", form="QCM-A",
        start="adapter-1"),
    "adapter-rand": Recipe(
        "LLaMA-Adapter's ablation (§4.4, Table 6): gates at random instead of zero", "ScienceQA, 5 epochs",
        Numbers(2.25e-3, 64, 1000, **ADAPTER_NUMBERS), Numbers(3e-3, 64, 1000, **MUON), "zero_init", options={**ZERO_INIT_OPTIONS, "gate_init": "random"},
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
    bridge: str = setting("", f"one of: {', '.join(ALL_BRIDGES)}; default: the recipe's, or mlp")
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
    s.lm, s.vit = pin_revision(s.lm), pin_revision(s.vit)
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
    batches = prefetch(task, step, s)
    with eager_layers(s), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
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
                append_line(out / "log.jsonl", {"step": step, **check})
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
                append_line(out / "log.jsonl", {**line, "seconds": spent, **details})
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
        with eager_layers(s), torch.autocast(device.type, dtype, enabled=task.mixed):
            task.report(out)
        with contextlib.suppress(UserError):                                    # without matplotlib a run has no curves, and says nothing
            draw_curves(out)
        print(f"files    {out}/   ({', '.join(sorted(p.name for p in out.iterdir()))})")
    ranks.wait()
    return task.module


class AnswerTask(Task):
    """−Σ log p(answer | image, question), through a decoder that is frozen or learns: every recipe but lm, clip and blip2-1."""

    def __init__(self, s: Settings, recipe: Recipe, ranks: Ranks):
        self.s, self.device, self.ranks, self.trained = s, ranks.device, ranks, recipe.trained
        self.sets = [(open_data(spec, s.seed, s.strict, s.share / 100), weight) for spec, weight in data_sets(s.data)]
        self.world = self.sets[0][0]                    # the one that is evaluated
        if ranks.size > 1 and s.batch % (ranks.size * len(self.sets)):
            sets = f" of {len(self.sets)} data sets" if len(self.sets) > 1 else ""
            raise UserError(f"--batch {s.batch} does not divide among {ranks.size} processes{sets}; "
                            f"make it a multiple of {ranks.size * len(self.sets)}.")
        self.tokenizer = load_tokenizer(resolve_folder(s.lm))
        self.module = self.build()
        self.images = "vit" in recipe.trained           # pixels go into the step, not features
        self.processor = self.module.processor
        self.cache = FeatureCache(s, self.module, ranks.rank) if s.cache and not self.images else None
        self.K = self.unfolded()
        for name in (s.lm, s.vit) if ranks.first and s.vit != "random" else ():
            print_licence(name, resolve_folder(name))
        if s.pack and not self.module.bridge.soft_tokens:
            raise UserError(f"--pack: a {s.bridge} bridge reaches into the layers, where documents in one row would share its image; "
                            "it packs for prefix bridges only.")
        V = self.module.decoder.config.vocab_size
        self.expect = f"(a uniform guess over the vocabulary: ln {V} = {math.log(V):.2f})"
        self.cut = 0

    def build(self) -> VLM:
        s = self.s
        towers = start_towers(s)
        decoder = load_decoder(resolve_folder(towers["decoder"]), self.device)
        vit = ViT(ViTConfig()).to(self.device) if towers["vit"] == "random" else load_vit(resolve_folder(towers["vit"]), self.device)
        decoder.checkpoint = s.checkpoint
        options = {**(toy_options(s.bridge, s.recipe) if s.scale == "toy" else {}), **parse_options(s.option)}
        bridge = make_bridge(s.bridge, decoder.config, vit.config.width, **options).to(self.device)
        if s.init:
            load_start(bridge, Path(s.init))
        vlm = VLM(vit, bridge, decoder, self.tokenizer.image)
        vlm.processor = load_processor(resolve_folder(f"{WEIGHTS}/vit" if s.vit == "random" else s.vit))
        return vlm

    @torch.no_grad()
    def unfolded(self) -> int:
        """K: how many positions one image takes in the decoder."""
        vit, bridge = self.module.vit.config, self.module.bridge
        if not bridge.soft_tokens:
            return 1
        tokens = vit.tokens - (vit.cls and not bridge.reads_cls)
        return bridge.prefix(bridge.see(next(bridge.parameters()).new_zeros(1, tokens, vit.width))).shape[1]

    def document(self, item: data.Item, index: int) -> data.Document:
        """Captions and answers are learned, everything else is context."""
        rng = np.random.default_rng((self.s.seed, 1, index))
        d = data.training_document(item, self.tokenizer, rng.random() < self.s.captions, TEMPLATES.get(self.s.template), self.s.form)
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
        rows = data.pack_documents(documents, self.s.longest, self.K) if self.s.pack else [[i] for i in range(len(documents))]
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
        append_line(out / "log.jsonl", {"step": 0, "blind": blind})
        print(f"doctor   the decoder without any image: loss {blind:.3f}; {count:,} of {total:,} tokens are learned ({100 * count / total:.0f} %)")
        item = self.world.item(0, turns=self.s.turns)
        for j, image in enumerate(item.pictures[:1]):
            with atomically(out / "first.png") as tmp:
                Image.fromarray(image).save(tmp, "png")
        print(f"first    {out}/first.png, and its text; the second line is what is learned, ~ a blank")
        for line in align_tokens(self.document(item, 0), self.tokenizer):
            print(f"         {line}")

    def work(self, rows: int = 4) -> float:
        rows, cut = min(rows, math.ceil(self.s.batch / self.s.accumulate)), self.cut           # no more memory than a step takes
        items = [self.world.item(i, turns=self.s.turns) for i in range(rows)]
        piece = self.piece([(self.document(item, i), item) for i, item in enumerate(items)], 0, 1.0)
        self.cut = cut                                  # these documents are counted when they are trained on
        checkpoint, self.module.decoder.checkpoint = self.module.decoder.checkpoint, False      # to compute twice is no more work done
        if self.cache:                                  # the ViT does not run, and what its features are does not matter here
            made = Task.ready(self, [piece | {"features": torch.zeros(len(piece["keys"]), *self.cache.shape, dtype=self.cache.dtype)}])
        flops = count_flops(lambda: sum(self.loss(**p) for p in (made if self.cache else self.ready([dict(piece)]))), self.module)
        self.module.decoder.checkpoint = checkpoint
        return flops / count_positions(piece, self.K)

    def vitals(self) -> dict:
        gates = self.module.bridge.gates()
        return {} if gates is None else {"gate": gates.abs().mean().item()}

    def details(self) -> dict:
        bridge, gates = self.module.bridge, self.module.bridge.gates()
        return {} if gates is None else {"gates": gates.tolist(), "layers": bridge.gated_layers}   # a row per layer

    def save(self, out: Path, facts: dict) -> None:
        folders = {}
        for part, name in start_towers(self.s).items():                         # a part that learned, or is new, goes into the run
            folders[part] = "" if part in self.trained or name == "random" else portable_name(name, out)
        save_vlm(self.module, out, facts, folders["vit"], folders["decoder"])
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model") if not folders["decoder"] else ():   # its words go with it
            if (resolve_folder(self.s.lm) / name).exists():
                with atomically(out / "decoder" / name) as tmp:
                    tmp.write_bytes((resolve_folder(self.s.lm) / name).read_bytes())

    def check(self) -> dict:
        items = first_items(self.world, self.world.held_out, 100)
        return scalar_scores(evaluate(self.module, self.tokenizer, items, captions=False))

    def report(self, out: Path) -> None:
        if self.cut:
            print(f"warning: {self.cut} documents were longer than --longest {self.s.longest} and lost their ends", file=sys.stderr)
        try:
            item = open_data(held_out_spec(self.world), self.s.seed).item(0)
        except UserError as e:                          # what was trained is saved; only the table has nothing to be made of
            print(f"warning: no final table, {e}", file=sys.stderr)
            return
        if item.image is not None and (item.captions or item.qas):
            return report_run(self.module, self.tokenizer, self.world, out, self.s.eval_items, self.s.samples)
        loss = self.held_out_loss()                     # a conversation, a page or an instruction has no one right answer
        write_json(out / "results.json", {"held-out loss": loss})
        print(f"held-out loss {loss:.3f} on {held_out_spec(self.world)}")

    @torch.no_grad()
    def held_out_loss(self, count: int = 64) -> float:
        """Mean −log p of a learned token on the first items of the split that training does not see."""
        world = open_data(held_out_spec(self.world), self.s.seed)
        items = [world.item(i, turns=self.s.turns) for i in range(min(count, len(world)) if isinstance(world, Files) else count)]
        pieces = self.ready([self.piece([(self.document(item, i), item)], 0, 1.0) for i, item in enumerate(items)])
        return sum(self.loss(**p).item() for p in pieces) / sum(p["count"] for p in pieces)


TASKS = {"answer": AnswerTask, "stage1": Stage1Task, "lm": TextTask, "clip": ClipTask}


def held_out_spec(world) -> str:
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


def resolve_folder(path: str) -> Path:
    """model.fetch, with a word about the bundled towers."""
    if path.startswith(f"{WEIGHTS}/") and not (Path(path).is_dir() or (HERE / path).is_dir()):
        raise UserError(f"{path}: no such folder; make the bundled towers again: python train.py --recipe lm and --recipe clip.")
    return fetch(path)


def portable_name(name: str, out: Path) -> str:
    """How a run's config.json names a tower: by its name on the hub, inside the run, beside this file, or where it is."""
    if not Path(name).is_dir() and is_hub_name(name):
        return name
    folder = resolve_folder(name).resolve()
    for base in (out.resolve(), HERE.resolve()):
        if folder.is_relative_to(base):
            return str(folder.relative_to(base))
    return str(folder)


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
        kind, known = ("recipe", {**RECIPES, **SYSTEMS}) if args.recipe else ("bridge", ALL_BRIDGES)
        raise UserError(f'unknown {kind} "{s.recipe}"; {nearest(s.recipe, known)}')
    for name, known in (("bridge", ["", *ALL_BRIDGES]), ("scale", ["toy", "paper"]), ("template", [None, *TEMPLATES]),
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


if __name__ == "__main__":
    run_cli(main)
