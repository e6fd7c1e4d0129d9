"""Tables of a results grid, built from its cells alone."""

import statistics
from collections import defaultdict
from typing import Any
from urllib.parse import quote

import numpy as np

from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.facts import plain
from lightning_sfubm.evaluation.results import PerUserResults
from lightning_sfubm.evaluation.significance import bootstrap_ci, holm, mcnemar_exact, wilson_interval
from lightning_sfubm.grid.cells import Json, results_of
from lightning_sfubm.grid.notes import table_notes
from lightning_sfubm.grid.spec import Grid

COLUMNS = ("hit@1", "ndcg@10", "full_ndcg@10", "valid_ratio")
FACT_KEYS = frozenset(
    ("pair", "domain", "a", "b", "label_a", "label_b", "difference", "low", "high", "users", "seeds", "p_mcnemar")
)
SLICES = ("cold target", "short history", "long history")
_Differences = dict[int, dict[int, float]]  # seed -> user -> difference


def ordered(grid: Grid, cells: list[Json]) -> dict[tuple[str, str], dict[str, list[Json]]]:
    """Cells by (pair, domain), then by method in the order of the grid; the seeds of a method in rising order.

    Cells that are not of the grid, or not known to be of the settings it has now, are left out; of two cells of one place
    and seed the first counts. Labels are those the grid has now.

    Raises:
        DataError: the cells of one domain were computed on different data or candidate lists.
    """
    order = {m: i for i, m in enumerate(dict.fromkeys(m for run in grid.runs for m in run.rows.values()))}
    settings, labels = grid.settings(), grid.labels()
    placed: set[tuple[Any, ...]] = set()
    tables: dict[tuple[str, str], dict[str, list[Json]]] = defaultdict(dict)
    for cell in sorted(cells, key=lambda c: (c["pair"], c["domain"], order.get(c["method"], len(order)), c["seed"])):
        place = (*_place(cell), cell["domain"])
        if place not in placed and _place(cell) in settings and cell.get("settings_hash") == settings[_place(cell)]:
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
    settings = grid.settings()
    unknown = [cell for cell in cells if cell.get("settings_hash") is None]
    known = [cell for cell in cells if cell.get("settings_hash") is not None and _place(cell) in settings]
    stale = [cell for cell in known if cell["settings_hash"] != settings[_place(cell)]]
    told = (
        ("computed with other settings than the grid has now", stale),
        ("not known to be current, for they do not say what settings they were computed with", unknown),
    )
    return [f"Left out, {why}: {', '.join(dict.fromkeys(map(_name, kind)))}." for why, kind in told if kind]


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
    for name in COLUMNS:
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


def comparisons(
    grid: Grid, tables: dict[tuple[str, str], dict[str, list[Json]]], published: list[Json] | None = None
) -> list[Json]:
    """Paired differences in Hit@1, per domain and pooled over the domains of a pair.

    A user's value is the mean over the seeds both methods have, in every domain that is pooled; the interval is a
    bootstrap over users. The test is McNemar's on the first of these seeds, with Holm's correction over all tests of the
    grid.

    Args:
        grid: names the comparisons.
        tables: see :func:`ordered`. Published cells have no per-user results and cannot be compared.
        published: facts of an earlier call, kept where the cells at hand do not give them from as many seeds, unless a
            cell they were made from has been replaced since.
    """
    facts: list[Json] = []
    for a, b in grid.comparisons:
        pooled: dict[tuple[str, bool], list[_Differences]] = defaultdict(list)
        for (pair, domain), methods in tables.items():
            if a not in methods or b not in methods:
                continue
            differences = _differences(methods[a], methods[b])
            facts += _facts(pair, domain, a, b, methods, [differences])
            pooled[pair, domain.endswith(", all users")].append(differences)
        for (pair, everyone), parts in pooled.items():
            if len(parts) > 1:
                name = "pooled, all users" if everyone else "pooled"
                methods = next(m for (p, _), m in tables.items() if p == pair and a in m and b in m)
                facts += _facts(pair, name, a, b, methods, parts)
    wanted = {(pair, a, b) for a, b in grid.comparisons for pair in grid.pairs}
    best = {_key(fact): fact for fact in facts}
    for fact in published or []:
        here = best.get(_key(fact))
        more_seeds = here is None or here["seeds"] < fact["seeds"]
        if (fact["pair"], fact["a"], fact["b"]) in wanted and more_seeds and _is_of(tables, fact):
            best[_key(fact)] = fact
    facts, labels = list(best.values()), grid.labels()
    for fact in facts:  # a published one has the labels of its time
        fact |= {f"label_{side}": labels[fact[side]] for side in "ab" if fact[side] in labels}
    for fact, p in zip(facts, holm([fact["p_mcnemar"] for fact in facts]), strict=True):
        fact["p_holm"] = p
    return plain(facts)


def _key(fact: Json) -> tuple[str, ...]:
    return fact["pair"], fact["domain"], fact["a"], fact["b"]


