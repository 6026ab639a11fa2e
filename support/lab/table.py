"""lab/table.py: the table of `python eval.py RUN [RUN …]`, measured now or read from the runs.

pica, magic and socratic in the place of a RUN are systems without training (lab/answerers.py).
"""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import data
from eval import (SUBCOMMANDS, __doc__ as COMMANDS, baseline_rows, chance_scores, first_items, format_table,
                  row_label, table_rows, vision_features)
from model import IGNORE, VLM
from papers.bounds import nearest
from support.formats.chat import TEMPLATES
from support.formats.files import RUN, UserError, read_json
from support.formats.vlm import open_run
from support.lab.answerers import (ANSWERERS, Models, add_answerer_flags, answerer_rows,
                                   refuse_unread_flags)
from support.lab.protocols import log_likelihoods
from support.lab.unread import given_flags, trained_on
from support.plumbing.flags import Parser, add_machine_flags, number, use_machine
from support.plumbing.start import refuse_unread
from support.worlds import NO_ANSWERS, open_data, open_split, take_items, unread_settings
from support.worlds.trained import name_split, training_sets


def main(argv: list[str]) -> None:
    parser = Parser("eval.py", COMMANDS)
    parser.add_argument("runs", nargs="*", metavar="RUN",
                        help=f"run folders of train.py; {', '.join(ANSWERERS)}: see below")
    table = parser.add_argument_group("the table")
    table.add_argument("--saved", action="store_true", help="the rows that each run measured at its end")
    table.add_argument("--items", "--limit", type=number(least=1, most=10**6), default=400, metavar="N",
                       help="pictures a row (400)")
    table.add_argument("--beams", type=number(least=1, most=1000), default=1, metavar="W",
                       help="beam width; 1 = greedy (1)")
    table.add_argument("--follow-links", action="store_true", help="read pictures behind links, too")
    add_answerer_flags(parser)
    add_machine_flags(parser)
    args = parser.parse_args(argv)
    answerers = [name for name in args.runs if name in ANSWERERS]
    refuse_unread_flags(args, answerers)
    if not args.runs:
        raise UserError("give at least one run folder, such as out/mapl-shapes (python train.py writes it), "
                        f"or a subcommand: {', '.join(SUBCOMMANDS)}.")
    first, known = args.runs[0], [*SUBCOMMANDS, *ANSWERERS]
    if first not in ANSWERERS and not Path(first).exists() and "/" not in first:
        raise UserError(f'"{first}" is neither a run folder nor a subcommand; {nearest(first, known)}')
    if args.saved:
        measured = {"items", "beams", "follow_links", "device", "offline"}
        refuse_unread(given_flags(parser, args), measured, "--saved")
        if answerers:
            raise UserError(f"--saved: no run has measured {answerers[0]}; leave out --saved.")
        tables = saved_tables(args.runs)
    else:
        runs, device = [run for run in args.runs if run not in ANSWERERS], use_machine(args)
        refuse_unread_by_runs(given_flags(parser, args), runs)
        args.captions_by = args.captions_by or (runs[0] if runs else "")
        tables = measured_tables(runs, args.items, args.beams, device, args.follow_links, answerers,
                                 Models(args, device))
    for world, (count, rows) in tables.items():
        what = "loss: mean -log p of a learned token, in the run's own form" if "loss" in rows[0] else \
            "accuracy in %, CIDEr, BLEU-4 x 100"
        print(f"{world}: {count} pictures a row; {what}\n{format_table(rows)}\n")


def refuse_unread_by_runs(given: set[str], runs: list[str]) -> None:
    """A UserError for a flag that was given and that none of these runs reads, nor an answerer."""
    sets = [trained_on(run) for run in runs]
    if not any(has_answers(first) for first, *_ in sets):
        refuse_unread(given, {"beams"}, "a table without a run that writes texts")
    specs = [*dict.fromkeys(sum(sets, []))] or ["shapes"]
    refuse_unread(given, unread_settings(specs), f"data {' + '.join(specs)}")


