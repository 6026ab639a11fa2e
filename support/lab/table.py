"""lab/table.py: the table of `python eval.py RUN [RUN …]`, measured now or read from the runs."""
from __future__ import annotations

from pathlib import Path

from eval import SUBCOMMANDS, __doc__ as COMMANDS, baseline_rows, format_table, row_label, table_rows
from papers.bounds import nearest
from support.formats.files import UserError, read_json
from support.formats.vlm import open_run
from support.plumbing.flags import Parser, add_machine_flags, number, use_machine
from support.worlds.trained import training_sets


def main(argv: list[str]) -> None:
    parser = Parser("eval.py", COMMANDS)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders of train.py")
    table = parser.add_argument_group("the table")
    table.add_argument("--saved", action="store_true", help="the rows that each run measured at its end")
    table.add_argument("--items", "--limit", type=number(least=1, most=10**6), default=400, metavar="N",
                       help="pictures a row (400)")
    table.add_argument("--beams", type=number(least=1, most=1000), default=1, metavar="W",
                       help="beam width; 1 = greedy (1)")
    table.add_argument("--follow-links", action="store_true", help="read pictures behind links, too")
    add_machine_flags(parser)
    args = parser.parse_args(argv)
    if not args.runs:
        raise UserError("give at least one run folder, such as out/mapl-shapes (python train.py writes it), "
                        f"or a subcommand: {', '.join(SUBCOMMANDS)}.")
    first = args.runs[0]
    if not Path(first).exists() and "/" not in first:
        raise UserError(f'"{first}" is neither a run folder nor a subcommand; {nearest(first, SUBCOMMANDS)}')
    if args.saved:
        tables = saved_tables(args.runs)
    else:
        tables = measured_tables(args.runs, args.items, args.beams, use_machine(args), args.follow_links)
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


def measured_tables(runs: list[str], count: int, beams: int, device: str,
                    follow_links: bool = False) -> dict[str, tuple[int, list[dict]]]:
    """The same, measured now."""
    rows, baselines = {}, {}
    for run in runs:
        vlm, tokenizer, facts = open_run(run, device)
        trained = training_sets(facts["settings"], follow_links)
        own, items, _ = table_rows(vlm, tokenizer, trained, count, row_label(Path(run).name, facts), beams)
        world = trained[0]
        rows.setdefault(world.name, []).extend(own)
        baselines[world.name] = baseline_rows(vlm, tokenizer, world, items)
    return {world: (count, rows[world] + baselines[world]) for world in rows}
