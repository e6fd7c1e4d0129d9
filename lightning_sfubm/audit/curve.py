"""Privacy beside utility over several audited runs: one point a run and domain."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_sfubm.audit.facts import rests_on_seed
from lightning_sfubm.audit.forms import AUDIT, read_formed
from lightning_sfubm.audit.replay import GLOBAL
from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.facts import plain
from lightning_sfubm.evaluation.run_folder import Json, RunFolder

#: rows of a run's results that are plotted, and their names; a row ``teacher`` is of no method: a script may evaluate the
#: shared teacher between the rounds and the local phases, as benchmarks/privacy_curves.py does
UTILITY = {"teacher": "teacher", "stage1": "student"}
METRICS = ("hit@1", "ndcg@10")


def curve_points(run_dirs: Iterable[Path]) -> list[Json]:
    """Points of the curves, by domain and rising noise (epsilon from infinity down).

    Args:
        run_dirs: folders with an ``audit.json``.

    Returns:
        A point has ``domain``, ``epsilon`` (``None`` = no guarantee), ``delta``, ``simulated`` (whether the noise behind them
        follows from the run's seed), ``sigma``, ``membership`` (of the last
        aggregated teacher, or of the client's own update where none was aggregated: figures by score), ``linkage``, and
        ``utility`` (Hit@1 and NDCG@10 by branch, with intervals, where the run holds results).

    Raises:
        DataError: a folder has no audit that attacked something.
    """
    points = []
    for run_dir in run_dirs:
        audit = _audit(run_dir)
        folder = RunFolder.read(run_dir)
        members = audit["membership"]
        linkage = {row["client"]: row for row in audit["linkage"]}
        for domain in dict.fromkeys([row["domain"] for row in members] + list(linkage)):
            last: dict[str, Json] = {}
            for row in (row for row in members if row["domain"] == domain):
                best = last.get(row["score"])
                if best is None or (row["client"] == GLOBAL, row["round"]) >= (best["client"] == GLOBAL, best["round"]):
                    last[row["score"]] = row
            one = next(iter(last.values()), {})
            points.append(
                {
                    "domain": domain,
                    "epsilon": one.get("epsilon"),
                    "delta": one.get("delta"),
                    "simulated": bool(one) and rests_on_seed(folder.ledger, one["client"]),
                    "sigma": linkage.get(domain, {}).get("sigma"),
                    "membership": last,
                    "linkage": linkage.get(domain),
                    "utility": _utility(folder, domain),
                }
            )
    return sorted(plain(points), key=lambda p: (p["domain"], -(p["epsilon"] or float("inf")), p["sigma"] or 0.0))


def _utility(folder: RunFolder, domain: str) -> Json:
    utility = {}
    for result in folder.results.get(domain, []):
        if result.meta.method in UTILITY:
            summary = result.summary()
            utility[UTILITY[result.meta.method]] = {metric: summary[metric]._asdict() for metric in METRICS}
    return utility


def _audit(run_dir: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = read_formed(run_dir / "audit.json", AUDIT)
    except DataError as error:
        raise DataError(
            f"{run_dir}: no readable audit.json there ({error}); run 'lightning-sfubm audit' on it first"
        ) from None
    if not facts.keys() >= {"membership", "linkage"}:
        raise DataError(f"{run_dir}: its messages did not agree with its ledger, so nothing was attacked")
    return facts
