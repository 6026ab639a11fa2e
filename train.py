"""train.py: the hand-written loop; what differs between the papers is data, in one table of recipes.

    python train.py                                     a bridge between the bundled towers: 3 to 6 minutes
    python train.py --bridge qformer --steps 2000       another bridge, for longer
    python train.py --recipe llava                      a paper's system: llava-1, then llava-2
    python train.py --recipe flamingo --data "shapes + shapes-pages * 0.5"      a weighted sum of data sets
    python train.py --lm FOLDER --data emoji --bridge mapl      a real LLaMA-style model, real drawings
    python train.py --recipe lm | clip                  make the bundled towers again
    python train.py --resume out/RUN                    go on after Ctrl-C or a crash, to the same bits
    torchrun --nproc-per-node 8 train.py …              the same losses from several processes
    python train.py --list                              the recipes, the papers' numbers beside ours

A run folder holds config.json, bridge.safetensors, log.jsonl, results.json, samples.html, state.safetensors
(for --resume), and with matplotlib loss.png and gates.png. One run at a time uses it; a new one cleans it.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from support.plumbing.stop import Stop, end_at_once, stoppable

if __name__ == "__main__":
    end_at_once()                   # Ctrl-C while the next lines load: no traceback

import numpy as np
import torch
from torch import Tensor, nn

import data
import papers
from eval import evaluate, generate_texts, report_run, scalar_scores
from model import Bridge, IGNORE, IMAGE, VLM
from papers import ALL_BRIDGES, make_bridge, nearest, refuse_unread_options, systems
from papers.recipe import MUON, Ingredients, Numbers, Recipe, Task
from papers.systems import SYSTEMS, print_recipes
from support.formats.benchmarks import scienceqa_text
from support.formats.chat import TEMPLATES, choose_template
from support.formats.files import UserError, at_the_door, write_json
from support.formats.hub import pin_revision, print_licence
from support.formats.towers import LOADERS, WEIGHTS, resolve_folder, save_answer_run, start_bridge
from support.plumbing.cli import parse_options, parse_weighted, run_cli, setting
from support.plumbing.curves import draw_curves
from support.plumbing.device import frozen_dtype, pick_dtype
from support.plumbing.digest import data_digest, parts_digest
from support.plumbing.doctor import advise_at_end, first_look, gate_details, gradient_norms, print_modules
from support.plumbing.features import FeatureCache
from support.plumbing.folder import clean_folder, owned
from support.plumbing.log import rewind_log
from support.plumbing.meter import (Meter, Progress, count_flops, count_positions, report_end, report_saved,
                                    track)
from support.plumbing.optimizers import clip_gradients, make_optimizers, schedule
from support.plumbing.packing import pack_documents, require_room
from support.plumbing.ranks import Ranks, prefetch
from support.plumbing.start import (fill_settings, read_by_none, read_command, refuse_unread, settings_digest,
                                    stages)
from support.plumbing.state import TrainState, load_state, require_finite, save_state
from support.worlds import has_answers, open_data, open_split, reader, take_items, text, unread_settings
from support.worlds.files import fit_size
from support.worlds.pairs import require_captions
from support.worlds.things import FROM_WORLDS, take_turns
from support.worlds.trained import data_digests, earlier_sets, name_split, report_broken


# The recipes: the paper's numbers, then the toy's -----------------------------------------------------------

# The bundled ViT is probed at layer −2, so every toy bridge reads it there.
RECIPES = {
    "linear": Recipe(
        "LLaVA stage 1 (2304.08485v2 §4.2): W learns, log p(answer)", "CC3M, 595K pairs, 1 epoch",
        Numbers(2e-3, 128, 4650, **systems.LLAVA),
        Numbers(6e-3, 64, 1600), "linear", options=systems.LINEAR_OPTIONS),
    "mlp": Recipe(
        "LLaVA-1.5 stage 1 (2310.03744v2 §3): the MLP learns", "LCS-558K, 1 epoch",
        Numbers(1e-3, 256, 2180, **systems.LLAVA),
        Numbers(6e-3, 64, 1000), "mlp", options=systems.MLP_OPTIONS),
    "mapl": Recipe(
        "MAPL (2210.07179v2 §3.3): the mapper learns",
        "CC-clean, 374K captions: 2,922 steps are an epoch, early stopping says how many",
        Numbers(3e-4, 128, 2922, 1500, "constant", 0.01, 0.95, 0),
        Numbers(2e-3, 64, 800, **MUON), "mapl",
        options=dict(reads=-2, constants=16, width=128, layers=2, heads=4)),
    "qformer": Recipe(
        "BLIP-2 stage 2 without stage 1 (2301.12597v3 §3.3): the Q-Former learns", "129M pairs",
        Numbers(1e-4, 1920, 80000, 2000, **systems.BLIP2),
        Numbers(2e-3, 64, 1200, **MUON), "qformer", options=systems.QFORMER_OPTIONS),
    "zero_init": Recipe(
        "LLaMA-Adapter (2303.16199v3), images as V2's (2304.15010v1): prompts, gates, visual queries learn",
        f"ScienceQA, {systems.ADAPTER_RATE}", Numbers(2.25e-3, 64, 1000, **systems.ADAPTER),
        Numbers(3e-3, 64, 1000, **MUON), "zero_init", options=systems.ZERO_INIT_OPTIONS,
        paper_options=systems.ADAPTER_V1),
    "flamingo": Recipe(
        "Flamingo (2204.14198v2 §2.4): resampler and gated blocks learn; "
        "Σ_m λ_m E_m, one update for all data sets", **systems.FLAMINGO),
    **papers.RECIPES, **reader.RECIPES,
}


# The settings -----------------------------------------------------------------------------------------------

@dataclass
class Settings:
    """Every flag of the command line. None means: what the recipe says."""
    recipe: str = setting("", "a recipe or a system, see --list; without it the bridge's own",
                          "what to train")
    bridge: str = setting("", "without it the recipe's, or mlp", choices=ALL_BRIDGES)
    option: list = setting([], "an option of the bridge; may be repeated", nargs="+", action="extend",
                           metavar="NAME=VALUE")
    scale: str = setting("toy", "whose numbers for optimiser, batch, steps, bridge", choices=("toy", "paper"))
    lm: str = setting(f"{WEIGHTS}/decoder",
                      "decoder: a folder (Hugging Face or Meta layout), a name on the hub")
    vit: str = setting(f"{WEIGHTS}/vit",
                       "ViT: a folder (CLIP, SigLIP), a name on the hub, or random: a new one")
    offline: bool = setting(False, "never use the network: names on the hub must be in the local cache")
    init: str = setting("", "run folder to start from: its bridge, and its towers where it trained them")
    out: str = setting("", "run folder; without it out/RECIPE-DATA")

    data: str = setting(None, 'KIND[:PATH][:SPLIT]; several: "coco:DIR + interleaved:DIR * 0.2"', "data")
    share: float = setting(100.0, "percent of the data set to train on", above=0, most=100)
    examples: int = setting(0, "only the first N items, over and over", least=0)
    turns: int = setting(None, "questions per picture in one document", least=1, most=1000)
    captions: float = setting(None, "share of documents that ask for a caption", least=0, most=1)
    template: str = setting(None, "how a conversation is written, instead of as the model knows it",
                            choices=tuple(TEMPLATES))
    form: str = setting(None, "multiple choice: QCM-LEA reasons first, QCM-ALE answer first, QCM-A alone")
    longest: int = setting(2048, "longest document, in tokens; longer ones are cut", least=2, most=10**7)
    augment: bool = setting(False, "new renderings: place, scale, turn, mirror, tint, background")
    follow_links: bool = setting(False, "read pictures behind links that leave their data set's folder, too")
    strict: bool = setting(False, "stop at a broken item of the data set instead of skipping it")

    steps: int = setting(None, "updates", "optimiser (without a flag: the recipe's)", least=1, most=10**9)
    batch: int = setting(None, "pictures per update, of all processes together", least=1, most=10**5)
    accumulate: int = setting(1, "pieces of a batch: less memory, the same loss", least=1, most=10**5)
    lr: float = setting(None, "peak learning rate", above=0, most=1000)
    warmup: float = setting(None, "share of the steps, or from 1 on so many steps", least=0, most=10**9)
    schedule: str = setting(None, "after the warm-up", choices=("cosine", "constant", "linear"))
    weight_decay: float = setting(None, "AdamW's weight decay on matrices", least=0, most=100)
    beta2: float = setting(None, "AdamW's second beta", least=0, below=1)
    clip: float = setting(None, "largest gradient norm; 0 = no clipping", least=0)
    optimizer: str = setting(None, "for matrices of linear layers", choices=("adamw", "muon"))
    ema: float = setting(0.0, "decay of a running mean of the parameters, 0.999 say", least=0, below=1)
    seed: int = setting(0, "of the initial weights and of the data", least=0)

    device: str = setting("auto", "cpu, cuda, mps (untested) or auto", "devices, speed and memory")
    dtype: str = setting("auto", "float32, bfloat16 (autocast; trained parameters stay float32) or auto")
    frozen: str = setting("auto", "frozen parts are stored in float32, bfloat16 or auto (bfloat16 on a GPU)")
    threads: int = setting(0, "CPU threads; 0 = PyTorch's choice", least=0, most=1024)
    workers: int = setting(0, "processes that read and decode batches ahead of the step", least=0, most=256)
    cache: str = setting("", "folder for the frozen ViT's features, computed once per picture and read back")
    pack: bool = setting(False, "several documents per row, walls between them: no padding (prefix bridges)")
    checkpoint: bool = setting(False, "recompute the decoder's activations: less memory, a third more time")
    compile: bool = setting(False, "torch.compile the decoder's layers: the first step takes a minute or two")
    shard: bool = setting(False, "under torchrun: parameters in slices (FSDP2) instead of copies (DDP)")

    log_every: int = setting(50, "steps between two lines", "what a run prints and keeps", least=1)
    check_every: int = setting(0, "steps between two short evaluations; 0 = only at the end", least=0)
    save_every: int = setting(250, "steps between two states for --resume", least=1)
    tensorboard: bool = setting(False, "write the log for TensorBoard, too (pip install tensorboard)")
    samples: int = setting(5, "pictures with answers to print at the end", least=0, most=10**5)
    eval_items: int = setting(400, "held-out pictures in the final table", least=1, most=10**6)


def main(argv: list[str] | None = None) -> nn.Module:
    """Parse, then train: one recipe, or the stages of a system one after the other."""
    asked, resume = settings_from(argv)
    command = shlex.join(sys.argv[1:] if argv is None else argv)
    for s, *commands in [(asked,)] if resume else stages(asked, command, RECIPES, SYSTEMS):
        with owned(Path(s.out)), stoppable(Path(s.out), *commands) as stop:
            module = train(s, stop, command, resume)
    return module


# The loop ---------------------------------------------------------------------------------------------------

def train(s: Settings, stop: Stop, command: str = "", resume: bool = False) -> nn.Module:
    # 1. settings --------------------------------------------------------------------------------------------
    recipe = RECIPES[s.recipe]
    s.lm, s.vit = pin_revision(s.lm), pin_revision(s.vit)
    if s.threads:
        torch.set_num_threads(s.threads)
    ranks = Ranks(s.device, s.compile, s.shard)
    device, out = ranks.device, Path(s.out)
    dtype, reason = pick_dtype(s.dtype, device)
    autocast = functools.partial(torch.autocast, device.type, dtype)
    mixed = dtype != torch.float32                      # the loss is computed under autocast
    torch.manual_seed(s.seed)
    if ranks.first:
        print(f"command  python train.py {command}\nrecipe   {s.recipe}: {recipe.summary}")
        print(f"run      {out}   seed {s.seed}   {device}{f' x {ranks.size}' if ranks.size > 1 else ''}   "
              f"{str(dtype).removeprefix('torch.')} ({reason})")

    # 2. data ------------------------------------------------------------------------------------------------
    sets = [(open_data(spec, s.seed, s.strict, s.share / 100, s.follow_links, "train" * s.augment), weight)
            for spec, weight in parse_weighted(s.data)]
    facts = {"settings": dataclasses.asdict(s), **data_digests(s.data, [world for world, _ in sets])}
    ranks.require_divisible(s.batch, len(sets))

    # 3. model: load, freeze, print the table ----------------------------------------------------------------
    stored = frozen_dtype(s.frozen, dtype, device)
    make_task = functools.partial(load_task, s, recipe, ranks, sets, stored)
    task = make_task()
    if ranks.first:
        for name in (s.lm, s.vit) if isinstance(task, AnswerTask) and s.vit != "random" else ():
            print_licence(name, resolve_folder(name))
        print_modules(task.module)
    forward = ranks.wrap(task.module, task.loss)
    trained = [(n, p) for n, p in task.module.named_parameters() if p.requires_grad]
    if ranks.rank:                                      # equal weights so far; dropout differs from here on
        torch.manual_seed(s.seed + ranks.rank)

    # 4. optimiser and schedule ------------------------------------------------------------------------------
    optimizers = make_optimizers(task.module, trained, s, recipe.numbers(s.scale))
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    warmup = s.warmup if s.warmup < 1 else s.warmup / s.steps
    mean = {n: p.detach().clone() for n, p in trained} if s.ema else {}
    identity = {"settings": settings_digest(s), "data": data_digest(sets, task), "weights": task.frozen}
    state = TrainState(trained, optimizers, mean | task.memory(), identity)

    # 5. resume ----------------------------------------------------------------------------------------------
    seconds = 0.0                                       # of training, over all starts of the run
    if resume:
        load_state(state, ranks, out)
        if ranks.first:
            seconds = rewind_log(out / "log.jsonl", state.step)
            print(f"resume   at step {state.step} of {out}")
    elif ranks.first:
        clean_folder(out, RECIPES, (s.init, s.lm, s.vit, *(getattr(w, "path", "") for w, _ in sets)))
        write_json(out / "config.json", facts)

    # 6. the loop --------------------------------------------------------------------------------------------
    task.module.train()
    batches = prefetch(task.batch, state.step, s.workers, pin=device.type == "cuda")
    with ranks.eager_layers(), autocast(enabled=mixed):
        flops = 0.0 if s.shard else task.flops_per_position()                   # slices are not counted
    meter = Meter(s.steps, flops, task.visual_tokens, ranks.size)
    progress = Progress(out / "log.jsonl", meter, state.step, seconds, ranks.first, s.tensorboard)
    stop.hold()                                         # from here on a signal waits for the end of a step
    while state.step < s.steps:
        step, new = state.step, state.step != state.saved           # not new: the step of a resumed state
        if s.check_every and step and step % s.check_every == 0 and new:
            task.module.eval()
            with ranks.unsharded(forward), autocast(enabled=task.mixed):
                progress.check(step, task.check)
            task.module.train()
        rate = schedule(step / s.steps, warmup, s.schedule, recipe.numbers(s.scale).floor)
        for o, peak in zip(optimizers, peaks):
            for group, lr in zip(o.param_groups, peak):
                group["lr"] = lr * rate
        state.keep_random(device)

        # --------------------------------------------------------------------------------------- the step ---
        pieces = task.to_device(next(batches))          # `accumulate` parts of one batch
        scales = ranks.loss_scales(pieces)              # λ_m ÷ supervised tokens of the WHOLE update
        loss = torch.zeros((), device=device)
        for i, (piece, scale) in enumerate(zip(pieces, scales)):
            last = i == len(pieces) - 1
            with autocast(enabled=mixed), ranks.sync_gradients(forward, last):
                part = forward(**piece) * scale         # Σ over tokens ÷ tokens of the update
                part.backward()
            loss += part.detach()
        norms = gradient_norms(trained) if step == 0 else ""
        norm = clip_gradients(trained, s.clip).item()
        loss = ranks.average(loss)
        require_finite(state, s, task.describe_batch, loss, norm)
        if step == 0 and new:
            if ranks.first:
                print(f"step 0   loss {loss:.3f}   {task.expect}\ngradient {norms}")
            with ranks.unsharded(forward):
                task.first_step(pieces, scales, out, loss)
        asked = ranks.any(stop.asked > 0)
        if asked or new and step % s.save_every == 0:   # its loss is finite, its update yet to come
            save_state(state, ranks, out)
        if asked:
            raise KeyboardInterrupt
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        task.after_step()
        for n, p in trained if s.ema else ():
            mean[n].lerp_(p.detach(), 1 - s.ema)        # m ← β m + (1 − β) θ
        # ----------------------------------------------------------------------------------------------------

        state.smooth_loss = loss if state.smooth_loss is None else 0.98 * state.smooth_loss + 0.02 * loss
        state.step = step = step + 1
        if progress.step(step, pieces, device, s.log_every):
            with ranks.unsharded(forward):
                metrics, details = task.metrics(), task.log_details()
            progress.line({"step": step, "loss": loss, "ema": state.smooth_loss, "grad_norm": norm,
                           "lr": s.lr * rate, **metrics}, details, device)
    require_finite(state, s, task.describe_batch)       # the last update, too
    seconds = round(progress.close(), 1)
    report_broken(sets)
    state.keep_random(device)
    save_state(state, ranks, out)
    stop.release()

    # 7. final evaluation and report -------------------------------------------------------------------------
    with torch.no_grad():
        for n, p in trained if s.ema else ():
            p.copy_(mean[n])
    task.module = ranks.gather_module(task.module, lambda: make_task().module).eval()
    if ranks.first:
        facts |= {"steps": state.step, "training_examples": state.step * s.batch, "seconds": seconds,
                  "trained_parameters": sum(p.numel() for p in task.module.parameters() if p.requires_grad)}
        task.save(out, facts)
        report_saved(out, state.step, seconds)
        with ranks.eager_layers(), autocast(enabled=task.mixed):
            for name, content in task.report(out).items():
                write_json(out / name, content)
        with contextlib.suppress(UserError):            # without matplotlib a run has no curves
            draw_curves(out, per_token=recipe.task in PER_TOKEN)
        report_end(out)
    ranks.barrier()
    return task.module


# The answer task --------------------------------------------------------------------------------------------

class AnswerTask(Task):
    """−Σ log p(answer | image, question), through a decoder that is frozen or learns.

    Every recipe with a bridge and a decoder. Takes vit, bridge, decoder, tokenizer, processor.
    """
    splits = True

    def __init__(self, given: Ingredients, s: Settings, ranks: Ranks, sets: list[tuple]):
        if s.pack and not given.bridge.soft_tokens:
            raise UserError(f"--pack: a {s.bridge} bridge reaches into the layers, where documents in one "
                            "row would share its image; it packs for prefix bridges only.")
        self.given, self.s, self.ranks, self.sets = given, s, ranks, sets
        self.world, self.tokenizer = given.world, given.tokenizer
        self.template = choose_template(s.template, self.tokenizer) if s.template else None    # None: its own
        self.module = VLM(given.vit, given.bridge, given.decoder, self.tokenizer.image)
        self.module.processor = given.processor
        self.choice_text = functools.partial(scienceqa_text, form=s.form)
        self.module.decoder.checkpoint = s.checkpoint
        self.trained = RECIPES[s.recipe].trained
        self.vit_learns = "vit" in self.trained         # pixels go into the step, not features
        self.cache = FeatureCache(s.cache, self.module, given.processor) if s.cache else None
        self.visual_tokens = self.count_visual_tokens()
        self.cut_documents = 0                          # longer than --longest, of those trained on
        V = self.module.decoder.config.vocab_size
        self.expect = f"(a uniform guess over the vocabulary: ln {V} = {math.log(V):.2f})"

    @torch.no_grad()
    def count_visual_tokens(self) -> int:
        """K: how many positions one image takes in the decoder."""
        bridge = self.module.bridge
        if not bridge.soft_tokens:
            return 1
        features = next(bridge.parameters()).new_zeros(1, *self.module.features(None).shape[1:])
        return bridge.prefix(bridge.see(features)).shape[1]

    # the batch

    def batch(self, step: int) -> list[dict]:
        """The pieces of a step. Each process reads its own part of every data set's share."""
        return [piece for m in range(len(self.sets)) for piece in self.pieces(m, step, len(self.sets))]

    def pieces(self, m: int, step: int, sets: int = 1) -> list[dict]:
        """Those of data set m, one of so many that share the step."""
        world, weight = self.sets[m]
        pairs = [self.example(world, i) for i in self.given.indices(step, sets)]
        if self.s.accumulate > 1:                       # rows of similar length share a piece: less padding
            pairs.sort(key=lambda pair: len(pair[0].tokens))
        size = math.ceil(len(pairs) / self.s.accumulate)
        return [self.piece(pairs[k:k + size], m, weight) for k in range(0, len(pairs), size)]

    def example(self, world, index: int) -> tuple[data.Document, data.Item]:
        item = world.item(index, turns=self.s.turns)
        return self.document(item, index), item

    def document(self, item: data.Item, index: int) -> data.Document:
        """Captions and answers are learned, everything else is context."""
        caption = np.random.default_rng((self.s.seed, 1, index)).random() < self.s.captions
        return data.training_document(item, self.tokenizer, caption, self.template, self.choice_text)

    def piece(self, pairs: list[tuple[data.Document, data.Item]], m: int, weight: float) -> dict:
        """Documents and pictures of data set m as tensors, pictures in the order of their places."""
        documents, K = [d for d, _ in pairs], self.visual_tokens
        cut = sum(d.cut(self.s.longest, K) for d in documents)
        if self.s.pack:
            rows = pack_documents(documents, self.s.longest, K)
            tokens, labels, mask = data.collate([[documents[i] for i in row] for row in rows])
            pairs = [pairs[i] for row in rows for i in row]
        else:
            tokens, labels, mask = data.collate(documents)
        pictures = [p for d, item in pairs for p in item.pictures[:d.tokens.count(IMAGE)]]
        all_tokens = mask.dtype == torch.bool and mask.all()
        return dict(tokens=tokens, labels=labels, mask=None if all_tokens else mask, set=m, weight=weight,
                    count=int((labels != IGNORE).sum()), cut=cut, **self.look_at(pictures))

    def look_at(self, pictures: list[np.ndarray]) -> dict:
        """Their pixels (m, 3, S, S); with --cache of those alone whose features it does not know."""
        size, known = self.module.vit.config.image_size, None
        if self.cache is not None:
            known = self.cache.look_up(pictures)
            pictures = [pictures[n] for n in known.missing]
        none = torch.zeros(0, 3, size, size)
        pixels = data.to_pixels(pictures, size, self.given.processor) if pictures else none
        return {"pixels": pixels, "known": known}

    def to_device(self, pieces: list[dict]) -> list[dict]:
        """Pieces on the device; pictures become features unless the ViT learns too."""
        pieces = super().to_device(pieces)
        for p in pieces:
            self.cut_documents += p.pop("cut")
            known = p.pop("known")
            if known is not None:
                p["features"] = self.cache.complete(known, p.pop("pixels"), self.features)
            elif not self.vit_learns:
                p["features"] = self.features(p.pop("pixels"))
        return pieces

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """(m, 3, S, S) → (m, N, Di) of the frozen ViT."""
        return self.module.features(pixels.to(next(self.module.vit.parameters()).dtype))

    # the loss

    def loss(self, tokens: Tensor, labels: Tensor, mask: Tensor | None, features: Tensor | None = None,
             pixels: Tensor | None = None, **_) -> Tensor:
        return self.module.loss(tokens, labels, pixels, mask, features)[0]

    # what is printed, logged and saved

    def first_step(self, *first) -> None:
        first_look(self, *first)

    def flops_per_position(self, rows: int = 4) -> float:
        """Counted on a few rows, no more than a step has; with --cache the ViT does not run."""
        rows = min(rows, math.ceil(self.s.batch / self.s.accumulate))
        piece = self.piece([self.example(self.world, i) for i in range(rows)], 0, 1.0) | {"cut": 0}
        if self.cache is not None:                      # as if it knew them all
            piece["known"] = piece["known"]._replace(missing=[])
        return count_flops(lambda: self.loss(**self.to_device([dict(piece)])[0]),
                           self.module) / count_positions(piece, self.visual_tokens)

    def metrics(self) -> dict[str, float]:
        gates = self.module.bridge.gates()
        return super().metrics() | ({} if gates is None else {"gate": gates.abs().mean().item()})

    def log_details(self) -> dict:
        return gate_details(self.module.bridge, self.module.decoder.config.heads)

    def save(self, out: Path, facts: dict) -> None:
        save_answer_run(self.module, self.trained, out, facts, self.s.lm, self.s.vit, self.s.init)

    def check(self) -> dict[str, float]:
        items = take_items(held_out := self.given.open_held_out(), 100)
        if not has_answers(held_out, items[0]):
            return {"held_out_loss": self.held_out_loss(held_out)}
        told = not any(item.qas for item in items)      # captions take several times as long as answers
        return scalar_scores(evaluate(self.module, self.tokenizer, items, captions=told, form=self.s.form))

    def report(self, out: Path) -> dict[str, dict]:
        if advice := advise_at_end(out, self.module.decoder.config.vocab_size):
            print(f"doctor   {advice}")
        if self.cut_documents:
            print(f"warning: {self.cut_documents} documents were longer than --longest {self.s.longest} "
                  "and lost their ends", file=sys.stderr)
        try:
            held_out = self.given.open_held_out()
            item = take_items(held_out, 16)[0]
        except UserError as e:                  # what was trained is saved; only the table cannot be made
            print(f"warning: no final table, {e}", file=sys.stderr)
            return {}
        if has_answers(held_out, item):
            report_run(self.module, self.tokenizer, self.given.trained, out, self.s.eval_items,
                       self.s.samples, self.s.form)
            return {}
        loss = self.held_out_loss(held_out)
        split = self.given.name_split(held_out)
        print(f"{split} loss {loss:.3f} on {self.world.name}:{self.world.held_out}")
        return {"results.json": {f"{split} loss": loss}}

    @torch.no_grad()
    def held_out_loss(self, world, count: int = 64) -> float:
        """Mean −log p of a learned token on the first items of the split that training does not see."""
        items = take_items(world, count, self.s.turns)
        pairs = [(self.document(item, i), item) for i, item in enumerate(items)]
        pieces = self.to_device([self.piece([pair], 0, 1.0) | {"cut": 0} for pair in pairs])
        return sum(self.loss(**p).item() for p in pieces) / sum(p["count"] for p in pieces)


