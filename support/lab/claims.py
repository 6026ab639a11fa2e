"""One miniature experiment per claim of the papers: its runs, its measurements, its verdict.

    python eval.py claims all                           what the documents claim
    python eval.py claims papers                        the point of each paper of papers/
    python eval.py claims zero-init gates --seeds 3
    python eval.py claims all --jobs 8 --out claims.txt
    python eval.py claims zero-init-deep                needs pip install huggingface_hub: SmolLM2
    python eval.py claims papers --kept                 trains nothing: what the finished runs say
    python eval.py claims all --seeds 5 --kept --out support/results/claims.txt         the report kept there

Finished runs in out/claims are kept, so that the command goes on where it was stopped; what they measured is
kept in support/results/claims/runs.jsonl of the project, so that no run there is trained twice. All 111 of
`all` took 318 one-core minutes. The report is printed and written to out/claims/report.txt, its figures to
out/claims/figures; those of another --out FILE to the folder claims beside it.
"""
from __future__ import annotations

import collections
import contextlib
import itertools
import math
import os
import platform
import re
import shlex
import signal
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import data
import train
from eval import accuracy_by_kind, align, answer_accuracy, evaluate, first_items, mean, scalar_scores
from model import VLM
from papers.bounds import nearest
from support.formats.files import UserError, atomically, read_json, write_json
from support.formats.tokenizers import Tokenizer
from support.formats.vlm import open_run
from support.lab.answerers import measure_answerer
from support.lab.attention import gate_history
from support.lab import claims_list, miniatures
from support.lab.claims_figures import draw_claims
from support.lab.claims_store import (KEPT, Results, Store, bundled_towers, is_finished, learning_curve,
                                      loss_lines, seed_values)
from support.lab.claims_list import CIDER, COMMON, MEAN, Arm, Claim, Number, Side
from support.lab.protocols import Comparison, build_prompt, few_shot_examples
from support.lab.unread import given_flags
from support.plumbing.flags import Parser, number
from support.plumbing.start import refuse_unread
from support.plumbing.stop import CODES, Stopped, process_pool
from support.worlds import open_data


CLAIMS = claims_list.CLAIMS | claims_list.DEEP_CLAIMS | miniatures.CLAIMS
ARMS = claims_list.ARMS | miniatures.ARMS
PAPER_COLUMNS = ["", "seeds", "trained", "held-out", "blind", "minutes", "verdicts"]    # of a summary
GROUPS = {"all": claims_list.CLAIMS, "papers": miniatures.CLAIMS}       # names for several


# What can be measured of an arm ----------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainedArm:
    """A finished run, and the held-out items that all seeds are asked about."""
    vlm: VLM                                    # None of a run without a bridge, and so is the tokenizer
    tokenizer: Tokenizer
    items: list[data.Item]
    run: Path

    @classmethod
    def open(cls, run: Path, count: int) -> TrainedArm:
        if "bridge" not in read_json(run / "config.json"):      # only its report is measured
            return cls(None, None, [], run)
        vlm, tokenizer, _ = open_run(str(run), "cpu")
        return cls(vlm, tokenizer, first_items(open_data("shapes"), "test", count), run)

    def own_answers(self, split: str) -> dict[str, float]:
        """VQA accuracy by kind and the mean, about as many items of the world that it was trained on."""
        world = open_data(read_json(self.run / "config.json")["settings"]["data"])
        items = first_items(world, split, len(self.items))
        return scalar_scores(evaluate(self.vlm, self.tokenizer, items, captions=False))


def measure_answers(arm: TrainedArm) -> dict[str, float]:
    """VQA accuracy by kind, the mean over kinds, and that of the pictures with one thing and with four."""
    result = evaluate(arm.vlm, arm.tokenizer, arm.items, captions=False)
    answers, by_things = iter(result["answers"]), collections.defaultdict(list)
    for item in arm.items:
        things = item.about.count(";") + 1
        by_things[things] += [answer_accuracy(q, next(answers)) for q in item.qas]
    counts = {"1 thing": mean(by_things[1] or [0.0]), "4 things": mean(by_things[4] or [0.0])}
    return {**scalar_scores(result), **counts}


