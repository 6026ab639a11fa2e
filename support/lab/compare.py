"""The full comparison: captions, questions with 0, 4, 8 examples, ScienceQA's and MME's form.

    python eval.py compare RUN [RUN …]                              on each run's own data
    python eval.py compare RUN --data vqav2:PATH:val --protocol mapl --shots 0,4,8
    python eval.py compare RUN --data scienceqa:PATH --data mme:PATH --predictions FOLDER
    python eval.py compare RUN [RUN …] --paper --format markdown --out table.md
    python eval.py compare RUN --alone                              pictures do not read the words before them

A row for each run, for the run blind, and for chance. Footnotes say why a cell is empty.
"""
from __future__ import annotations

import collections
import csv
import functools
import io
import json
import sys
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from eval import align, mean, row_label
from model import VLM
from papers.bounds import nearest
from support.formats.benchmarks import save_predictions
from support.formats.datasets import FORMATS
from support.formats.files import UserError, atomically, read_json
from support.formats.hub import fetch, is_hub_name
from support.formats.tokenizers import Tokenizer
from support.formats.vlm import open_run
from support.lab.alone import read_alone
from support.lab.measures import (NO_OPEN_QUESTIONS, Cells, EvaluationSet, Settings, chance_cells,
                                  measure_cells, open_set)
from support.lab.protocols import Comparison, PROTOCOLS, learned_chat
from support.lab.unread import given_flags, trained_on
from support.plumbing.flags import Parser, add_machine_flags, number, use_machine
from support.plumbing.start import refuse_unread
from support.worlds import WORLDS, unread_settings
from support.worlds.trained import MAYBE, Unknown, known_sets, name_split

PUBLISHED = Path(__file__).parents[1] / "results" / "published.csv"
OFFICIAL = {"vqav2": "vqav2", "okvqa": "okvqa", "vizwizvqa": "vizwiz", "textvqa": "textvqa", "coco": "coco",
            "karpathy": "coco", "vizwiz": "coco", "textcaps": "textcaps", "scienceqa": "scienceqa",
            "mme": "mme"}                       # kind of data → `save_predictions`


@dataclass
class OpenedRun:
    name: str
    vlm: VLM
    tokenizer: Tokenizer
    facts: dict                                 # its config.json

    @functools.cached_property
    def trained(self) -> list:
        """The data sets that it was trained on; Unknown where they are not on this machine."""
        return known_sets(self.facts)

    def specs(self, settings: Settings) -> list[str]:
        """The data sets that it is asked about: those of the table, or the first that it was trained on."""
        if settings.specs:
            return list(settings.specs)
        trained_on = self.facts.get("settings", {}).get("data")
        if trained_on is None:
            raise UserError(f"{self.name} was trained elsewhere; name what to ask it about: --data SPEC, "
                            "such as --data vqav2:PATH:val.")
        return [trained_on.split(" + ")[0].split(" * ")[0]]

    @property
    def stamp(self) -> str:
        """Another training has another stamp, so its texts are not taken for this one's."""
        return f"{zlib.crc32(json.dumps(self.facts, sort_keys=True).encode()):08x}"


def compare_runs(runs: list[str], settings: Settings = Settings()) -> tuple[list[dict], list[str]]:
    """Rows {"row", "trained", "examples", "cells"} of each run, of the run blind, and of chance; footnotes.

    settings.folder: FOLDER/RUN.jsonl keeps every text, and none is written twice. Beside it lie the
    predictions in each benchmark's official form: RUN-DATA-MEASURE.json, and a folder for MME.
    """
    if settings.protocol and settings.protocol not in PROTOCOLS:
        hint = nearest(settings.protocol, PROTOCOLS)
        raise UserError(f'no protocol is called "{settings.protocol}"; {hint}')
    counts = collections.Counter(spec.split(":")[0] for spec in settings.specs)
    if twice := [kind for kind, n in counts.items() if n > 1]:
        raise UserError(f"--data names {twice[0]} twice, and a table has a column for each kind; ask about "
                        "one at a time.")
    rows, notes, datasets = [], {}, {}
    for run in runs:
        opened = OpenedRun(Path(run).name, *open_run(run, settings.device))
        if settings.alone:
            try:
                read_alone(opened.vlm.bridge)
                opened.name += "-alone"
            except ValueError as e:
                notes[str(e)] = None
        for blind in (False, True):
            row, missing = measure_run(opened, blind, datasets, settings)
            rows.append(row)
            notes |= dict.fromkeys(missing)
    chance: Cells = {}
    for spec, dataset in datasets.items():
        if dataset.missing:
            notes[f"{spec}: {dataset.missing} items are missing, because their pictures cannot be read; no "
                  "cell and no file has them"] = None
        try:
            cells = chance_cells(dataset, settings.shots)
            chance |= {(dataset.kind, *key): x for key, x in cells.items()}
        except UserError as e:
            notes[f"chance is empty: {e}"] = None
    rows.append({"row": "chance", "cells": chance})
    add_overall(rows, [*datasets.values()])
    return rows, [*notes]


