"""lab/compare.py: the full comparison: captions, questions with 0, 4, 8 examples, ScienceQA's and MME's form."""
from __future__ import annotations

import collections
import csv
import functools
import io
import json
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import data
from eval import accuracy_by_kind, answer_accuracy, caption_scores, chance_scores, first_items, mean, open_run
from support.formats.benchmarks import (mme_scores, postprocess_answer, save_predictions, scienceqa_accuracy,
                                        scienceqa_choice)
from support.formats.datasets import FORMATS, MME
from support.formats.files import UserError, atomically, nearest, read_json
from support.formats.hub import fetch, is_hub_name
from support.lab.protocols import (Comparison, PROTOCOLS, build_prompt, few_shot_examples, multiple_choice,
                                   yes_no_pairs)
from support.worlds import WORLDS, open_data
from support.worlds.files import Files

OFFICIAL = {"vqav2": "vqav2", "okvqa": "okvqa", "vizwizvqa": "vizwiz", "coco": "coco", "karpathy": "coco", "vizwiz": "coco",
            "scienceqa": "scienceqa", "mme": "mme"}     # kind of data → form of `save_predictions`
LONGEST = {"CIDEr": 64, "SQA": 256, "SQA rank": 0, "MME": 6}         # tokens that are written; else 12


def build_questions(world, items: list[data.Item], ks: tuple[int, ...], seed: int) -> dict[str, list[tuple[int, data.QA | None]]]:
    """What is asked for each measure: (number of the item, question; None for a caption).

    CIDEr       captions; BLEU-4 comes with it
    0-shot …    open questions, with 0, … examples
    SQA         multiple choice in ScienceQA's words, of data that has choices: the choice that is written counts
    SQA rank    of worlds that are generated: the choice that is likeliest to be written, and then the stop token; so a bridge that has
                never met a letter can be asked, too
    MME         two questions a picture; "yes" or "no" is read as its evaluation reads it
    """
    files = isinstance(world, Files)
    asked = [(n, q) for n, item in enumerate(items) for q in item.qas]
    chosen = [(n, q) for n, q in asked if q.choices]
    told = [(n, None) for n, item in enumerate(items) if item.image is not None and (item.captions or not item.qas)]
    if files and world.kind == "mme":
        return {"MME": sorted(asked, key=lambda a: a[1].source.id)}
    if files:
        return {"CIDEr": told, **{f"{k}-shot": [a for a in asked if a not in chosen] for k in ks}, "SQA": chosen}
    pairs = [*yes_no_pairs(items, seed)] if isinstance(world, data.Shapes) else []
    return {"CIDEr": told, **{f"{k}-shot": asked for k in ks}, "SQA": chosen, "SQA rank": [*multiple_choice(items, seed)], "MME": pairs}