def measure_captions(arm: TrainedArm) -> dict[str, float]:
    items = [replace(item, qas=[]) for item in arm.items]
    return {"cider": evaluate(arm.vlm, arm.tokenizer, items)["cider"]}


def measure_blind(arm: TrainedArm) -> dict[str, float]:
    result = evaluate(arm.vlm, arm.tokenizer, arm.items, blind=True)
    return {f"blind {name}": result[name] for name in ("mean", "cider")}


def measure_loss(arm: TrainedArm) -> dict[str, float]:
    """The training loss of the first batch, and its running mean at the end, in nats per learned token."""
    log = loss_lines(arm.run / "log.jsonl")
    return {"first loss": log[0]["loss"], "loss": log[-1]["ema"]}


def measure_gates(arm: TrainedArm) -> dict[str, float]:
    """Mean |gate| over layers and heads, halfway and at the end; at the end also of either half of them."""
    gates = np.abs(gate_history(arm.run)[1]).mean(-1)                       # (logged steps, adapted layers)
    lower, upper = np.array_split(gates[-1], 2)
    found = {"lower layers": lower, "upper layers": upper, "gate halfway": gates[len(gates) // 2],
             "gate at the end": gates[-1]}
    return {name: float(g.mean()) for name, g in found.items()}


def measure_reasons(arm: TrainedArm) -> dict[str, float]:
    """VQA accuracy of the answer in a text that reasons before or after it, about its own world."""
    return arm.own_answers("test")


def measure_shots(arm: TrainedArm) -> dict[str, float]:
    items = arm.items[:len(arm.items) // 4]
    found = {f"{k} shots": few_shot_accuracy(arm.vlm, arm.tokenizer, items, k) for k in (0, 1, 4, 8)}
    return found | {"behind text": few_shot_accuracy(arm.vlm, arm.tokenizer, items, 1, pictured=False)}


def measure_pages(arm: TrainedArm) -> dict[str, float]:
    return {f"{k} pictures before": few_shot_accuracy(arm.vlm, arm.tokenizer, arm.items, k) for k in (0, 3)}


def few_shot_accuracy(vlm: VLM, tokenizer: Tokenizer, items: list[data.Item], k: int,
                      pictured: bool = True) -> float:
    """Mean VQA accuracy behind k other pictures of training, each with a question and its answer.

    pictured=False: behind the questions and answers alone.
    """
    train_split = data.Shapes()
    asked = []
    for item in items:
        examples = few_shot_examples(train_split, item, k)
        examples = examples if pictured else [replace(e, image=None) for e in examples]
        asked += [(item, q, examples) for q in item.qas]
    documents = [build_prompt(tokenizer, "ours", item, q, examples) for item, q, examples in asked]
    pictures = [[*(examples if pictured else []), item] for item, _, examples in asked]
    keys = [str(n) for n in range(len(asked))]
    texts = Comparison(vlm, tokenizer).texts(keys, documents, pictures, 12)
    return accuracy_by_kind([q for _, q, _ in asked], texts)["mean"]


MEASUREMENTS: dict[str, Callable[[TrainedArm], dict[str, float]]] = {       # {name of a Number: its value}
    "answers": measure_answers, "captions": measure_captions, "blind": measure_blind, "loss": measure_loss,
    "gates": measure_gates, "reasons": measure_reasons, "shots": measure_shots, "pages": measure_pages,
    **miniatures.MEASUREMENTS,
}


# The runs --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Setup:
    """How the experiments are run."""
    seeds: int = 3                              # runs per arm, seeds 0 … seeds − 1
    jobs: int = 2                               # runs at a time, one core each
    runs: str | Path = "out/claims"             # a folder of run folders
    report: str | Path = "out/claims/report.txt"
    common: tuple[str, ...] = COMMON            # flags of a run, ahead of its arm's own
    count: int = 200                            # held-out pictures
    store: Path = KEPT

    @property
    def figures(self) -> Path:
        """The folder of the report's figures, beside it."""
        return Path(self.report).parent / ("figures" if self.report == Setup.report else "claims")


def arm_folder(runs: str | Path, arm: str, seed: int) -> str:
    return str(Path(runs) / f"{re.sub('[^a-z0-9]+', '-', arm.lower()).strip('-')}-s{seed}")


RUN_OF = re.compile(r"\{(.+?)\}")                       # in an answerer's flags: an arm whose run it reads


def arm_flags(name: str, arm: Arm, seed: int, setup: Setup) -> list[str]:
    """The command line of an arm's run, or the flags of its answerer."""
    if arm.answerer:
        return [RUN_OF.sub(lambda other: arm_folder(setup.runs, other[1], seed), flag) for flag in arm.flags]
    start = ["--init", arm_folder(setup.runs, arm.start, seed)] if arm.start else []
    out = arm_folder(setup.runs, name, seed)
    return [*setup.common, *arm.flags, *start, "--seed", str(seed), "--out", out]


def run_identity(name: str, arms: dict[str, Arm], seed: int, setup: Setup) -> dict:
    """{"flags" of an arm's run, "before": {other arm: its flags}, "towers"}: what a finished run counts for.

    before: the runs that it starts from or reads, and those before them. Other steps there make another run,
    and so do other bundled towers.
    """
    flags = {other: arm_flags(other, arms[other], seed, setup) for other in with_those_before({name}, arms)}
    return {"flags": flags.pop(name), "before": flags, "towers": bundled_towers()}


def run_arm(name: str, arm: Arm, seed: int, setup: Setup, identity: dict) -> dict:
    """Train an arm unless its finished run lies in its folder, and measure what is missing.

    Returns and keeps in seen.json: {"flags", "before", "towers", "seconds", "steps", "trained" (parameters),
    "curve", measurement: {name: number}}.
    """
    run, flags = Path(arm_folder(setup.runs, name, seed)), identity["flags"]
    done = read_json(run / "seen.json") if (run / "seen.json").exists() else {}
    if arm.answerer and not is_finished(done, identity):
        torch.set_num_threads(1)
        start, scores = time.monotonic(), measure_answerer(arm.answerer, flags, seed, setup.count // 2)
        done = identity | {"seconds": time.monotonic() - start, "steps": 0, "trained": 0, "curve": [],
                           arm.answerer: scores}
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "seen.json", done)
    if not is_finished(done, identity):
        run.mkdir(parents=True, exist_ok=True)
        with (open(run / "output.txt", "w", encoding="utf-8") as file, contextlib.redirect_stdout(file),
              contextlib.redirect_stderr(file)):
            train.main(flags)
        config = read_json(run / "config.json")
        done = identity | {"seconds": config["seconds"], "steps": config["steps"],
                           "trained": config.get("trained_parameters"),
                           "curve": learning_curve(run / "log.jsonl")}
        write_json(run / "seen.json", done)
    missing = [measure for measure in arm.measures if measure not in done]
    if missing:
        torch.set_num_threads(1)
        trained = TrainedArm.open(run, setup.count)
        done |= {measure: MEASUREMENTS[measure](trained) for measure in missing}
        write_json(run / "seen.json", done)
    return done


def needed_arms(claims: list[Claim], arms: dict[str, Arm]) -> set[str]:
    """The arms of these claims, and those before them."""
    return with_those_before({name for claim in claims for name in claim.arms}, arms)


def with_those_before(needed: set[str], arms: dict[str, Arm]) -> set[str]:
    """These arms, those whose runs they start from or read, and so on."""
    while others := {other for name in needed for other in arms_before(arms[name])} - needed:
        needed = needed | others
    return needed


def arms_before(arm: Arm) -> list[str]:
    """The arms whose runs it starts from or reads."""
    return [arm.start] * bool(arm.start) + [other for flag in arm.flags for other in RUN_OF.findall(flag)]


def kept_result(name: str, arms: dict[str, Arm], seed: int, setup: Setup, store: Store) -> dict | None:
    """What is kept of an arm's run, in the store or in its folder, if it is finished and measured."""
    identity, measures = run_identity(name, arms, seed, setup), arms[name].measures
    file = Path(arm_folder(setup.runs, name, seed)) / "seen.json"
    if not store.find(name, seed, identity, measures) and file.exists():
        if is_finished(done := read_json(file), identity, measures):
            store.keep(name, seed, done)
    return store.find(name, seed, identity, measures)


def kept_results(claim: Claim, setup: Setup, arms: dict[str, Arm], store: Store) -> Results:
    """{(arm, seed): its result} of the seeds, from 0 on, of which all runs of this claim are kept."""
    results, needed = {}, needed_arms([claim], arms)
    for seed in range(setup.seeds):
        found = {(name, seed): kept_result(name, arms, seed, setup, store)
                 for name in arms if name in needed}
        if not all(found.values()):
            break
        results |= found
    return results


def stage(name: str, arms: dict[str, Arm]) -> int:
    """How many runs stand before an arm's own."""
    return max((1 + stage(other, arms) for other in arms_before(arms[name])), default=0)


@contextlib.contextmanager
def finished_runs_are_kept() -> Iterator[None]:
    """What ends the runs from outside says so, and how to go on."""
    try:
        yield
    except BrokenProcessPool:
        raise UserError("a run was ended from outside, perhaps because memory is full (--jobs 1 needs less); "
                        "finished runs are kept, and the same command goes on with the others.") from None
    except KeyboardInterrupt as e:
        raise Stopped("stopped; finished runs are kept, and the same command goes on with the others",
                      e.code if isinstance(e, Stopped) else CODES[signal.SIGINT]) from None


@finished_runs_are_kept()
def run_arms(names: set[str], setup: Setup, arms: dict[str, Arm]) -> Results:
    """{(arm, seed): what `run_arm` returns}; an arm that others start from or read runs before them.

    What is kept does not run again, unless a run that is missing starts from it.
    """
    results, stages, store = {}, sorted({stage(name, arms) for name in names}), Store(setup.store)

    def runs(name: str, seed: int) -> bool:
        users = [other for other in names if name in arms_before(arms[other])]
        return not kept(name, seed) or any(runs(other, seed) for other in users)

    def kept(name: str, seed: int) -> dict | None:
        return kept_result(name, arms, seed, setup, store)
    for seed, n in itertools.product(range(setup.seeds), stages):
        here = [name for name in arms if name in names and stage(name, arms) == n]
        results |= {(name, seed): kept(name, seed) for name in here if not runs(name, seed)}
        ready = [name for name in here if runs(name, seed)]
        work = [(name, replace(arms[name], measures=()) if kept(name, seed) else arms[name], seed, setup,
                 run_identity(name, arms, seed, setup)) for name in ready]
        with process_pool(setup.jobs) if setup.jobs > 1 else contextlib.nullcontext(map) as spread:
            done = spread(run_arm, *zip(*work)) if work else ()
            for name, result in zip(ready, done):
                results[name, seed] = kept(name, seed)
                minutes = result["seconds"] / 60
                print(f"seed {seed}: {name}: {result['steps']} steps, {minutes:.1f} minutes", flush=True)
    return results


# The verdicts ----------------------------------------------------------------------------------------------

T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)      # 95 % of Student's t, 1 to 9 d.f.


def judge(left: list[float], right: list[float], relation: str = ">") -> str:
    """The verdict on "left > right", a number of each seed on both sides: shown, opposite, not shown.

    A one-sided t test at 5 %, paired by seed: two arms of a seed see the same data in the same order. With
    the differences d_i of n seeds, their mean d, their standard deviation s and the error e = s / √n of d:
    shown where d > t e, t = T95 of n − 1 degrees of freedom; opposite where d < −t e; else not shown. "≥" (no
    worse): shown where d ≥ −e, for few seeds that vary widely are no evidence. One seed shows nothing: "one
    seed".
    """
    d = np.subtract(left, right)
    if len(d) < 2:
        return "one seed"
    error, t = d.std(ddof=1) / math.sqrt(len(d)), T95[min(len(d) - 2, len(T95) - 1)]
    if d.mean() < -t * error:
        return "opposite"
    return "shown" if d.mean() > t * error or relation == "≥" and d.mean() >= -error else "not shown"


def claim_report(name: str, claim: Claim, results: Results, seeds: int) -> tuple[str, list[str]]:
    """The claim, its table (mean ± standard deviation over seeds) and its verdicts as text; the verdicts."""
    rows, verdicts = [["", *(number.name for number in claim.columns)]], []
    for arm in (arm for arm, seed in results if seed == 0 and arm in claim.arms):
        found = [seed_values(results, seeds, arm, number) for number in claim.columns]
        rows.append([arm, *(f"{mean(v):.3g} ± {np.std(v, ddof=seeds > 1):.2g}" if v else "" for v in found)])
    lines = [f"    {line}" for line in align(rows).splitlines()]

    def side_values(side: Side) -> list[float]:
        return seed_values(results, seeds, side.arm, side.number or claim.columns[0])
    for e in claim.expect:
        left, right = side_values(e.left), side_values(e.right)
        verdicts.append(judge(left, right, e.relation))
        paper = f"   (document: {e.paper})" if e.paper else ""
        lines.append(f"    {verdicts[-1]:9s}  {e.left} {e.relation} {e.right}: {mean(left):.4g} against "
                     f"{mean(right):.4g}{paper}")
    if claim.note:
        lines.append(textwrap.fill(claim.note, 118, initial_indent="    ", subsequent_indent="    "))
    title = f"{name}, {seeds} seed{'s' * (seeds > 1)}: {claim.says} ({claim.source})"
    return "\n".join([title, *lines]), verdicts


def paper_row(claim: Claim, results: Results, seeds: int) -> list[str]:
    """Of the paper's own arm: trained parameters, a number and that of the same model
    with zeroed pictures ("-" where it was not measured), minutes of a run."""
    arm = claim.own_arm

    def shown(number: Number) -> str:
        values = seed_values(results, seeds, arm, number)
        return f"{mean(values):.3g} {number.unit}" if values else "-"

    def blind(number: Number) -> Number:
        return replace(number, name=f"blind {number.name}")
    columns = (*claim.columns, MEAN, CIDER)
    number = next((n for n in columns if "-" not in (shown(n), shown(blind(n)))), columns[0])
    trained = results[arm, 0].get("trained")
    minutes = mean([results[arm, seed]["seconds"] for seed in range(seeds)]) / 60
    return ["-" if trained is None else f"{trained:,}", shown(number), shown(blind(number)), f"{minutes:.1f}"]


def group_names(names: list[str]) -> list[str]:
    """The same with the name of a group in the place of all of its claims."""
    for group, members in GROUPS.items():
        if names[:len(members)] == [*members]:
            return [group, *group_names(names[len(members):])]
    return names


def run_claims(names: list[str], setup: Setup = Setup(), claims: dict[str, Claim] = CLAIMS,
               arms: dict[str, Arm] = ARMS, kept: bool = False) -> str:
    """Train and measure every arm of these claims, write the report to setup.report, and return it.

    kept: train nothing; the report is about the claims and the seeds whose runs are finished.
    """
    asked = " ".join(group_names(names))
    results: Results = {}
    if kept:
        store, seeds = Store(setup.store), {}
        for name in names:
            found = kept_results(claims[name], setup, arms, store)
            seeds[name] = 1 + max((seed for _, seed in found), default=-1)
            results |= found
        names = [name for name in names if seeds[name]]
        if not names:
            raise UserError(f"neither {setup.runs} nor {setup.store} has all runs of one of these claims; "
                            "leave out --kept.")
    else:
        seeds = dict.fromkeys(names, setup.seeds)
        results = run_arms(needed_arms([claims[name] for name in names], arms), setup, arms)
    reports = {name: claim_report(name, claims[name], results, seeds[name]) for name in names}
    minutes = sum(result["seconds"] for result in results.values()) / 60
    asked += f" --seeds {setup.seeds}" * (setup.seeds != Setup.seeds) + " --kept" * kept
    if setup.report != Setup.report:
        asked += f" --out {shlex.quote(str(setup.report))}"
    spread = " or ".join(map(str, sorted({seeds[name] for name in names})))
    head = (f"python eval.py claims {asked}: {spread} seed{'s' * (spread != '1')} a claim, "
            f"{len(results)} runs, {minutes:.0f} minutes of training on one core each ({machine()}); a run, "
            f"where its claim says nothing else: {' '.join(setup.common)}\n"
            "Mean ± standard deviation over seeds: accuracy in %, CIDEr, loss in nats per learned token; "
            f"{setup.count} held-out pictures, {setup.count // 2} for what answers without training, "
            f"{setup.count // 4} behind examples.\n"
            "The documents' numbers are of other data and models: compare the direction. The verdicts are "
            "computed by a t test paired by seed (support/lab/claims.py, judge).")
    summary = [f"    {name:12s}{', '.join(verdicts)}" for name, (_, verdicts) in reports.items()
               if name not in miniatures.CLAIMS]
    rows = {name: [name, str(seeds[name]), *paper_row(claims[name], results, seeds[name])]
            for name in reports if name in miniatures.CLAIMS}
    if rows:
        *columns, last = PAPER_COLUMNS
        verdicts = [last, *(", ".join(reports[name][1]) for name in rows)]
        table = align([columns, *rows.values()]).splitlines()
        summary += [f"    {line}  {verdict}" for line, verdict in zip(table, verdicts)]
    text = "\n".join([head, "", *summary, "", *(f"{text}\n" for text, _ in reports.values())])
    with atomically(Path(setup.report)) as tmp:
        tmp.write_text(text, encoding="utf-8")
    with contextlib.suppress(UserError):                # without matplotlib there are no figures
        draw_claims({name: claims[name] for name in names}, results, seeds, setup,
                    {name: verdicts for name, (_, verdicts) in reports.items()})
    return text


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, PyTorch {torch.__version__.partition('+')[0]}"


def main(argv: list[str]) -> None:
    parser = Parser("eval.py claims", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME",
                        help=f"all, papers, or some of: {', '.join(CLAIMS)}")
    parser.add_argument("--seeds", type=number(least=1, most=1000), default=3, metavar="N",
                        help="runs per arm (3)")
    parser.add_argument("--jobs", type=number(least=1, most=256), default=2, metavar="N",
                        help="runs at a time, one core each (2)")
    parser.add_argument("--out", default=Setup.report, metavar="FILE",
                        help=f"the report ({Setup.report}); its figures lie beside it")
    parser.add_argument("--kept", action="store_true",
                        help="train nothing: report the claims and seeds whose runs are finished")
    args = parser.parse_args(argv)
    if args.kept:
        refuse_unread(given_flags(parser, args), {"jobs"}, "--kept")
    if not args.names:
        raise UserError(f"which claims? Write all, papers, or some of {', '.join(CLAIMS)}.")
    names = [member for name in args.names for member in GROUPS.get(name, [name])]
    for name in names:
        if name not in CLAIMS:
            raise UserError(f'unknown claim "{name}"; {nearest(name, [*GROUPS, *CLAIMS])}')
    print(run_claims(names, Setup(args.seeds, args.jobs, report=args.out), kept=args.kept))
