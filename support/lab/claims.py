"""lab/claims.py: one miniature experiment per claim of the papers: its runs, its measurements, its verdict."""
from __future__ import annotations

import collections
import contextlib
import itertools
import math
import multiprocessing
import re
import textwrap
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import data
import train
from eval import (accuracy_by_kind, answer_accuracy, evaluate, first_items, generate_texts, mean, open_run,
                  scalar_scores, vision_features)
from model import VLM
from support.formats.files import atomically, read_json, write_json
from support.formats.tokenizers import Tokenizer
from support.plumbing.log import read_log
from support.lab.attention import gate_history
from support.lab.claims_list import ARMS, CLAIMS, COMMON, Claim
from support.lab.protocols import Comparison, build_prompt, few_shot_examples
from support.worlds import open_data


def measure_answers(vlm: VLM, tokenizer: Tokenizer, items: list[data.Item], run: Path) -> dict:
    """VQA accuracy on held-out pictures by kind, their mean, and that of the pictures with one thing and with four."""
    result = evaluate(vlm, tokenizer, items, captions=False)
    answers, by_things = iter(result["answers"]), collections.defaultdict(list)
    for item in items:
        by_things[item.about.count(";") + 1] += [answer_accuracy(q, next(answers)) for q in item.qas]
    return {**scalar_scores(result), "1 thing": mean(by_things[1] or [0.0]), "4 things": mean(by_things[4] or [0.0])}


def measure_loss(vlm, tokenizer, items, run) -> dict:
    """The training loss of the first batch, and its running mean at the end, in nats per learned token."""
    log = [line for line in read_log(run / "log.jsonl") if "ema" in line]
    return {"first loss": log[0]["loss"], "loss": log[-1]["ema"]}


