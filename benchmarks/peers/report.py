"""Evaluate the ranked lists of all libraries by this project's one evaluator, choose on validation, and compare on test.

    python benchmarks/peers/report.py --export EXPORT --out RUNS

Full-catalogue metrics, history masked, ties against the target. At every stage of the budget, of every library and model the
snapshot with the best validation NDCG@10 counts, of all its runs that have spent this stage. Writes
benchmarks/results/peers.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from export import open_data
from harness import KEEP, SPLITS, Export, Ragged
from torch import Tensor

from lightning_sfubm.contracts import RankBatch
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.environment import environment
from lightning_sfubm.evaluation.evaluate import evaluate_ranker

RESULTS = Path(__file__).parent.parent / "results" / "peers.json"
METRICS = ("full_ndcg@10", "full_hr@10", "full_ndcg@20")
CHOICE = "full_ndcg@10"
#: Share of the best peer's validation NDCG@10 that counts as reached.
REACHED = 0.98


class StoredLists:
    """Ranked lists as a ``CatalogueRanker``: listed items have their stored scores, all others -inf.

    Args:
        path: file written by the harness.
        users: (E,) rows of the users, in the order of the lists.
        lengths: (E,) items of their known histories.
        num_items: N.

    Raises:
        DataError: a list is too short to hold the first :data:`harness.KEEP` items outside the history.
    """

    def __init__(self, path: Path, users: np.ndarray, lengths: np.ndarray, num_items: int) -> None:
        with np.load(path) as file:
            self.items = Ragged(file["items"], file["offsets"])
            self.scores = file["scores"]
        if len(self.items) != len(users) or (self.items.lengths < np.minimum(lengths + KEEP, num_items)).any():
            raise DataError(f"{path}: not one list of history length + {KEEP} items for each of {len(users)} users.")
        self.row = np.full(int(users.max(initial=0)) + 1, -1)
        self.row[users] = np.arange(len(users))
        self.num_items = num_items

    def score_all(self, batch: RankBatch) -> Tensor:
        """Scores (B, N + 1)."""
        rows = self.row[batch["user"].numpy()]
        lengths = self.items.lengths[rows]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        places = np.repeat(self.items.offsets[rows], lengths) + within
        scores = torch.full((len(rows), self.num_items + 1), -torch.inf)
        columns = torch.from_numpy(self.items.items[places].astype(np.int64))
        scores[torch.from_numpy(np.repeat(np.arange(len(rows)), lengths)), columns] = torch.from_numpy(
            self.scores[places]
        )
        return scores

    def rank(self, batch: RankBatch) -> Tensor:
        """Scores (B, C); not reported, as candidates outside the lists are all equal."""
        return self.score_all(batch).gather(1, batch["candidates"])


def evaluate_run(folder: Path, export: Export, data: DomainDataModule) -> dict[str, Any]:
    """The facts of a run with the metrics of every snapshot, and the snapshot chosen on validation."""
    run: dict[str, Any] = json.loads((folder / "run.json").read_text())
    if run["fingerprint"] != export.meta["fingerprint"]:
        raise DataError(f"{folder}: this run is of other data than the export; run it again.")
    for number, snapshot in enumerate(run["snapshots"]):
        for split in SPLITS:
            lengths = export.queries[split].lengths
            lists = StoredLists(folder / f"{split}-{number}.npz", data.splits.eval_users, lengths, data.num_items)
            result = evaluate_ranker(
                lists,
                data.rank_dataloader(split, 512, with_seen=True),  # type: ignore[arg-type]
                catalogue=data.catalogue,
                method=run["library"],
                domain=data.name,
                split={"val": "validation"}.get(split, split),
                seed=run["settings"]["seed"],
                candidate_hash=data.candidate_hash[split],
            )
            snapshot[split] = {metric: float(result.per_user(metric).mean()) for metric in METRICS}
            errors = result.per_user(CHOICE).std(ddof=1) / len(result) ** 0.5
            snapshot[split]["standard_error"] = float(errors)
    last = run["snapshots"][-1]
    run["cpu_s_per_epoch"] = last["cpu_s"] / last["steps"] * run["steps_per_epoch"]
    run["chosen"] = max(run["snapshots"], key=lambda s: s["val"][CHOICE])
    return run


def stage(run: dict[str, Any], snapshot: dict[str, Any]) -> float:
    """The largest stage of the run's budget that was spent at a snapshot."""
    return max(part for part in map(float, run["budget"].split(",")) if part <= snapshot["cpu_s"])