# Ingredients: what is loaded for a task ---------------------------------------------------------------------

TASKS = {"answer": AnswerTask, **reader.TASKS, **papers.TASKS,
         **{name: type(name, (change, AnswerTask), {}) for name, change in papers.ANSWER_TASKS.items()}}
MIXED = ("answer", "round-robin")                       # tasks that learn from several data sets
PER_TOKEN = (*MIXED, *reader.TASKS)                     # tasks whose loss is a mean over tokens


def load_task(s: Settings, recipe: Recipe, ranks: Ranks, sets: list[tuple], stored: torch.dtype) -> Task:
    """Load what a recipe's task needs, and freeze the parts that do not learn, `stored` in that dtype."""
    world, trained = sets[0][0], [each for each, _ in sets] + earlier_sets(s.init)
    ranks.require_splits(s.recipe, TASKS[recipe.task].splits)
    if recipe.task not in (*MIXED, "clip") and (sets[1:] or sets[0][1] != 1):
        raise UserError(f'--data "{s.data}": recipe {s.recipe} learns from one data set, without a weight.')
    given = Ingredients(
        ranks.device, s.seed, s.batch, s.steps, world, s.accumulate, s.examples, s.eval_items,
        generate_texts=generate_texts, take_items=take_items, trained=trained, **FROM_WORLDS,
        open_held_out=lambda: open_split(world, world.held_out), part=ranks.part, gather=ranks.gather,
        name_split=lambda split: name_split(split, trained), track=track,
        worlds=take_turns(sets) if recipe.task == "clip" else [world])
    if world.says_scenes:                               # its words have a tokenizer of their own
        given.tokenizer = text.shapes_tokenizer()
    LOADERS[recipe.task](given, s.lm, s.vit, s.init)
    fit_size([each for each, _ in sets], given.vit or getattr(given.clip, "vit", None))
    if recipe.task not in (*MIXED, "lm", "clip"):
        require_captions(world)
    if issubclass(TASKS[recipe.task], AnswerTask):
        given.bridge = new_bridge(s, s.bridge, given.decoder.config, given.vit.config.width).to(given.device)
        start_bridge(given.bridge, given.decoder, s.init)
        with at_the_door(f"--vit {s.vit}"):
            task = TASKS[recipe.task](given, s, ranks, sets)
        for each, _ in sets:
            first = [task.example(each, i)[0] for i in range(min(8, s.batch))]
            require_room(first, s.longest, task.visual_tokens, each.name, given.decoder.config.context)
    else:
        if recipe.task == "stage1":
            vocab = given.tokenizer.vocab_size
            given.bridge = new_bridge(s, "qformer", None, given.vit.config.width, vocab=vocab)
        task = TASKS[recipe.task](given)
    task.frozen = parts_digest(task.module, recipe.trained)
    task.freeze(recipe.trained, stored)
    return task