def _differences(cells_a: list[Json], cells_b: list[Json]) -> _Differences:
    a, b = ({c["seed"]: results_of(c) for c in cells if "per_user" in c} for cells in (cells_a, cells_b))
    return {seed: _difference(a[seed], b[seed]) for seed in a.keys() & b.keys()}


def _difference(a: PerUserResults, b: PerUserResults) -> dict[int, float]:
    _, in_a, in_b = np.intersect1d(a.user, b.user, assume_unique=True, return_indices=True)
    if not np.array_equal(a.target[in_a], b.target[in_b]):
        raise DataError(f"'{a.meta.method}' and '{b.meta.method}' disagree about targets in {a.meta.domain}")
    values = a.hit1[in_a].astype(float) - b.hit1[in_b].astype(float)
    return dict(zip(a.user[in_a].tolist(), values.tolist(), strict=True))


def _facts(
    pair: str, domain: str, a: str, b: str, methods: dict[str, list[Json]], parts: list[_Differences]
) -> list[Json]:
    """The fact of the users of all parts over the seeds that all share; none where they share no seed or have no users."""
    seeds = sorted(set.intersection(*map(set, parts)))
    if not seeds:
        return []
    table = np.concatenate([_by_user(part, seeds) for part in parts], axis=1)
    if not table.size:
        return []
    first = table[0]
    estimate = bootstrap_ci(table.mean(0)[:, None], resamples=2000)[0]
    fact = {
        "pair": pair,
        "domain": domain,
        "a": a,
        "b": b,
        "label_a": methods[a][0]["label"],
        "label_b": methods[b][0]["label"],
        "difference": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "users": table.shape[1],
        "seeds": len(seeds),
        "p_mcnemar": mcnemar_exact(int((first > 0).sum()), int((first < 0).sum())),
    }
    return [fact]


def _by_user(differences: _Differences, seeds: list[int]) -> Any:
    """Differences (S, U) of the users that have one with every seed."""
    users = sorted(set.intersection(*(set(differences[seed]) for seed in seeds)))
    return np.array([[differences[seed][user] for user in users] for seed in seeds])


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
                    _num(row["train_cpu_s"], 0),
                    _num(row["cpu_s"], 0),
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
        lines += ["## Paired differences in Hit@1", ""]
        lines += _table(
            ["pair: domain", "difference", "[95 %]", "by seed", "p (McNemar)", "p (Holm)", "users", "seeds"],
            [
                [
                    f"{fact['pair']}: {fact['domain']}",
                    f"{fact['label_a']} − {fact['label_b']}",
                    f"{fact['difference']:+.3f} [{fact['low']:+.3f}, {fact['high']:+.3f}]",
                    ", ".join(f"{value:+.3f}" for value in _by_seed(tables, fact)) or "–",
                    f"{fact['p_mcnemar']:.2g}",
                    f"{fact['p_holm']:.2g}",
                    f"{fact['users']:,}",
                    str(fact["seeds"]),
                ]
                for fact in facts
            ],
        )
    return "\n".join(lines) + "\n"


def _by_seed(tables: dict[tuple[str, str], dict[str, list[Json]]], fact: Json) -> list[float]:
    """The difference with each seed that both methods have: how far it depends on the run, which the interval does not say.

    Over all users of the fact's domain or, where it is pooled, of the pair's domains.
    """
    pooled, everyone = fact["domain"].startswith("pooled"), fact["domain"].endswith("all users")
    parts: list[dict[int, tuple[int, float]]] = []
    for (pair, domain), methods in tables.items():
        meant = domain.endswith(", all users") == everyone if pooled else domain == fact["domain"]
        if pair == fact["pair"] and meant and fact["a"] in methods and fact["b"] in methods:
            a, b = ({cell["seed"]: cell for cell in methods[fact[side]]} for side in "ab")
            parts.append({s: (a[s]["users"], _hit1(a[s]) - _hit1(b[s])) for s in a.keys() & b.keys()})
    seeds = sorted(set.intersection(*(set(part) for part in parts))) if parts else []
    return [
        sum(users * difference for users, difference in of_seed) / sum(users for users, _ in of_seed)
        for of_seed in ([part[seed] for part in parts] for seed in seeds)
    ]


def _is_of(tables: dict[tuple[str, str], dict[str, list[Json]]], fact: Json) -> bool:
    """Whether the cells, whose users need not be at hand, still give a published difference."""
    of_seeds = _by_seed(tables, fact)[: fact["seeds"]]
    return len(of_seeds) == fact["seeds"] and abs(statistics.mean(of_seeds) - fact["difference"]) < 1e-4


def _hit1(cell: Json) -> float:
    return float(cell["metrics"]["hit@1"]["value"])


def _hit(row: Json) -> str:
    if row["hit@1"] is None:
        return "–"
    if row["hit@1 sd"] is not None:
        return f"{row['hit@1']:.3f} ± {row['hit@1 sd']:.3f}"
    low, high = row["hit@1 interval"]
    return f"{row['hit@1']:.3f} [{low:.3f}, {high:.3f}]"


def _num(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
