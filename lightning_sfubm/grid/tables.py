"""Tables of a results grid, built from its cells alone."""

import statistics
from collections import defaultdict
from typing import Any
from urllib.parse import quote

from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.significance import wilson_interval
from lightning_sfubm.grid.cells import METRICS, SLICES, Json
from lightning_sfubm.grid.comparisons import by_seed
from lightning_sfubm.grid.notes import table_notes
from lightning_sfubm.grid.spec import Grid


def ordered(grid: Grid, cells: list[Json]) -> dict[tuple[str, str], dict[str, list[Json]]]:
    """Cells by (pair, domain), then by method in the order of the grid; the seeds of a method in rising order.

    Cells that are not of the grid, or not known to be of the settings it has now, are left out; of two cells of one place
    and seed the first counts. Labels are those the grid has now.

    Raises:
        DataError: the cells of one domain were computed on different data or candidate lists.
    """
    order = {m: i for i, m in enumerate(dict.fromkeys(m for run in grid.runs for m in run.rows.values()))}
    settings, labels, rows = grid.settings(), grid.labels(), grid.rows()
    placed: set[tuple[Any, ...]] = set()
    tables: dict[tuple[str, str], dict[str, list[Json]]] = defaultdict(dict)
    for cell in sorted(cells, key=lambda c: (c["pair"], c["domain"], order.get(c["method"], len(order)), c["seed"])):
        place = (*_place(cell), cell["domain"])
        if place not in placed and _place(cell) in settings and _current(cell, settings, rows):
            placed.add(place)
            named = {**cell, "label": labels.get(cell["method"], cell["label"])}
            tables[cell["pair"], cell["domain"]].setdefault(cell["method"], []).append(named)
    for (pair, domain), methods in tables.items():
        hashes = {cell["candidate_hash"] for seeds in methods.values() for cell in seeds}
        if len(hashes) > 1:
            raise DataError(
                f"cells of {pair}, {domain} stand on {len(hashes)} different candidate lists: the data or its settings "
                "changed between runs; run the grid again to compute the stale ones"
            )
    return dict(tables)


def left_out(grid: Grid, cells: list[Json]) -> list[str]:
    """What to tell of cells that are not in the tables, for their settings are others than the grid has now, or unknown."""
    settings, rows = grid.settings(), grid.rows()
    unknown = [cell for cell in cells if cell.get("settings_hash") is None]
    known = [cell for cell in cells if cell.get("settings_hash") is not None and _place(cell) in settings]
    stale = [cell for cell in known if not _current(cell, settings, rows)]
    told = (
        ("computed with other settings, or of another row, than the grid has now", stale),
        ("not known to be current, for they do not say what settings they were computed with", unknown),
    )
    return [f"Left out, {why}: {', '.join(dict.fromkeys(map(_name, kind)))}." for why, kind in told if kind]


def _current(cell: Json, settings: dict[tuple[str, str, int], str], rows: dict[tuple[str, str, int], str]) -> bool:
    """Whether a cell of the grid is of the settings and of the row that it has there now."""
    place = _place(cell)
    return cell.get("settings_hash") == settings[place] and cell.get("row", rows[place]) == rows[place]


def _place(cell: Json) -> tuple[str, str, int]:
    return cell["pair"], cell["method"], cell["seed"]


def _name(cell: Json) -> str:
    return "/".join(map(str, _place(cell))) + ("" if "per_user" in cell else " (published)")


def summary(seeds: list[Json]) -> Json:
    """One table row from the cells of a method: means over seeds, and of Hit@1 its spread and the interval about its mean.

    The interval is Wilson's for the row's number of users, to whom further seeds add nobody.
    """
    first = seeds[0]
    row: Json = {key: first[key] for key in ("method", "label", "group", "users", "trainable_params", "num_candidates")}
    row["seeds"] = [cell["seed"] for cell in seeds]
    for name in METRICS:
        values = [cell["metrics"][name]["value"] for cell in seeds]
        row[name] = None if None in values else statistics.mean(values)
        row[f"{name} sd"] = statistics.stdev(values) if len(values) > 1 and None not in values else None
    estimate = None if row["hit@1"] is None else wilson_interval(row["hit@1"] * row["users"], row["users"])
    row["hit@1 interval"] = [None, None] if estimate is None else [estimate.low, estimate.high]
    row["slices"] = {name: _mean(cell["slices"][name]["hit@1"]["value"] for cell in seeds) for name in SLICES}
    for name in ("train_cpu_s", "cpu_s", "wall_s", "peak_rss_mb"):
        row[name] = _mean(cell.get(name) for cell in seeds)
    return row