def measure_run(run: OpenedRun, blind: bool, datasets: dict[str, EvaluationSet],
                settings: Settings) -> tuple[dict, list[str]]:
    """One row of the table and its footnotes; data sets are opened when the first run needs them."""
    row, notes, start = {"row": f"{run.name}, blind"}, [], time.monotonic()
    if not blind:
        row = row_label(run.name, run.facts)
    row["cells"] = {}
    chat = learned_chat(run.facts, run.tokenizer)
    if not settings.protocol:
        settings = replace(settings, protocol="llava" if chat else "ours")
        if chat:
            notes.append(f"{run.name} answers in conversations: it is asked as LLaVA asks, in the chat "
                         f"template {run.tokenizer.template.name}; --protocol names another form")
    for spec in run.specs(settings):
        if spec not in datasets:
            datasets[spec] = open_set(spec, settings)
        dataset = datasets[spec]
        prefix = f"{run.stamp}, {spec}, {settings.protocol}, seed {settings.seed}, beams {settings.beams}"
        prefix += ", blind" * blind
        file = Path(settings.folder) / f"{run.name}.jsonl" if settings.folder else None
        comparison = Comparison(run.vlm, run.tokenizer, blind, settings.beams, file, prefix)
        form = run.facts.get("settings", {}).get("form", "QCM-LEA")
        cells, predictions, missing = measure_cells(comparison, dataset, settings, form)
        row["cells"] |= {(dataset.kind, *key): x for key, x in cells.items()}
        notes += [f"{run.name}, {text}" for text in missing]
        split = name_split(dataset.asked, run.trained)
        if split == "trained-on":
            notes.append(f"{run.name} was trained on what {spec} asks about: none of its cells is held-out")
        elif split == MAYBE:
            why = "; ".join(other.why for other in run.trained if isinstance(other, Unknown))
            notes.append(f"{run.name} may have been trained on what {spec} asks about, which cannot be known "
                         f"here ({why}): none of its cells is called held-out")
        if settings.folder and dataset.kind not in OFFICIAL:
            notes.append(f"no official file of {dataset.kind}'s predictions is known; their texts are in "
                         f"{settings.folder}.")
        if settings.folder and dataset.kind in OFFICIAL and not blind:
            for measure, lines in predictions.items():
                name = f"{run.name}-{dataset.kind}-{measure}{'' if dataset.kind == 'mme' else '.json'}"
                save_predictions(OFFICIAL[dataset.kind], lines, Path(settings.folder) / name)
                if len(lines) < (whole := dataset.count_questions()):
                    notes.append(f"{name} holds {len(lines)} of the {whole} questions of {spec}; its "
                                 "official evaluation wants all of them (--items)")
    print(f"{row['row']}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    return row, notes


def overall_means(cells: Cells, sets: dict[str, list[str]]) -> Cells:
    """The documents' Overall: the plain mean of a measure over the table's data sets, if none is missing.

        MAPL, 0-shot:  (33.54 + 13.84 + 8.26 + 11.72) / 4 = 16.84        sets: measure → its data sets
    """
    found = {m: [cells.get((name, m)) for name in names] for m, names in sets.items()}
    return {(m,): mean(x) for m, x in found.items() if None not in x}


def add_overall(rows: list[dict], datasets: list[EvaluationSet]) -> None:
    """One generated world: its cells are the table's. Else the table gets the means over data sets."""
    sets = collections.defaultdict(dict)
    for kind, measure in (key for row in rows for key in row["cells"] if len(key) == 2):
        sets[measure][kind] = None
    single = len(datasets) == 1 and not datasets[0].world.finite
    for row in rows:
        if single:
            row["cells"] = {key[1:]: x for key, x in row["cells"].items()}
        else:
            row["cells"] |= overall_means(row["cells"], {m: [*kinds] for m, kinds in sets.items()})


def published_rows(bridges: list[str]) -> tuple[list[dict], list[str]]:
    """The published rows of these bridges' systems with their Overall, and sentences that say what they are.

    They are never on the data of our rows. MME: existence, count, position and color, of 800. A bridge that
    has none gets a sentence alone.
    """
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        systems = [*csv.DictReader(file)]
    has = {system["bridge"] for system in systems}
    rows, notes = [], [f"no published row of {bridge}" for bridge in bridges if bridge not in has]
    for system in (system for bridge in bridges for system in systems if system["bridge"] == bridge):
        cells, sets = {}, collections.defaultdict(list)
        for column, value in system.items():            # a column of numbers is called "measure data-set"
            measure, _, dataset = column.partition(" ")
            if dataset and value:
                cells[dataset, measure] = float(value)
                sets[measure].append(dataset)
        rows.append({"row": f"[{system['system']}]", "trained": system["trained"],
                     "examples": system["examples"], "cells": cells | overall_means(cells, sets)})
        names = ", ".join(dict.fromkeys(dataset for dataset, _ in cells))
        notes.append(f"[{system['system']}] is published, on other data ({names}): {system['source']}")
    return rows, notes


# The text --------------------------------------------------------------------------------------------------

def comparison_columns(rows: list[dict], each: bool) -> list[tuple[tuple[str, ...], str]]:
    """The keys of the cells that are shown, in order, with the heads of their columns.

    The data set of one generated world is its kinds of question, and Overall alone is shown; `each` shows
    kinds of question everywhere.
    """
    keys = dict.fromkeys(key for row in rows for key in row["cells"])
    ours = {key for row in rows if not row["row"].startswith("[") for key in row["cells"]}
    wide = any(key[0] in {*WORLDS, *FORMATS} for key in ours)
    shots = sorted({key[-1] for key in keys if key[-1].endswith("-shot")}, key=lambda m: int(m[:-5]))
    order = ("CIDEr", "B@4", *shots, "SQA", "SQA rank", "MME")
    shown = [key for key in keys if len(key) == 1 or key in ours and len(key) <= 1 + wide + each]
    shown.sort(key=lambda key: (order.index(key[-1]), len(key) == 1, key[:1], len(key) == 2))
    return [(key, "Overall " * ((wide or each) and len(key) == 1) + " ".join(key)) for key in shown]


def format_comparison(rows: list[dict], form: str = "text", each: bool = False) -> str:
    """Rows of `compare_runs` as text, Markdown or CSV: trained parameters, training examples, cells."""
    columns = comparison_columns(rows, each)
    digits, comma = (2, "") if form == "csv" else (1, ",")

    def cell(value) -> str:
        if isinstance(value, float):
            return f"{value:.{digits}f}"
        return f"{value:{comma}}" if isinstance(value, int) else value or ""
    lines = [["", "trained", "examples", *(head for _, head in columns)]]
    for row in rows:
        values = (row.get("trained"), row.get("examples"), *(row["cells"].get(key) for key, _ in columns))
        lines.append([row["row"], *map(cell, values)])
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(lines)
        return out.getvalue().rstrip("\n")
    return align_markdown(lines) if form == "markdown" else align(lines)


def align_markdown(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [[v.rjust(w) if n else v.ljust(w) for n, (v, w) in enumerate(zip(line, widths))]
             for line in lines]
    lines.insert(1, [("-" * (w - 1) + ":") if n else "-" * w for n, w in enumerate(widths)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# The command -----------------------------------------------------------------------------------------------

def make_parser() -> Parser:
    parser = Parser("eval.py compare", __doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders, or published models with --data")
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--data", action="append", default=[], metavar="SPEC",
                       help="another data set than the run's; several give a column each and their Overall")
    asked.add_argument("--protocol", default="",
                       help=f"whose prompts: {' | '.join(PROTOCOLS)} (ours; of a run on conversations llava)")
    asked.add_argument("--shots", default="0,4,8", help="numbers of examples in the prompt (0,4,8)")
    asked.add_argument("--seed", type=number(least=0), default=0, help="draws examples and choices (0)")
    asked.add_argument("--items", "--limit", type=number(least=1, most=10**6), default=400, metavar="N",
                       help="pictures a row (400)")
    asked.add_argument("--beams", type=number(least=1, most=1000), default=1, metavar="W",
                       help="beam width; 1 = greedy (1)")
    asked.add_argument("--alone", action="store_true",
                       help="soft tokens read no word before them, no example and no system prompt")
    asked.add_argument("--follow-links", action="store_true", help="read pictures behind links, too")
    written = parser.add_argument_group("what is written")
    written.add_argument("--predictions", metavar="FOLDER",
                         help="keep every text there, go on from those, and write the official files")
    written.add_argument("--format", default="text", choices=["text", "markdown", "csv"], help="(text)")
    written.add_argument("--each", action="store_true", help="a column for each kind of question, too")
    written.add_argument("--paper", action="store_true", help="published rows of the systems, on other data")
    written.add_argument("--out", metavar="FILE", help="write the table there, too")
    add_machine_flags(parser)
    return parser


def main(argv: list[str]) -> None:
    """Print the table, its footnotes and its minutes; of CSV the footnotes go to standard error."""
    start, parser = time.monotonic(), make_parser()
    args = parser.parse_args(argv)
    shots = [k.strip() for k in args.shots.split(",")]
    if not all(k.isdecimal() and len(k) < 4 for k in shots):
        raise UserError(f'--shots "{args.shots:.40}" is no list of numbers under 1,000; write for example '
                        "0,4,8.")
    if not args.runs:
        raise UserError("give at least one run folder: python eval.py compare out/mapl-shapes.")
    device = use_machine(args)
    refuse_unread_by_data(given_flags(parser, args), args.data or [trained_on(run)[0] for run in args.runs])
    settings = Settings(tuple(args.data), args.protocol, tuple(map(int, shots)), args.items, args.seed,
                        args.beams, args.predictions, device, args.follow_links, args.alone)
    rows, notes = compare_runs(args.runs, settings)
    if args.paper:
        more, sources = published_rows([*dict.fromkeys(map(bridge_of, args.runs))])
        rows, notes = rows + more, notes + sources
    text = format_comparison(rows, args.format, args.each)
    minutes = (time.monotonic() - start) / 60
    prompts = args.protocol or "ours"
    notes = [f'{args.items} pictures a row, seed {args.seed}, prompts "{prompts}"; trained parameters, '
             "training examples; %, CIDEr and BLEU-4 x 100, MME in points (200 a task)",
             "Overall: the plain mean over data sets; of a generated world the mean over its kinds of "
             "question, and MME's sum of tasks", *notes,
             f"{minutes:.1f} minutes on {settings.device}, {torch.get_num_threads()} threads"]
    print(text)
    print("\n" + "\n".join(notes), file=sys.stderr if args.format == "csv" else sys.stdout)
    if args.out:
        with atomically(Path(args.out)) as tmp:
            lines = [text] if args.format == "csv" else [text, "", *notes]
            tmp.write_text("\n".join(lines) + "\n", encoding="utf-8")


def refuse_unread_by_data(given: set[str], specs: list[str]) -> None:
    """A UserError for a flag that was given and that a table of these data sets does not read."""
    shots = {"shots"} if {spec.partition(":")[0] for spec in specs} <= NO_OPEN_QUESTIONS else set()
    refuse_unread(given, unread_settings(specs) | shots, f"data {' + '.join(dict.fromkeys(specs))}")


def bridge_of(run: str) -> str:
    """The bridge of a run; a model that others trained is called by its own name."""
    folder = fetch(run) if is_hub_name(run) else Path(run)
    return read_json(folder / "config.json").get("bridge") or Path(run).name