def measure_cells(exam: Comparison, world, items: list[data.Item], support, protocol: str = "ours", ks: tuple[int, ...] = (0, 4, 8),
            form: str = "QCM-LEA", seed: int = 0) -> tuple[dict, dict, list[str]]:
    """Cells {(measure,): number, (part, measure): number}, predictions {measure: rows of `save_predictions`}, and why a measure is missing.

    In %, CIDEr and BLEU-4 x 100, MME in points. Parts: kinds of question, of which VQA of a generated world is the mean; the columns of
    ScienceQA's tables; MME's tasks, of which perception is summed. support: k → `shots` for each item.
    """
    files, cells, predictions, notes = isinstance(world, Files), {}, {}, []
    for measure, asked in build_questions(world, items, ks, seed).items():
        k, ranked = int(measure[:-5]) if measure.endswith("-shot") else 0, measure == "SQA rank"
        words = "scienceqa" if measure == "SQA" else protocol
        bare = PROTOCOLS[words].bare if k == 0 and not ranked else 0
        rows = [(n, q, c) for n, q in asked for c in (q.choices if ranked else [""])]
        keys = [", ".join([measure, items[n].id, *([q.question] if q else []), *([c] if c else [])]) for n, q, c in rows]
        try:
            examples = [[replace(i, image=None) if bare else i for i in row] for row in support(k or bare)]
            documents = [build_prompt(exam.tokenizer, words, items[n], q, examples[n], form) for n, q, _ in rows]
            documents = [d.add(" " + c, learn=True).end() if c else d for d, (*_, c) in zip(documents, rows)]
            said = exam.texts(keys, documents, [[*examples[n], items[n]] for n, *_ in rows], LONGEST.get(measure, 12))
        except UserError as e:                          # a bridge that takes one picture; too few examples on disk
            notes.append(f"{measure} is empty: {e}")
            continue
        if not asked:
            continue
        if (rule := PROTOCOLS[words].rules[measure == "CIDEr"]) and not ranked:
            said = [postprocess_answer(rule, text) for text in said]
        questions, ids = [q for _, q in asked], [q.source.id if files and q else items[n].id for n, q in asked]
        predictions[measure] = [*zip(ids, said)]
        if measure == "CIDEr" and all(items[n].captions for n, _ in asked):
            scores = caption_scores(said, [items[n].captions for n, _ in asked])
            cells |= {("CIDEr",): 100 * scores["cider"], ("B@4",): 100 * scores["bleu4"]}
        elif measure == "MME":
            names = [Path(q.source.images[0]).name if files else i for q, i in zip(questions, ids)]
            predictions[measure] = [(q.kind, name, q.question, q.answer, text) for q, name, text in zip(questions, names, said)]
            cells |= mme_cells({task: x["score"] for task, x in mme_scores(predictions[measure]).items() if isinstance(x, dict)})
        elif measure.endswith("-shot") and all(q.answer for q in questions):
            cells |= vqa_cells(measure, accuracy_by_kind(questions, said), mean([*map(answer_accuracy, questions, said)]) if files else None)
        elif measure.startswith("SQA"):
            logp = iter(said)
            picked = [int(np.argmax([float(next(logp)) for _ in q.choices])) if ranked else
                      scienceqa_choice(next(logp), len(q.choices)) for q in questions]
            predictions[measure] = [*zip(ids, picked, said)]
            problems = {n: {**q.source.more, "image": q.source.images, "answer": q.correct}
                        for n, q in enumerate(questions)} if files else {}
            parts = scienceqa_accuracy(problems, dict(enumerate(picked))) if files else {}
            parts["Avg"] = mean([c == q.correct for c, q in zip(picked, questions)])
            cells |= {(measure,) if part == "Avg" else (part, measure): 100 * x for part, x in parts.items()}
    return cells, predictions, notes


def vqa_cells(measure: str, kinds: dict[str, float], whole: float | None) -> dict:
    """Of kinds of question and of all: `whole`, the official mean over questions, or the mean over kinds."""
    whole, kinds = kinds["mean"] if whole is None else whole, {kind: x for kind, x in kinds.items() if kind != "mean"}
    return {(kind, measure): 100 * x for kind, x in kinds.items()} | {(measure,): 100 * whole}


def mme_cells(tasks: dict[str, float]) -> dict:
    return {(task, "MME"): x for task, x in tasks.items()} | {("MME",): sum(tasks.get(task, 0) for task in MME["perception"])}


def chance_cells(world, train, items: list[data.Item], ks: tuple[int, ...], seed: int) -> dict:
    """Cells for who sees nothing: open questions: the commonest answer of their kind in training; choices, yes or no: dice."""
    files, cells = isinstance(world, Files), {}
    for measure, asked in build_questions(world, items, ks, seed).items():
        questions = [q for _, q in asked]
        if measure.endswith("-shot") and asked and all(q.answer for q in questions):
            kinds = chance_scores(train(), items)
            cells |= vqa_cells(measure, kinds, mean([kinds[q.kind] for q in questions]) if files else None)
        elif measure.startswith("SQA") and asked:
            cells[(measure,)] = 100 * mean([1 / len(q.choices) for q in questions])
        elif measure == "MME" and asked:
            cells |= mme_cells({q.kind: 75.0 for q in questions})               # acc 1/2, acc+ 1/4
    return cells


