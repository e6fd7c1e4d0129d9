"""What all peer scripts share: the exported data, the CPU budget, and snapshots of ranked lists. Needs numpy and torch only."""

import os

# One thread and no accelerator for everybody, before anything imports torch.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

#: Items listed beyond a user's known history, so that at least this many are left once the history is masked.
KEEP = 20
SPLITS = ("val", "test")

#: Maps histories (B, L), item ids left-padded with 0, to scores (B, N + 1); column 0 is ignored, -inf = cannot be ranked.
Score = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Ragged:
    """Item sequences in one flat array: row r is ``items[offsets[r]:offsets[r + 1]]``, oldest first."""

    items: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(R,) number of items of each row."""
        return np.diff(self.offsets)

    def padded(self, rows: np.ndarray, length: int) -> torch.Tensor:
        """(B, length) int64, the latest items of each row, left-padded with 0."""
        positions = self.offsets[rows + 1][:, None] - np.arange(length, 0, -1)
        real = positions >= self.offsets[rows][:, None]
        return torch.from_numpy(np.where(real, self.items[np.where(real, positions, 0)], 0).astype(np.int64))


@dataclass(frozen=True)
class Export:
    """What ``export.py`` wrote: training sequences, and histories to rank from. No target of validation or test is here."""

    train: Ragged
    queries: dict[str, Ragged]
    meta: dict[str, Any]

    @property
    def num_items(self) -> int:
        """N; items are 1..N."""
        return int(self.meta["num_items"])

    @classmethod
    def load(cls, folder: str | Path) -> "Export":
        """Read an export."""
        meta = json.loads((Path(folder) / "meta.json").read_text())
        with np.load(Path(folder) / "data.npz") as data:
            parts = {name: Ragged(data[f"{name}_items"], data[f"{name}_offsets"]) for name in ("train", *SPLITS)}
        return cls(parts["train"], {name: parts[name] for name in SPLITS}, meta)


def ranked_lists(score: Score, histories: Ragged, num_items: int, max_length: int, batch: int = 256) -> dict[str, Any]:
    """Best-first lists, as long as a row's history plus :data:`KEEP` items (or the catalogue).

    Nothing is masked here: the history is masked by the one evaluator, for every library in the same way.

    Returns:
        ``items`` and ``scores``, flat, and ``offsets`` (E + 1,), rows in the order of ``histories``.
    """
    lengths = histories.lengths
    wanted = np.minimum(lengths + KEEP, num_items)
    offsets = np.concatenate([[0], np.cumsum(wanted)])
    items, scores = np.zeros(offsets[-1], np.int32), np.zeros(offsets[-1], np.float32)
    order = np.argsort(lengths, kind="stable")
    with torch.no_grad():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            values = score(histories.padded(rows, int(lengths[rows].clip(1, max_length).max()))).float()
            if values.shape != (len(rows), num_items + 1) or values[:, 1:].isnan().any():
                raise ValueError(f"scores of shape {tuple(values.shape)}, or NaN among them")
            best = values[:, 1:].topk(int(wanted[rows].max()), dim=1)
            for row, ids, found in zip(rows, best.indices.numpy() + 1, best.values.numpy(), strict=True):
                place = slice(offsets[row], offsets[row + 1])
                items[place], scores[place] = ids[: wanted[row]], found[: wanted[row]]
    return {"items": items, "scores": scores, "offsets": offsets}


@dataclass
class Recorder:
    """Counts CPU seconds of training and writes ranked lists whenever a stage of the budget is spent.

    The clock runs from :meth:`start`, over everything the library does between its optimiser steps (loading, logging),
    and stands still while lists are written. Everything is written at once, so a killed run keeps its snapshots.
    """

    export: Export
    folder: Path
    budget: list[float]
    max_length: int
    facts: dict[str, Any]
    spent: float = 0.0
    steps: int = 0
    since: float = 0.0
    snapshots: list[dict[str, Any]] = field(default_factory=list)

    def start(self, steps_per_epoch: int | None = None) -> None:
        """Let the clock run; the number of steps is given once, at the first start."""
        if steps_per_epoch is not None:
            self.facts["steps_per_epoch"] = steps_per_epoch
        self.since = time.process_time()

    def step(self, module: torch.nn.Module, score: Score, epoch: int) -> bool:
        """Call after every optimiser step; returns True when the whole budget is spent."""
        if len(self.snapshots) == len(self.budget):
            return True
        self.steps += 1
        now = time.process_time()
        spent = self.spent + now - self.since
        if spent < self.budget[len(self.snapshots)]:
            return False
        self.spent = spent
        training = module.training
        module.eval()
        number = len(self.snapshots)
        self.folder.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            lists = ranked_lists(score, self.export.queries[split], self.export.num_items, self.max_length)
            np.savez(self.folder / f"{split}-{number}.npz", **lists)
        module.train(training)
        self.snapshots.append({"cpu_s": spent, "steps": self.steps, "epoch": epoch})
        facts = {**self.facts, "fingerprint": self.export.meta["fingerprint"], "snapshots": self.snapshots}
        (self.folder / "run.json").write_text(json.dumps(facts, indent=1) + "\n")
        print(f"{self.folder.name}: {spent:.0f} CPU-s, {self.steps} steps, epoch {epoch}", flush=True)
        # A long step may have spent more than one stage.
        self.budget = [*self.budget[: number + 1], *(b for b in self.budget[number + 1 :] if b > spent)]
        self.start()
        return len(self.snapshots) == len(self.budget)


def lightning_callback(base: type, recorder: Recorder, make_score: Callable[[Any], Score]) -> Any:
    """A callback of either Lightning package that drives the recorder and stops the trainer.

    Args:
        base: ``lightning.Callback`` or ``pytorch_lightning.Callback``.
        recorder: counts and writes.
        make_score: the LightningModule to its score function.
    """

    class Snapshots(base):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            recorder.start(int(trainer.num_training_batches))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if recorder.step(pl_module, make_score(pl_module), trainer.current_epoch):
                trainer.should_stop = True

    return Snapshots()


def parse(library: str, models: tuple[str, ...], description: str | None, **defaults: Any) -> argparse.Namespace:
    """Arguments of a script: where, which model, the budget, and the settings that are tuned."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", required=True, help="folder written by export.py")
    parser.add_argument("--out", required=True, help="folder that collects the runs of all libraries")
    parser.add_argument("--model", choices=models, default=models[0])
    parser.add_argument("--budget", default="60,120,240,480", help="CPU seconds of training at which lists are written")
    parser.add_argument("--lr", type=float, default=defaults.pop("lr"))
    parser.add_argument("--dropout", type=float, default=defaults.pop("dropout"))
    parser.add_argument("--batch-size", type=int, default=defaults.pop("batch_size"))
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = parser.parse_args()
    arguments.library = library
    return arguments


def recorder_of(arguments: argparse.Namespace, package: str) -> Recorder:
    """Load the export, seed, set one thread, and open the run's folder."""
    torch.set_num_threads(1)
    random.seed(arguments.seed)
    np.random.seed(arguments.seed)  # noqa: NPY002  the libraries draw from the global stream
    torch.manual_seed(arguments.seed)
    settings = {k: v for k, v in vars(arguments).items() if k not in ("export", "out", "library", "model", "budget")}
    tag = "-".join(f"{name}={value}" for name, value in sorted(settings.items()))
    facts = {
        "library": arguments.library,
        "model": arguments.model,
        "settings": settings,
        "budget": arguments.budget,
        "versions": {name: version(name) for name in (package, "torch", "numpy")},
    }
    budget = sorted(float(part) for part in arguments.budget.split(","))
    folder = Path(arguments.out) / f"{arguments.library}-{arguments.model}-{tag}"
    return Recorder(Export.load(arguments.export), folder, budget, arguments.max_length, facts)