def new_bridge(s: Settings, name: str, decoder, vision_width: int, **options) -> Bridge:
    """A bridge in the sizes of the recipe (toy) or of its paper, with what --option changes."""
    own = parse_options(s.option)
    with at_the_door("--option"):
        sizes = bridge_options(name, s.recipe, s.scale)
        bridge = make_bridge(name, decoder, vision_width, **{**sizes, **own, **options})
        refuse_unread_options(bridge, own, RECIPES[s.recipe].task)
    return bridge


def bridge_options(bridge: str, recipe: str, scale: str = "toy") -> dict:
    """The options of a bridge: the recipe's own where that is its bridge, else its own recipe's."""
    r = RECIPES[recipe] if RECIPES[recipe].bridge == bridge else RECIPES.get(bridge)
    return {} if not r else r.options if scale == "toy" else r.paper_options


# From the command line to settings --------------------------------------------------------------------------

def settings_from(argv: list[str] | None) -> tuple[Settings, bool]:
    """(the flags, whether a run is resumed); what the recipe says is still None."""
    mode, s, given = read_command(Settings, __doc__, argv)
    if mode == "list":
        print_recipes(RECIPES, SYSTEMS)
    elif mode == "curves":
        print(*draw_curves(Path(s.out), RECIPES.get(s.recipe, RECIPES["mlp"]).task in PER_TOKEN), sep="\n")
    if mode in ("list", "curves"):
        raise SystemExit(0)
    if s.offline or "offline" in given:                 # read by formats/hub.py and by the hub's own library
        os.environ["HF_HUB_OFFLINE"] = str(int(s.offline))
    s.recipe = s.recipe or s.bridge or "mlp"
    if s.recipe not in RECIPES and s.recipe not in SYSTEMS:
        raise UserError(f'unknown recipe "{s.recipe}"; {nearest(s.recipe, {**RECIPES, **SYSTEMS})}')
    if mode == "train":
        recipes = [RECIPES[name] for name in SYSTEMS.get(s.recipe, (s.recipe,))]
        refuse_unread(given, read_by_none(recipes), f"recipe {s.recipe}")
        specs = [spec for r in recipes for spec, _ in parse_weighted(s.data or r.toy_data)]
        refuse_unread(given, unread_settings(specs), f"data {' + '.join(dict.fromkeys(specs))}")
    return s, mode == "resume"


# (settings, name) → the same with everything that the command line left open taken from the recipe
with_recipe = functools.partial(fill_settings, recipes=RECIPES)


if __name__ == "__main__":
    run_cli(main)