def overall_means(cells: dict, sets: dict[str, list[str]]) -> dict:
    """The documents' Overall: of each measure the plain mean over the data sets of the table, nothing where one is missing; MME has one.

        MAPL, 0-shot:  (33.54 + 13.84 + 8.26 + 11.72) / 4 = 16.84
    """
    found = {m: [cells.get((name, m)) for name in names] for m, names in sets.items()}
    return {(m,): mean(x) for m, x in found.items() if None not in x}


PAPER_ROWS = {          # bridge → row | trained | examples | source | measure: data set and number …; never on the data of our rows
    "linear": ["LLaVA 13B | 13B | 158K | 2304.08485v2, fine-tuned on ScienceQA | SQA: scienceqa 90.92"],
    "mlp": ["LLaVA-1.5 13B | 13B | 1.2M | its model zoo and MME's leaderboard; it is trained on VQAv2, reads OCR in TextVQA, and is asked only "
            "ScienceQA's pictured problems | 0-shot: vqav2 80.0 textvqa 61.3 vizwizvqa 53.6 | SQA: scienceqa 71.6 | MME: mme 643.33"],
    "mapl": ["MAPL | 3.4M | 374K | 2210.07179v2, trained on CC-clean | CIDEr: cc 79.75 coco 54.3 textcaps 22.95 vizwiz 20.95 | "
             "B@4: cc 6.75 coco 12.3 textcaps 5.8 vizwiz 4.95 | 0-shot: vqav2 33.54 okvqa 13.84 textvqa 8.26 vizwizvqa 11.72 | "
             "4-shot: vqav2 45.13 okvqa 24.25 textvqa 8.88 vizwizvqa 18.46 | 8-shot: vqav2 45.21 okvqa 23.93 textvqa 8.77 vizwizvqa 19.52",
             "MAPL-blind | 3.4M | 374K | 2210.07179v2, trained on CC-clean without seeing | CIDEr: cc 5.05 coco 5.75 textcaps 2.15 vizwiz 1.8 | "
             "B@4: cc 0.35 coco 2.75 textcaps 1.35 vizwiz 1.5 | 0-shot: vqav2 20.62 okvqa 4.84 textvqa 3.68 vizwizvqa 3.18 | "
             "4-shot: vqav2 35.01 okvqa 14.68 textvqa 5.43 vizwizvqa 8.65 | 8-shot: vqav2 35.11 okvqa 14.28 textvqa 5.82 vizwizvqa 9.55"],
    "frozen": ["Frozen | 40.3M | 374K | MAPL's authors' run of 2106.13884, on CC-clean | CIDEr: cc 22.6 coco 13.9 textcaps 4.6 vizwiz 2.65 | "
               "B@4: cc 2.45 coco 5.25 textcaps 2.65 vizwiz 2.05 | 0-shot: vqav2 25.98 okvqa 5.51 textvqa 5.11 vizwizvqa 4.33 | "
               "4-shot: vqav2 37.80 okvqa 18.86 textvqa 6.15 vizwizvqa 11.28 | 8-shot: vqav2 38.52 okvqa 19.91 textvqa 6.30 vizwizvqa 16.68"],
    "qformer": ["BLIP-2 | 104M | 129M | 2301.12597v3, fine-tuned on COCO; with FlanT5-XXL on MME's leaderboard | CIDEr: coco 145.3 | "
                "B@4: coco 43.7 | MME: mme 516.66"],
    "zero_init": ["LLaMA-Adapter | 1.2M | | 2303.16199v3, trained on ScienceQA; its V2 on COCO, its V2.1 on MME's leaderboard | CIDEr: coco 122.2 | "
                  "B@4: coco 36.2 | SQA: scienceqa 85.19 | MME: mme 493.33"],
    "flamingo": ["Flamingo-80B | 10.2B | 2.1B | 2204.14198v2 | CIDEr: coco 84.3 | 0-shot: vqav2 56.3 okvqa 50.6 textvqa 35.0 vizwizvqa 31.6 | "
                 "4-shot: vqav2 63.1 okvqa 57.4 textvqa 36.5 vizwizvqa 39.6 | 8-shot: vqav2 65.6 okvqa 57.5 textvqa 37.3 vizwizvqa 44.8"],
}                       # MME: existence, count, position and color, of 800


