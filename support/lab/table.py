"""lab/table.py: the table of `python eval.py RUN [RUN …]`, measured now or read from the runs.

pica, magic and socratic in the place of a RUN are systems without training (lab/answerers.py).
"""
from __future__ import annotations

from pathlib import Path

from eval import (SUBCOMMANDS, __doc__ as COMMANDS, baseline_rows, chance_scores, first_items, format_table,
                  row_label, table_rows)
from papers.bounds import nearest
from support.formats.files import UserError, read_json
from support.formats.vlm import open_run
from support.lab.answerers import (ANSWERERS, Models, add_answerer_flags, answerer_rows,
                                   refuse_unread_flags)
from support.plumbing.flags import Parser, add_machine_flags, number, use_machine
from support.worlds import open_data
from support.worlds.trained import training_sets


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
        if answerers:
            raise UserError(f"--saved: no run has measured {answerers[0]}; leave out --saved.")
        tables = saved_tables(args.runs)
    else:
        runs, device = [run for run in args.runs if run not in ANSWERERS], use_machine(args)
        args.captions_by = args.captions_by or (runs[0] if runs else "")
        tables = measured_tables(runs, args.items, args.beams, device, args.follow_links, answerers,
                                 Models(args, device))
    for world, (count, rows) in tables.items():
        print(f"{world}: {count} pictures a row; accuracy in %, CIDEr, BLEU-4 x 100\n{format_table(rows)}\n")


def saved_tables(runs: list[str]) -> dict[str, tuple[int, list[dict]]]:
    """{world: (pictures per row, rows)} from the results.json of each run, with the last run's baselines."""
    rows, baselines, count = {}, {}, 0
    for run in runs:
        result = read_json(Path(run) / "results.json")
        count = result["items"]
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
        trained = training_sets(facts["settings"], follow_links)
        own, items, _ = table_rows(vlm, tokenizer, trained, count, row_label(Path(run).name, facts), beams)
        world = trained[0]
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