def at_budgets(runs: list[dict[str, Any]]) -> dict[str, dict[float, dict[str, dict[str, Any]]]]:
    """Model -> budget -> library -> its best snapshot by validation within the budget, of the runs that spent it.

    A run that was stopped early counts for the budgets it has reached; ``tried`` is the number of runs chosen from.
    """
    found: dict[str, dict[float, dict[str, dict[str, Any]]]] = {}
    for run in runs:
        stages = [stage(run, snapshot) for snapshot in run["snapshots"]]
        for budget in stages:
            within = [s for s, spent in zip(run["snapshots"], stages, strict=True) if spent <= budget]
            best = max(within, key=lambda s: s["val"][CHOICE])
            libraries = found.setdefault(run["model"], {}).setdefault(budget, {})
            other = libraries.get(run["library"])
            tried = (other["tried"] if other else 0) + 1
            if other is None or best["val"][CHOICE] > other["val"][CHOICE]:
                other = {**best, "settings": run["settings"], "epochs": best["steps"] / run["steps_per_epoch"]}
            libraries[run["library"]] = {**other, "tried": tried}
    return found


def compare(budgets: dict[float, dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Ours against the peer with the best validation value, at each budget that a peer has spent.

    Where ours spent less, it counts with what it had by then: ``ours_spent``.
    """
    result: dict[str, Any] = {}
    for budget, libraries in sorted(budgets.items()):
        peers = [name for name in libraries if name != "ours"]
        stages = [spent for spent, all_of in budgets.items() if "ours" in all_of and spent <= budget]
        if not stages or not peers:
            continue
        peer = max(peers, key=lambda name: libraries[name]["val"][CHOICE])
        goal = REACHED * libraries[peer]["val"][CHOICE]
        ours_spent = max(stages)
        ours, other = budgets[ours_spent]["ours"]["test"][CHOICE], libraries[peer]["test"][CHOICE]
        result[f"{budget:g}"] = {
            "best_peer": peer,
            "ours_spent": ours_spent,
            "test_ratio": ours / other if other else None,
            "budget_to_98_percent_of_best_peer": next(
                (spent for spent, all_of in sorted(budgets.items()) if own(all_of, goal)), None
            ),
        }
    return result


def own(libraries: dict[str, dict[str, Any]], goal: float) -> bool:
    """Whether our validation value is at least ``goal``."""
    return "ours" in libraries and libraries["ours"]["val"][CHOICE] >= goal


def main() -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", required=True)
    parser.add_argument("--out", required=True, help="folder with the runs")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    export = Export.load(arguments.export)
    data = open_data(export.meta)
    folders = sorted(path.parent for path in Path(arguments.out).glob("*/run.json"))
    if not folders:
        raise DataError(f"{arguments.out}: no runs here; run the scripts run_*.py first.")
    runs = [evaluate_run(folder, export, data) for folder in folders]
    budgets = at_budgets(runs)
    result = {
        "environment": environment(),
        "data": {name: value for name, value in export.meta.items() if name != "root"},
        "comparison": {model: compare(found) for model, found in budgets.items()},
        "runs": runs,
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(result, indent=1) + "\n")

    print(
        f"{'model':8s} {'CPU-s':>6s} {'library':10s} {'tried':>5s} {'epochs':>7s} {'val NDCG@10':>12s} "
        f"{'test NDCG@10':>19s} {'HR@10':>7s}"
    )
    for model, found in budgets.items():
        for budget, libraries in sorted(found.items()):
            for name, best in sorted(libraries.items(), key=lambda pair: -pair[1]["val"][CHOICE]):
                test = f"{best['test'][CHOICE]:.4f} +- {best['test']['standard_error']:.4f}"
                print(
                    f"{model:8s} {budget:6g} {name:10s} {best['tried']:5d} {best['epochs']:7.2f} "
                    f"{best['val'][CHOICE]:12.4f} {test:>19s} {best['test']['full_hr@10']:7.4f}"
                )
        for budget, compared in result["comparison"][model].items():
            ratio = compared["test_ratio"]
            print(f"{model}, {budget} CPU-s: ours / {compared['best_peer']} on test {ratio and round(ratio, 3)}")
    for run in runs:
        print(f"{run['model']:8s} {run['library']:10s} {run['cpu_s_per_epoch']:.0f} CPU-s an epoch")
    print(f"written: {arguments.results}")


if __name__ == "__main__":
    main()