def saved_tables(runs: list[str]) -> dict[str, tuple[int, list[dict]]]:
    """{world: (pictures per row, rows)} from the results.json of each run, with the last run's baselines."""
    rows, baselines, count = {}, {}, 0
    for run in runs:
        file = Path(run) / "results.json"
        result = read_json(file, f"{RUN} that has ended, or leave out --saved to measure it now")
        if not result.keys() >= {"world", "items", "rows"}:
            raise UserError(f"{file}: this run has no table, and its numbers stand in this file; leave out "
                            "--saved to measure now what a bridge has learned.")
        count = result["items"]
        if not result["rows"]:
            raise UserError(f"{run}/results.json: holds no row; leave out --saved to measure the run now.")
        own = [row for row in result["rows"] if ", " in row["row"]]
        own = [{**row, "row": f"{Path(run).name}, {row['row'].split(', ')[-1]}"} for row in own]
        rows.setdefault(result["world"], []).extend(own)
        baselines[result["world"]] = [row for row in result["rows"] if ", " not in row["row"]]
    return {world: (count, rows[world] + baselines[world]) for world in rows}


def measured_tables(runs: list[str], count: int, beams: int, device: str, follow_links: bool = False,
                    answerers: list[str] = (),
                    models: Models | None = None) -> dict[str, tuple[int, list[dict]]]:
    """The same, measured now; answerers stand in every table, or without runs in one of shapes."""
    rows, baselines, worlds = {}, {}, {}
    for run in runs:
        vlm, tokenizer, facts = open_run(run, device)
        trained = training_sets(facts["settings"], follow_links, facts.get("data_digests"))
        world, label = trained[0], row_label(Path(run).name, facts)
        if not has_answers(world.name):
            own = loss_rows(vlm, tokenizer, trained, count, label, facts["settings"])
            rows.setdefault(world.name, []).extend(own)
            worlds[world.name], baselines[world.name] = (world, take_items(held_out_of(world), count)), []
            continue
        form = facts["settings"].get("form") or "QCM-LEA"
        own, items, _ = table_rows(vlm, tokenizer, trained, count, label, beams, form)
        rows.setdefault(world.name, []).extend(own)
        worlds[world.name] = world, items
        baselines[world.name] = baseline_rows(vlm, tokenizer, world, items)
    if not runs:
        world = open_data("shapes")
        items = first_items(world, world.held_out, count)
        rows[world.name], worlds[world.name] = [], (world, items)
        baselines[world.name] = [{"row": "chance (commonest answer)", **chance_scores(world, items)}]
    for name, (world, items) in worlds.items():
        rows[name] += answerer_rows(answerers, models, world, items)
    return {world: (count, rows[world] + baselines[world]) for world in rows}


def held_out_of(world):
    return open_split(world, world.held_out)


def has_answers(name: str) -> bool:
    """Whether a data set's items have right answers or captions; conversations and pages have none."""
    return name.partition(":")[0] not in NO_ANSWERS


@torch.no_grad()
def loss_rows(vlm: VLM, tokenizer, trained: list, count: int, label: dict, settings: dict) -> list[dict]:
    """The rows of a run on conversations or pages: its loss on held-out and seen items, and blind.

    The documents are those of training, in the chat template that the run was trained in.
    """
    template = TEMPLATES[settings["template"]] if settings.get("template") else None
    name, sizes = label["row"], {k: v for k, v in label.items() if k != "row"}
    world, held_out = trained[0], held_out_of(trained[0])
    rows = []
    for kind, split, blind in ((name_split(held_out, trained), held_out, False),
                               ("seen", open_split(world, world.seen), False), ("blind", held_out, True)):
        items = take_items(split, count, settings.get("turns", 5))
        pictures = [(n, replace(item, image=p)) for n, item in enumerate(items) for p in item.pictures]
        features = vision_features(vlm, [item for _, item in pictures], blind)
        documents = [data.training_document(item, tokenizer, template=template) for item in items]
        places = [[row for row, (owner, _) in enumerate(pictures) if owner == n] for n in range(len(items))]
        learned = sum(label != IGNORE for d in documents for label in d.labels)
        loss = -sum(log_likelihoods(vlm, documents, features, places, batch=16)) / learned
        rows.append({"row": f"{name}, {kind}", **(sizes if kind != "blind" else {}), "loss": loss})
    return rows
