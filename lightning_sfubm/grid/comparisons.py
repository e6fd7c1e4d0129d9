"""Paired differences between the methods of a results grid, from its cells alone."""

import statistics
from collections import defaultdict

import numpy as np
import numpy.typing as npt

from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.facts import plain
from lightning_sfubm.evaluation.results import PerUserResults
from lightning_sfubm.evaluation.significance import bootstrap_ci, holm, sign_flip_exact
from lightning_sfubm.grid.cells import Json, results_of
from lightning_sfubm.grid.spec import Grid

FACT_KEYS = frozenset(
    ("pair", "domain", "a", "b", "label_a", "label_b", "difference", "low", "high", "users", "seeds", "p_flip")
)
_METRICS = ("hit@1", "full_ndcg@10")
_Differences = dict[int, dict[int, tuple[float, ...]]]  # seed -> user -> difference in each of _METRICS


def comparisons(
    grid: Grid, tables: dict[tuple[str, str], dict[str, list[Json]]], published: list[Json] | None = None
) -> list[Json]:
    """Paired differences in Hit@1 and full-catalogue NDCG@10, per domain and pooled over the domains of a pair.

    A user's value is the mean over the seeds both methods have, in every domain that is pooled; intervals are a
    bootstrap over users. The test, of Hit@1, is the exact sign-flip test of all these seeds, with one seed McNemar's, with
    Holm's correction over all tests of the grid. Full-catalogue differences are ``None`` where one of the two ranks
    candidates only.

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
        if (fact["pair"], fact["a"], fact["b"]) in wanted and more_seeds and still_given(tables, fact):
            best[_key(fact)] = fact
    facts, labels = list(best.values()), grid.labels()
    for fact in facts:  # a published one has the labels of its time
        fact |= {f"label_{side}": labels[fact[side]] for side in "ab" if fact[side] in labels}
    for fact, p in zip(facts, holm([fact["p_flip"] for fact in facts]), strict=True):
        fact["p_holm"] = p
    return plain(facts)


def still_given(tables: dict[tuple[str, str], dict[str, list[Json]]], fact: Json) -> bool:
    """Whether the cells, whose users need not be at hand, still give a published difference.

    Args:
        tables: see :func:`ordered`.
        fact: see :func:`comparisons`.
    """
    of_seeds = by_seed(tables, fact)[: fact["seeds"]]
    return len(of_seeds) == fact["seeds"] and abs(statistics.mean(of_seeds) - fact["difference"]) < 1e-4


def _key(fact: Json) -> tuple[str, ...]:
    return fact["pair"], fact["domain"], fact["a"], fact["b"]


def _differences(cells_a: list[Json], cells_b: list[Json]) -> _Differences:
    a, b = ({c["seed"]: results_of(c) for c in cells if "per_user" in c} for cells in (cells_a, cells_b))
    return {seed: _difference(a[seed], b[seed]) for seed in a.keys() & b.keys()}


def _difference(a: PerUserResults, b: PerUserResults) -> dict[int, tuple[float, ...]]:
    _, in_a, in_b = np.intersect1d(a.user, b.user, assume_unique=True, return_indices=True)
    if not np.array_equal(a.target[in_a], b.target[in_b]):
        raise DataError(f"'{a.meta.method}' and '{b.meta.method}' disagree about targets in {a.meta.domain}")
    metrics = [a.per_user(name)[in_a].astype(float) - b.per_user(name)[in_b].astype(float) for name in _METRICS]
    return dict(zip(a.user[in_a].tolist(), zip(*(m.tolist() for m in metrics), strict=True), strict=True))


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
    hits = np.sign(table[..., 0]).sum(0).astype(np.int64)  # seeds with a hit under a alone less those under b alone
    if not np.isfinite(table).all():  # one of the two ranks candidates only, in one of the domains or more
        table[..., 1] = np.nan
    estimate, full = bootstrap_ci(table.mean(0), resamples=2000)
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
        "full_difference": full.value,
        "full_low": full.low,
        "full_high": full.high,
        "users": table.shape[1],
        "seeds": len(seeds),
        "p_flip": sign_flip_exact(hits),
    }
    return [fact]


def _by_user(differences: _Differences, seeds: list[int]) -> npt.NDArray[np.float64]:
    """Differences (S, U, 2) of the users that have one with every seed."""
    users = sorted(set.intersection(*(set(differences[seed]) for seed in seeds)))
    table = [[differences[seed][user] for user in users] for seed in seeds]
    return np.array(table, dtype=np.float64).reshape(len(seeds), len(users), len(_METRICS))


def by_seed(tables: dict[tuple[str, str], dict[str, list[Json]]], fact: Json) -> list[float]:
    """The difference with each seed that both methods have: how far it depends on the run, which the interval does not say.

    Over all users of the fact's domain or, where it is pooled, of the pair's domains; none where the cells of the two methods
    are of other numbers of users: their means are then not of the users that were compared.
    """
    pooled, everyone = fact["domain"].startswith("pooled"), fact["domain"].endswith("all users")
    parts: list[dict[int, tuple[int, float]]] = []
    for (pair, domain), methods in tables.items():
        meant = domain.endswith(", all users") == everyone if pooled else domain == fact["domain"]
        if pair == fact["pair"] and meant and fact["a"] in methods and fact["b"] in methods:
            a, b = ({cell["seed"]: cell for cell in methods[fact[side]]} for side in "ab")
            if any(a[s]["users"] != b[s]["users"] for s in a.keys() & b.keys()):
                return []
            parts.append({s: (a[s]["users"], _hit1(a[s]) - _hit1(b[s])) for s in a.keys() & b.keys()})
    seeds = sorted(set.intersection(*(set(part) for part in parts))) if parts else []
    return [
        sum(users * difference for users, difference in of_seed) / sum(users for users, _ in of_seed)
        for of_seed in ([part[seed] for part in parts] for seed in seeds)
    ]


def _hit1(cell: Json) -> float:
    return float(cell["metrics"]["hit@1"]["value"])