def plot_name(pair: str, domain: str, kind: str) -> str:
    """File name of a figure of a table.

    Args:
        pair: first part of the table's heading.
        domain: second part of it.
        kind: ``"hit"`` or ``"cost"``.
    """
    return f"{pair}_{domain}_{kind}.png".replace(", ", "_").replace(" ", "_")


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def markdown(
    grid: Grid, tables: dict[tuple[str, str], dict[str, list[Json]]], facts: list[Json], source: str | None = None
) -> str:
    """All tables as Markdown, with what their columns mean.

    Args:
        grid: gives the title.
        tables: see :func:`ordered`.
        facts: see :func:`comparisons`.
        source: path of the grid file as it can be given again; ``None`` = not told.
    """
    cells = [cell for methods in tables.values() for seeds in methods.values() for cell in seeds]
    lines = [f"# {grid.title}", "", *(f"- {note}" for note in table_notes(cells, source)), ""]
    for (pair, domain), methods in tables.items():
        rows = [summary(seeds) for seeds in methods.values()]
        hits, costs = (f"plots/{quote(plot_name(pair, domain, kind))}" for kind in ("hit", "cost"))
        lines += [f"## {pair}: {domain}", "", f"Figures: [Hit@1]({hits}), [quality beside cost]({costs}).", ""]
        lines += _table(
            ["method", "Hit@1", "NDCG@10", "full NDCG@10", "valid", "users", "seeds", "train CPU-s", "rank CPU-s"],
            [
                [
                    row["label"],
                    _hit(row),
                    _num(row["ndcg@10"]),
                    _num(row["full_ndcg@10"], 4),
                    _num(row["valid_ratio"], 2),
                    f"{row['users']:,}",
                    str(len(row["seeds"])),
                    seconds(row["train_cpu_s"]),
                    seconds(row["cpu_s"]),
                ]
                for row in rows
            ],
        )
        lines += ["", "Hit@1 by slice, peak memory of the run, and parameters trained:", ""]
        lines += _table(
            ["method", *SLICES, "peak MB", "parameters"],
            [
                [
                    row["label"],
                    *(_num(row["slices"][name]) for name in SLICES),
                    _num(row["peak_rss_mb"], 0),
                    "–" if row["trainable_params"] is None else f"{row['trainable_params']:,}",
                ]
                for row in rows
            ],
        )
        lines.append("")
    if facts:
        lines += ["## Paired differences in Hit@1 and full-catalogue NDCG@10", ""]
        lines += _table(
            [
                *(
                    "pair: domain",
                    "difference",
                    "Hit@1 [95 %]",
                    "by seed",
                    "p (sign flips)",
                    "p (Holm)",
                    "full NDCG@10 [95 %]",
                ),
                *("users", "seeds"),
            ],
            [
                [
                    f"{fact['pair']}: {fact['domain']}",
                    f"{fact['label_a']} − {fact['label_b']}",
                    f"{fact['difference']:+.3f} [{fact['low']:+.3f}, {fact['high']:+.3f}]",
                    ", ".join(f"{value:+.3f}" for value in by_seed(tables, fact)) or "–",
                    f"{'≈ ' if fact.get('p_approximate') else ''}{fact['p_flip']:.2g}",
                    f"{fact['p_holm']:.2g}",
                    _full(fact),
                    f"{fact['users']:,}",
                    str(fact["seeds"]),
                ]
                for fact in facts
            ],
        )
    return "\n".join(lines) + "\n"


def _full(fact: Json) -> str:
    """The difference in full-catalogue NDCG@10, which earlier published facts do not have."""
    if fact.get("full_difference") is None:
        return "–"
    return f"{fact['full_difference']:+.4f} [{fact['full_low']:+.4f}, {fact['full_high']:+.4f}]"


def _hit(row: Json) -> str:
    if row["hit@1"] is None:
        return "–"
    if row["hit@1 sd"] is not None:
        return f"{row['hit@1']:.3f} ± {row['hit@1 sd']:.3f}"
    low, high = row["hit@1 interval"]
    return f"{row['hit@1']:.3f} [{low:.3f}, {high:.3f}]"


def _num(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def seconds(value: float | None) -> str:
    """Whole seconds; less than one, where there was work, is ``<1``, and ``None`` a dash."""
    return "<1" if value is not None and 0 < value < 1 else _num(value, 0)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
