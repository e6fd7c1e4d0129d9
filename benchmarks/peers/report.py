"""Evaluate the ranked lists of all libraries by this project's one evaluator, choose on validation, and compare on test.

    python benchmarks/peers/report.py --export EXPORT --out RUNS

Full-catalogue metrics, history masked, ties against the target. Of every run the snapshot with the best validation NDCG@10
counts, and of every library and model the run with the best of these. Writes benchmarks/results/peers.json.
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
    run["chosen"] = max(run["snapshots"], key=lambda s: s["val"][CHOICE])
    return run


def best_runs(runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Model -> library -> its best run by validation, together with the number of runs it was chosen from."""
    best: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        libraries = best.setdefault(run["model"], {})
        other = libraries.get(run["library"])
        tried = (other["tried"] if other else 0) + 1
        if other is None or run["chosen"]["val"][CHOICE] > other["chosen"]["val"][CHOICE]:
            other = dict(run)
        libraries[run["library"]] = {**other, "tried": tried}
    return best


def compare(libraries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ours against the peer with the best validation value, at the same budget."""
    peers = {name: run for name, run in libraries.items() if name != "ours"}
    if "ours" not in libraries or not peers:
        return {}
    peer = max(peers, key=lambda name: peers[name]["chosen"]["val"][CHOICE])
    goal = REACHED * peers[peer]["chosen"]["val"][CHOICE]

    def seconds(run: dict[str, Any]) -> float | None:
        return next((s["cpu_s"] for s in run["snapshots"] if s["val"][CHOICE] >= goal), None)

    ours, other = libraries["ours"]["chosen"], peers[peer]["chosen"]
    per_second = {name: run["chosen"]["test"][CHOICE] / run["chosen"]["cpu_s"] for name, run in libraries.items()}
    return {
        "best_peer": peer,
        "test_ratio": ours["test"][CHOICE] / other["test"][CHOICE] if other["test"][CHOICE] else None,
        "test_ndcg_per_cpu_s": per_second,
        "cpu_s_to_98_percent_of_best_peer": {name: seconds(run) for name, run in libraries.items()},
    }


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
    best = best_runs(runs)
    result = {
        "environment": environment(),
        "data": {name: value for name, value in export.meta.items() if name != "root"},
        "comparison": {model: compare(libraries) for model, libraries in best.items()},
        "runs": runs,
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(result, indent=1) + "\n")

    print(
        f"{'model':8s} {'library':10s} {'tried':>5s} {'CPU-s':>7s} {'val NDCG@10':>12s} {'test NDCG@10':>19s} {'HR@10':>7s}"
    )
    for model, libraries in best.items():
        for name, run in sorted(libraries.items(), key=lambda pair: -pair[1]["chosen"]["val"][CHOICE]):
            chosen = run["chosen"]
            test = f"{chosen['test'][CHOICE]:.4f} +- {chosen['test']['standard_error']:.4f}"
            print(
                f"{model:8s} {name:10s} {run['tried']:5d} {chosen['cpu_s']:7.0f} {chosen['val'][CHOICE]:12.4f} "
                f"{test:>19s} {chosen['test']['full_hr@10']:7.4f}"
            )
        comparison = result["comparison"][model]
        if comparison:
            print(f"{model}: ours / {comparison['best_peer']} on test {comparison['test_ratio']:.3f}")
    print(f"written: {arguments.results}")


if __name__ == "__main__":
    main()