def published_rows(bridges: list[str]) -> tuple[list[dict], list[str]]:
    """The published rows of these systems with their Overall, and the sentences that say what they are."""
    rows, notes = [], []
    for name, trained, examples, source, *measures in (map(str.strip, row.split("|")) for b in bridges for row in PAPER_ROWS.get(b, ())):
        words = {m: text.split() for m, text in (measure.split(":") for measure in measures)}
        cells = {(part, m): float(x) for m, line in words.items() for part, x in zip(line[::2], line[1::2])}
        rows.append({"row": f"[{name}]", "trained": trained, "examples": examples,
                     "cells": cells | overall_means(cells, {m: line[::2] for m, line in words.items()})})
        notes.append(f"[{name}] is published, on other data ({', '.join(dict.fromkeys(part for part, _ in cells))}): {source}")
    return rows, notes


def compare_runs(runs: list[str], specs: list[str] = (), protocol: str = "ours", ks: tuple[int, ...] = (0, 4, 8), count: int = 400, seed: int = 0,
            beams: int = 1, folder: str | None = None, device="cpu") -> tuple[list[dict], list[str]]:
    """Rows {"row", "trained", "examples", "cells"} of each run, the same run blind, and chance, on the data of the runs or on `specs`; footnotes.

    folder: FOLDER/RUN.jsonl keeps every text, and none is written twice. Beside it lie the predictions in each benchmark's official form:
    RUN-DATA-MEASURE.json, and a folder for MME.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f'no protocol is called "{protocol}"; {nearest(protocol, PROTOCOLS)}')
    if twice := [kind for kind, n in collections.Counter(spec.split(":")[0] for spec in specs).items() if n > 1]:
        raise UserError(f"--data names {twice[0]} twice, and a table has a column for each kind; ask about one at a time.")
    rows, notes, opened, base = [], {}, {}, {}

    def open_set(spec: str):
        """The world, its held-out items (or those of the split that the spec names), and examples for them."""
        world = open_data(spec, seed)
        items = first_items(world, world.split if spec.endswith(f":{world.split}") else world.held_out, count)
        train = functools.cache(lambda: open_data(world.name, seed))
        return world, items, train, functools.cache(lambda k: [few_shot_examples(train(), i, k, seed) if k else [] for i in items])

    for run, blind in ((run, blind) for run in runs for blind in (False, True)):
        if not blind:
            vlm, tokenizer, facts = open_run(run, device)
            settings, name = facts.get("settings", {}), Path(run).name
            stamp = f"{zlib.crc32(json.dumps(facts, sort_keys=True).encode()):08x}"         # another training, other texts
        row, start = {"row": name + ", blind" * blind, "cells": {}}, time.monotonic()
        row |= {} if blind else {"trained": facts.get("trained_parameters"), "examples": facts.get("training_examples")}
        if not specs and "data" not in settings:
            raise UserError(f"{run} was trained elsewhere; name what to ask it about: --data SPEC, such as --data vqav2:PATH:val.")
        for spec in specs or [settings["data"].split(" + ")[0].split(" * ")[0]]:
            world, items, train, support = opened[spec] = opened.get(spec) or open_set(spec)
            kind, about = world.name.split(":")[0], f"{stamp}, {spec}, {protocol}, seed {seed}, beams {beams}" + ", blind" * blind
            exam = Comparison(vlm, tokenizer, blind, beams, folder and Path(folder) / f"{name}.jsonl", about)
            cells, told, missing = measure_cells(exam, world, items, support, protocol, ks, settings.get("form", "QCM-LEA"), seed)
            row["cells"] |= {(kind, *key): x for key, x in cells.items()}
            notes |= {f"{name}, {text}": None for text in missing}
            for measure, lines in told.items() if folder and kind in OFFICIAL and not blind else ():
                save_predictions(OFFICIAL[kind], lines, Path(folder) / f"{name}-{kind}-{measure}{'' if kind == 'mme' else '.json'}")
        rows.append(row)
        print(f"{row['row']}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    for world, items, train, _ in opened.values():
        try:
            base |= {(world.name.split(":")[0], *key): x for key, x in chance_cells(world, train, items, ks, seed).items()}
        except UserError as e:
            notes[f"chance is empty: {e}"] = None
    rows.append({"row": "chance", "cells": base})
    sets = collections.defaultdict(dict)
    for kind, measure in (key for row in rows for key in row["cells"] if len(key) == 2):
        sets[measure][kind] = None
    alone = len(opened) == 1 and not isinstance(world, Files)
    for row in rows:
        row["cells"] = ({key[1:]: x for key, x in row["cells"].items()} if alone else
                        row["cells"] | overall_means(row["cells"], {m: [*kinds] for m, kinds in sets.items()}))
    return rows, [*notes]


def format_comparison(rows: list[dict], form: str = "text", each: bool = False) -> str:
    """Rows of `compare` as text, Markdown or CSV: trained parameters, training examples, each data set's columns, Overall.

    The data set of one generated world is its kinds of question, and Overall alone is shown; `each` shows kinds of question everywhere.
    """
    keys = dict.fromkeys(key for row in rows for key in row["cells"])
    own = {key for row in rows if not row["row"].startswith("[") for key in row["cells"]}
    wide = any(key[0] in {*WORLDS, *FORMATS} for key in own)
    order = ("CIDEr", "B@4", *sorted({key[-1] for key in keys if key[-1].endswith("-shot")}, key=lambda m: int(m[:-5])), "SQA", "SQA rank", "MME")
    shown = sorted((key for key in keys if len(key) == 1 or key in own and len(key) <= 1 + wide + each),
                   key=lambda key: (order.index(key[-1]), len(key) == 1, key[:1], len(key) == 2))
    head = ["", "trained", "examples", *("Overall " * ((wide or each) and len(key) == 1) + " ".join(key) for key in shown)]
    digits, comma = (2, "") if form == "csv" else (1, ",")
    cell = lambda x: "" if x is None else f"{x:.{digits}f}" if isinstance(x, float) else f"{x:{comma}}" if isinstance(x, int) else x
    lines = [head] + [[row["row"], *map(cell, (row.get("trained"), row.get("examples"), *map(row["cells"].get, shown)))] for row in rows]
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(lines)
        return out.getvalue().rstrip("\n")
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [[v.rjust(w) if n else v.ljust(w) for n, (v, w) in enumerate(zip(line, widths))] for line in lines]
    if form == "markdown":
        lines.insert(1, [("-" * (w - 1) + ":") if n else "-" * w for n, w in enumerate(widths)])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def print_full_table(args, device: str) -> None:
    """`--table`: prints the full comparison, its footnotes and its minutes; CSV alone goes to standard output, the rest to standard error."""
    start, text = time.monotonic(), args.shots.split(",")
    if not all(k.isdecimal() for k in text):
        raise UserError(f'--shots "{args.shots}" is no list of numbers; write for example 0,4,8.')
    rows, notes = compare_runs(args.runs, args.data, args.protocol, tuple(map(int, text)), args.items, args.seed, args.beams, args.predictions, device)
    if args.paper:
        bridges = dict.fromkeys(read_json((fetch(run) if is_hub_name(run) else Path(run)) / "config.json").get("bridge") for run in args.runs)
        rows, notes = [both + more for both, more in zip((rows, notes), published_rows([*bridges]))]
    text = format_comparison(rows, args.format, args.each)
    notes = [f"{args.items} pictures a row, seed {args.seed}, prompts \"{args.protocol}\"; trained parameters, training examples; %, CIDEr and "
             "BLEU-4 x 100, MME in points (200 a task)", "Overall: the plain mean over data sets; of a generated world the mean over its kinds of question, and MME's sum of tasks", *notes,
             f"{(time.monotonic() - start) / 60:.1f} minutes on {device}, {torch.get_num_threads()} threads"]
    print(text)
    print("\n" + "\n".join(notes), file=sys.stderr if args.format == "csv" else sys.stdout)
    if args.out:
        with atomically(Path(args.out)) as tmp:
            tmp.write_text(text + "\n" if args.format == "csv" else "\n".join([text, "", *notes]) + "\n", encoding="utf-8")