def measure_gates(vlm, tokenizer, items, run) -> dict:
    """Mean |gate| over heads: of all layers halfway and at the end, and at the end of the lower and upper half of the adapted layers."""
    gates = np.abs(gate_history(run)[1]).mean(-1)                                               # (logged steps, layers)
    lower, upper = np.array_split(gates[-1], 2)
    halves = {"lower layers": lower, "upper layers": upper, "gate halfway": gates[len(gates) // 2], "gate at the end": gates[-1]}
    return {name: float(g.mean()) for name, g in halves.items()}


def measure_reasons(vlm, tokenizer, items, run) -> dict:
    """VQA accuracy of the answer within what is written, whose reasoning stands before or after it (data.ShapesReasons)."""
    before = read_json(run / "config.json")["settings"]["data"] == "shapes-reasons"
    asked = [(n, q) for n, item in enumerate(items) for q in item.qas]
    prompts = [data.Document(tokenizer).image().add(data.QUESTION.format(q.question)) for _, q in asked]
    texts = generate_texts(vlm.generate, prompts, tokenizer, 72, features=vision_features(vlm, items, False), pictures=[[n] for n, _ in asked])
    return accuracy_by_kind([q for _, q in asked], [text.split(": ")[-before] for text in texts])


def few_shot_accuracy(vlm: VLM, tokenizer: Tokenizer, items: list[data.Item], k: int) -> float:
    """Mean VQA accuracy where k other pictures of training, each with a question and its answer, stand before the picture asked about."""
    train = data.Shapes()
    asked = [(item, q, support) for item in items for support in [few_shot_examples(train, item, k)] for q in item.qas]
    documents = [build_prompt(tokenizer, "ours", item, q, support) for item, q, support in asked]
    shown = [[*support, item] for item, _, support in asked]
    return accuracy_by_kind([q for _, q, _ in asked], Comparison(vlm, tokenizer).texts([str(n) for n in range(len(asked))], documents, shown, 12))["mean"]


MEASUREMENTS = {               # what can be measured of an arm, given (vlm, tokenizer, held-out items, run folder): {name: number}
    "answers": measure_answers, "loss": measure_loss, "gates": measure_gates, "reasons": measure_reasons,
    "captions": lambda vlm, tokenizer, items, run: {"cider": evaluate(vlm, tokenizer, [replace(i, qas=[]) for i in items])["cider"]},
    "blind": lambda *a: {f"blind {k}": v for k, v in evaluate(*a[:3], blind=True).items() if k in ("mean", "cider")},
    "shots": lambda vlm, tokenizer, items, run: {f"{k} shots": few_shot_accuracy(vlm, tokenizer, items[:len(items) // 4], k) for k in (0, 1, 4, 8)},
    "pages": lambda vlm, tokenizer, items, run: {f"{k} pictures before": few_shot_accuracy(vlm, tokenizer, items, k) for k in (0, 3)},
}


def run_arm(arm: str, seed: int, out: Path, flags: list[str], looks: list[str], count: int = 200) -> dict:
    """Train an arm unless its finished run lies in its folder, look at it, and keep there what was seen: {look: {its name: number}}."""
    run = Path(arm_folder(out, arm, seed))
    done = read_json(run / "seen.json") if (run / "seen.json").exists() else {}
    if done.get("flags") != flags:
        run.mkdir(parents=True, exist_ok=True)
        with open(run / "output.txt", "w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            train.main(flags)
        done = {"flags": flags, "seconds": (config := read_json(run / "config.json"))["seconds"], "steps": config["steps"]}
        write_json(run / "seen.json", done)
    if missing := [name for name in looks if name not in done]:
        torch.set_num_threads(1)
        vlm, tokenizer, _ = open_run(str(run), "cpu")
        items = first_items(open_data("shapes"), "test", count)               # the same pictures for every seed
        for name in missing:
            done[name] = MEASUREMENTS[name](vlm, tokenizer, items, run)
        write_json(run / "seen.json", done)
    return done


def arm_folder(out: Path, arm: str, seed: int) -> str:
    return str(Path(out) / f"{re.sub('[^a-z0-9]+', '-', arm.lower()).strip('-')}-s{seed}")


def arm_flags(arm: str, seed: int, out: Path, arms=None, common: str = COMMON) -> list[str]:
    """The command line of an arm's run."""
    own = [arm_folder(out, word[1:-1], seed) if word[0] == "{" else word for word in (arms or ARMS)[arm][0].split()]
    return [*common.split(), *own, "--seed", str(seed), "--out", arm_folder(out, arm, seed)]


def judge(left: list[float], right: list[float], relation: str = ">") -> str:
    """The verdict on "left > right", numbers of several seeds each: "shown", "opposite" or "not shown" (of one: "one seed").

    With d = difference of the means and e = its standard error √(s²_left / n_left + s²_right / n_right):
    "shown" where d > 2 e, "opposite" where d < −2 e, else "not shown". "≥" (no worse) is "shown" unless it is "opposite".
    Three seeds make 2 e a weak test (about one false alarm in ten): read the size of d beside it.
    """
    if min(len(left), len(right)) < 2:
        return "one seed"
    d, e = mean(left) - mean(right), math.sqrt(np.var(left, ddof=1) / len(left) + np.var(right, ddof=1) / len(right))
    return "opposite" if d < -2 * e else "shown" if d > 2 * e or relation == "≥" else "not shown"


def arms_of(claim: Claim) -> list[str]:
    return list(dict.fromkeys(side.split(": ")[0] for left, _, right, _ in claim.expect for side in (left, right)))


def claim_report(name: str, claim: Claim, seen: dict[tuple[str, int], dict], seeds: int) -> tuple[str, list[str]]:
    """The claim, its table (mean ± standard deviation over seeds) and its verdicts as text; the verdicts."""
    def values(arm: str, number: str) -> list[float]:
        found = [x[number] for s in range(seeds) for x in seen[arm, s].values() if isinstance(x, dict) and number in x]
        return found if re.search("loss|cider|gate|layers", number) else [100 * v for v in found]

    columns, verdicts, shown = [c.replace("_", " ") for c in claim.columns.split()], [], set(arms_of(claim))
    rows = [["", *columns]]
    for arm in (arm for arm, seed in seen if arm in shown and seed == 0):
        rows.append([arm, *(f"{mean(v):.3g} ± {np.std(v, ddof=seeds > 1):.2g}" if v else "" for v in (values(arm, c) for c in columns))])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["    " + "  ".join(v.ljust(w) if v is row[0] else v.rjust(w) for v, w in zip(row, widths)).rstrip() for row in rows]
    for left, relation, right, paper in claim.expect:
        sides = [values(*(side if ": " in side else f"{side}: {columns[0]}").split(": ")) for side in (left, right)]
        verdicts.append(judge(*sides, relation))
        paper = f"   (document: {paper})" if paper else ""
        lines.append(f"    {verdicts[-1]:9s}  {left} {relation} {right}: {mean(sides[0]):.4g} against {mean(sides[1]):.4g}{paper}")
    note = textwrap.fill(claim.note, 118, initial_indent="    ", subsequent_indent="    ")
    return "\n".join([f"{name}: {claim.says} ({claim.source})", *lines, *filter(None, [note])]), verdicts


def run_claims(names: list[str], seeds: int = 3, jobs: int = 2, out: str | Path = "out/claims", file: str | Path = "support/results/claims.txt",
               claims=None, arms=None, common: str = COMMON, count: int = 200) -> str:
    """Train and look at every arm of these claims with seeds 0 … seeds−1, `jobs` runs at a time, and write the report.

    Finished runs in `out` are kept, so that the command goes on where it was stopped. claims and arms: tables, default CLAIMS and ARMS.
    """
    claims, arms = claims or CLAIMS, arms or ARMS
    needed = {arm for name in names for arm in arms_of(claims[name])}
    before = {arm: re.findall("{(.*?)}", arms[arm][0]) for arm in arms}         # what must be trained first
    needed |= {b for arm in needed for b in before[arm]}
    seen: dict[tuple[str, int], dict] = {}
    for seed, later in itertools.product(range(seeds), (False, True)):
        ready = [arm for arm in arms if arm in needed and bool(before[arm]) == later]
        work = [(arm, seed, Path(out), arm_flags(arm, seed, out, arms, common), arms[arm][1].split(), count) for arm in ready]
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) if jobs > 1 else contextlib.nullcontext() as pool:
            for arm, done in zip(ready, (pool.map if pool else map)(run_arm, *zip(*work)) if work else ()):
                seen[arm, seed] = done
                print(f"seed {seed}: {arm}: {done['steps']} steps, {done['seconds'] / 60:.1f} minutes", flush=True)
    reports = {name: claim_report(name, claims[name], seen, seeds) for name in names}
    minutes = sum(done["seconds"] for done in seen.values()) / 60
    head = (f"python eval.py --claim {'all' if len(names) == len(claims) else ' '.join(names)}: seeds 0 to {seeds - 1}, {len(seen)} runs, "
            f"{minutes:.0f} minutes of training on one core each; every run: {common}\n"
            f"Mean ± standard deviation over seeds: accuracy in %, CIDEr, loss in nats per learned token; {count} held-out pictures.\n"
            "The documents' numbers are of other data and models: compare the direction. The verdicts are computed (eval.judge).")
    summary = [f"    {name:12s}{', '.join(verdicts)}" for name, (_, verdicts) in reports.items()]
    text = "\n".join([head, "", *summary, "", *(f"{text}\n" for text, _ in reports.values())])
    with atomically(Path(file)) as tmp:
        tmp.write_text(text, encoding="utf-8")
    return text
