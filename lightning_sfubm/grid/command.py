"""``lightning-sfubm results``: compute what is missing of a grid, then build its tables and figures."""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path

from lightning_sfubm.errors import ConfigError, DataError
from lightning_sfubm.evaluation.results import write_atomically
from lightning_sfubm.grid.cells import Json, all_cells, cell_path, without_users
from lightning_sfubm.grid.comparisons import FACT_KEYS, comparisons
from lightning_sfubm.grid.runner import run_grid
from lightning_sfubm.grid.spec import Grid, load_grid
from lightning_sfubm.grid.tables import left_out, markdown, ordered
from lightning_sfubm.locks import locked
from lightning_sfubm.methods import METHODS
from lightning_sfubm.quiet import quiet_command_line


def results(argv: list[str]) -> None:
    """Entry point.

    Raises:
        SFUBMError: a bad grid, data that cannot be read, cells that do not belong together, none where only tables are
            wanted, or another process that computes into the output folder.
        SystemExit: with code 1 where runs are left over.
    """
    quiet_command_line(fitting=False)
    parser = argparse.ArgumentParser(
        "lightning-sfubm results",
        description="Run a grid of pairs, methods and seeds. Finished cells are skipped and an interrupted run goes on, so the "
        "command can be stopped and given again. Tables and figures are built from the cells alone.",
    )
    parser.add_argument("--grid", required=True, type=Path, help="YAML file, for instance configs/results/demo.yaml")
    parser.add_argument("--root", help="folder of the real domains, as --data.root of fit")
    parser.add_argument("--out", type=Path, help="folder of runs and cells; by default runs/results/<name of the grid>")
    parser.add_argument("--only", action="append", default=[], metavar="PAIR/RUN/SEED", help="pattern; may be repeated")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="stop after so many minutes; go on next time")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the threads (default 1)")
    parser.add_argument(
        "--tables-only",
        action="store_true",
        help="build tables from the cells there are, also while others are computed",
    )
    parser.add_argument(
        "--publish",
        type=Path,
        metavar="DIR",
        help="also write tables and cells without user data here; what is there already stays in the tables",
    )
    options = parser.parse_args(argv)
    grid = load_grid(options.grid, set(METHODS))
    out = options.out or Path("runs") / "results" / options.grid.stem
    if options.publish and options.publish.resolve() == out.resolve():
        raise ConfigError(
            f"--publish {options.publish} is the output folder itself, whose per-user results would be lost: publish elsewhere"
        )
    # Tables may be looked at while another process computes: cells and tables are written whole.
    with nullcontext() if options.tables_only else locked(out, "--out"):
        _results(options, grid, out)


def _results(options: argparse.Namespace, grid: Grid, out: Path) -> None:
    left: list[str] = []
    if not options.tables_only:
        budget = None if options.budget is None else 60 * options.budget
        left = run_grid(grid, out, options.root, options.only, budget, options.jobs)
    cells = all_cells(out, options.publish)
    tables = ordered(grid, cells)
    facts = comparisons(grid, tables, _published_facts(options.publish))
    outdated = left_out(grid, cells)
    if options.tables_only and not tables and not outdated:
        where = f"{out} holds" if options.publish is None else f"{out} and {options.publish} hold"
        raise ConfigError(
            f"{where} no cell of {options.grid}: leave --tables-only out to compute some, or name the folder of earlier ones "
            "by --out"
        )
    # The text is published: a path of this machine alone would say nothing there.
    source = options.grid.name if options.grid.is_absolute() else options.grid.as_posix()
    text = markdown(grid, tables, facts, source)
    write_atomically(out / "tables.md", text.encode())
    from lightning_sfubm.grid.plots import write_plots

    write_plots(tables, out / "plots")
    if options.publish:
        write_atomically(options.publish / "tables.md", text.encode())
        write_atomically(options.publish / "comparisons.json", json.dumps(facts, indent=1).encode())
        for cell in (cell for methods in tables.values() for seeds in methods.values() for cell in seeds):
            path = cell_path(options.publish, cell["pair"], cell["domain"], cell["method"], cell["seed"])
            write_atomically(path, json.dumps(without_users(cell), indent=1).encode())
        write_plots(tables, options.publish / "plots")
    print(text)
    for sentence in outdated:
        print(sentence)
    print(f"Tables: {out / 'tables.md'}")
    if left:
        print(f"Not complete: {', '.join(left)}. Give the command again to go on.")
        raise SystemExit(1)


def _published_facts(folder: Path | None) -> list[Json]:
    """Comparisons published before, which cannot be made again without their per-user results."""
    file = None if folder is None else folder / "comparisons.json"
    if file is None or not file.is_file():
        return []
    try:
        facts: list[Json] = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON ({error}); restore it or delete it") from error
    if not isinstance(facts, list) or not all(isinstance(fact, dict) and fact.keys() >= FACT_KEYS for fact in facts):
        raise DataError(
            f"{file} is no list of comparisons with {', '.join(sorted(FACT_KEYS))}; restore it or delete it"
        )
    return facts
