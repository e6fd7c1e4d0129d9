"""A small grid, its cells, and a stand-in for the process of a run."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lightning_sfubm.evaluation.results import PerUserResults, ResultMeta
from lightning_sfubm.grid.cells import cell_path, write_cell
from lightning_sfubm.grid.spec import load_grid
from lightning_sfubm.methods import METHODS

ABOUT = {"pair": "p", "grid_hash": "h", "commit": "c"}


def grid_file(folder: Path, **changes: Any) -> Path:
    (folder / "base.yaml").write_text("seed_everything: 1\n")
    content = {
        "title": "T",
        "pairs": {"p": str(folder / "base.yaml")},
        "runs": {"main": {"seeds": [1, 2], "rows": ["popularity", "stage1"]}, "v": {"rows": {"stage1": "A variant"}}},
        "comparisons": [["stage1", "popularity"]],
    } | changes
    path = folder / "grid.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def result(
    method: str, hits: list[int], domain: str = "a", seed: int = 1, lists: str = "x", catalogue: bool = True
) -> PerUserResults:
    n = len(hits)
    rank = np.where(np.array(hits) > 0, 1.0, 3.0)
    meta = ResultMeta(method, domain, "test", seed, lists, label=method.title(), group="G", num_candidates=20)
    ones = np.ones(n, np.int64)
    return PerUserResults(
        meta, np.arange(n), ones, np.array(hits) > 0, rank, ones > 0, rank if catalogue else rank * np.nan, ones, ones
    )


def stored(out: Path, method: str, hits: list[int], **where: Any) -> Path:
    made = result(method, hits, **where)
    path = cell_path(out, "p", made.meta.domain, method, made.meta.seed)
    runs = load_grid(grid_file(out), set(METHODS)).runs
    of = {run.seed: run.settings_hash() for run in runs if run.name == "main"}[made.meta.seed]
    write_cell(path, made, {**ABOUT, "method": method, "label": made.meta.label, "settings_hash": of})
    return path


class Done:
    """A process that has ended."""

    def __init__(self, code: int) -> None:
        self.code = code

    def __enter__(self) -> "Done":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def wait(self, timeout: float | None) -> int:
        return self.code

    def kill(self) -> None: ...


class FakeFit:
    """Stands for the process of a run: writes the rows it is asked for and lacks, or dies after some of them.

    As the real one it clears its folder unless it goes on, and leaves states only where rounds were run.
    """

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.computed: list[str] = []
        self.rows_before_death: int | None = None
        self.at_work: threading.Barrier | None = None
        self.while_at_work: Callable[[], Any] = lambda: None

    def __call__(self, command: list[str], *, env: dict[str, str], **_: Any) -> Any:
        self.calls.append(command)
        self.threads = env.get("OMP_NUM_THREADS")
        if self.at_work is not None:
            self.at_work.wait(timeout=60)
        self.while_at_work()
        folder = Path(command[command.index("--trainer.default_root_dir") + 1])
        seed = int(command[command.index("--seed_everything") + 1])
        rows = json.loads(command[command.index("--experiment.init_args.methods") + 1])
        if "--ckpt_path" not in command:
            shutil.rmtree(folder / "results", ignore_errors=True)
        if any(METHODS[row].needs_stage1 for row in rows):
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for row in rows[: self.rows_before_death]:
            if (folder / "results" / "b" / f"{row}.parquet").exists():
                continue
            self.computed.append(row)
            for domain in ("a", "b"):
                result(row, [0, 1], domain, seed).save(folder / "results" / domain / f"{row}.parquet")
                result(row, [0, 1, 1], domain, seed).save(
                    folder / "results" / f"{domain}, all users" / f"{row}.parquet"
                )
        return Done(0 if self.rows_before_death is None else 1)
