"""Per-user results: the one code path that evaluates every method, and their storage.

A result is a small table with one row per user, stored as Parquet with a JSON side file, so that intervals, paired
tests and slices can be computed afterwards, by anybody, without the model.
"""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.significance import Estimate, Floats, bootstrap_ci, wilson_interval

FORMAT = 1

#: name and dtype of each column
COLUMNS: dict[str, type[np.generic]] = {
    "user": np.int64,
    "target": np.int64,
    "hit1": np.bool_,
    "rank": np.float32,
    "valid": np.bool_,
    "full_rank": np.float32,
    "history_length": np.int64,
    "target_train_count": np.int64,
}

COLD_BELOW = 5  #: a target with fewer training interactions is cold
SHORT_UP_TO = 5  #: a history of at most this many items is short


@dataclass
class ResultMeta:
    """What a result is about.

    Attributes:
        method: key of the method; also the file name in a run folder.
        domain: name of the domain.
        split: ``"test"`` or ``"validation"``.
        seed: seed of the run.
        candidate_hash: hash of the stored candidate lists; results with different hashes are never compared.
        label: what a table prints; the method key where empty.
        group: heading of the rows it stands among.
        order: place among the rows of a table.
        data_fingerprint: fingerprint of the domain's data after filtering.
        ties: tie policy of the ranks.
        num_candidates: C.
        num_items: N.
        wall_s: wall-clock seconds of the evaluation.
        cpu_s: CPU seconds of the evaluation, all threads of this process.
        peak_rss_mb: highest resident memory of the process so far, in MB.
        trainable_params: parameters that were trained; ``None`` where unknown.
        extra: anything else a method wants to state, JSON values only; ``train_cpu_s`` is shown in the report.
    """

    method: str
    domain: str
    split: str
    seed: int
    candidate_hash: str
    label: str = ""
    group: str = ""
    order: int = 0
    data_fingerprint: str = ""
    ties: str = "conservative"
    num_candidates: int = 0
    num_items: int = 0
    wall_s: float | None = None
    cpu_s: float | None = None
    peak_rss_mb: float | None = None
    trainable_params: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The label, or the method key where there is none."""
        return self.label or self.method


@dataclass(eq=False)
class PerUserResults:
    """One row per evaluated user; all arrays have the same length U.

    Attributes:
        meta: what the result is about.
        user: row of the user in the domain, pairwise distinct.
        target: item that followed.
        hit1: the method's answer was the target; an invalid answer is a miss.
        rank: rank of the target among the candidates, by score.
        valid: the answer named exactly one candidate; always true for methods that only score.
        full_rank: rank in the whole catalogue without seen items; NaN where the method cannot score it.
        history_length: number of known interactions before the target.
        target_train_count: training interactions of the target.
    """

    meta: ResultMeta
    user: npt.NDArray[np.int64]
    target: npt.NDArray[np.int64]
    hit1: npt.NDArray[np.bool_]
    rank: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    full_rank: npt.NDArray[np.float32]
    history_length: npt.NDArray[np.int64]
    target_train_count: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        where = f"results of {self.meta.method!r} in {self.meta.domain!r}"
        for name, dtype in COLUMNS.items():
            column = np.asarray(getattr(self, name))
            if column.shape != (len(self.user),):
                raise DataError(f"{where}: column {name!r} has shape {column.shape}, expected ({len(self.user)},).")
            setattr(self, name, column.astype(dtype, copy=False))
        if len(np.unique(self.user)) != len(self.user):
            raise DataError(f"{where}: a user occurs more than once.")
        if not (self.rank >= 1).all():
            raise DataError(f"{where}: column 'rank' holds a value below 1 or NaN.")
        if (self.hit1 & ~self.valid).any():
            raise DataError(f"{where}: an invalid answer is marked as a hit.")

    def __len__(self) -> int:
        return len(self.user)

    def per_user(self, metric: str) -> Floats:
        """Values (U,) of a metric of :data:`METRICS`; NaN for users for whom it is not defined.

        Raises:
            DataError: there is no such metric.
        """
        if metric not in METRICS:
            raise DataError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}.")
        return METRICS[metric].values(self).astype(np.float64)

    def select(self, rows: npt.NDArray[np.bool_]) -> "PerUserResults":
        """The rows where the mask (U,) is true, with the same meta data."""
        return PerUserResults(self.meta, **{name: getattr(self, name)[rows] for name in COLUMNS})

    def slices(self) -> dict[str, "PerUserResults"]:
        """Users by the coldness of their target and the length of their history."""
        return {
            "cold target": self.select(self.target_train_count < COLD_BELOW),
            "short history": self.select(self.history_length <= SHORT_UP_TO),
            "long history": self.select(self.history_length > SHORT_UP_TO),
        }

    def summary(self, *, resamples: int = 1000) -> dict[str, Estimate]:
        """Every metric with its 95 % interval; ``n`` is 0 and the values NaN where a metric is defined for no user.

        Args:
            resamples: bootstrap resamples for the metrics that are not proportions.
        """
        values = {name: self.per_user(name) for name in METRICS}
        means = [name for name, metric in METRICS.items() if not metric.proportion]
        estimates = dict(
            zip(
                means,
                bootstrap_ci(
                    np.stack([values[name] for name in means], axis=1), resamples=resamples, seed=self.meta.seed
                ),
                strict=True,
            )
        )
        for name in METRICS.keys() - estimates.keys():
            defined = values[name][np.isfinite(values[name])]
            estimates[name] = wilson_interval(int(defined.sum()), len(defined))
        return {name: estimates[name] for name in METRICS}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``path`` (``.parquet``) and its ``.json`` side file, each atomically, the side file last.

        The first says which item each user took, so it is readable by its owner alone.

        Returns:
            The path of the Parquet file.

        Raises:
            DataError: ``path`` does not end in ``.parquet``.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        if path.suffix != ".parquet":
            raise DataError(f"{path}: per-user results are stored as .parquet files.")
        buffer = io.BytesIO()
        pq.write_table(pa.table({name: getattr(self, name) for name in COLUMNS}), buffer)
        data = buffer.getvalue()
        side = {"format": FORMAT, "sha256": hashlib.sha256(data).hexdigest(), "rows": len(self), **asdict(self.meta)}
        write_atomically(path, data, mode=0o600)
        write_atomically(path.with_suffix(".json"), json.dumps(side, indent=1).encode())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PerUserResults":
        """Read and check what :meth:`save` wrote.

        Raises:
            DataError: a file is missing, torn, of another format, or its columns do not fit.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        side_path = path.with_suffix(".json")
        try:
            data = path.read_bytes()
            side = json.loads(side_path.read_text(encoding="utf-8"))
            table = pq.read_table(io.BytesIO(data))
        except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
            raise DataError(f"{path}: these results cannot be read ({error}); evaluate the method again.") from error
        if not isinstance(side, dict) or side.get("format") != FORMAT:
            raise DataError(f"{side_path}: not a result of format {FORMAT}; evaluate the method again.")
        if side.get("sha256") != hashlib.sha256(data).hexdigest():
            raise DataError(f"{path}: content and side file do not belong together; evaluate the method again.")
        missing = [name for name in COLUMNS if name not in table.column_names]
        if missing:
            raise DataError(f"{path}: column {missing[0]!r} is missing.")
        known = {f.name for f in fields(ResultMeta)}
        try:
            meta = ResultMeta(**{key: value for key, value in side.items() if key in known})
        except TypeError as error:
            raise DataError(f"{side_path}: incomplete ({error}).") from error
        return cls(meta, **{name: table.column(name).to_numpy() for name in COLUMNS})


@dataclass(frozen=True)
class MetricSpec:
    """How a metric reads a user's row, and whether it is a share of users."""

    values: Callable[[PerUserResults], npt.NDArray[Any]]
    proportion: bool


def _within(rank: npt.NDArray[np.float32], k: int) -> Floats:
    return np.where(np.isnan(rank), np.nan, rank <= k)


def _gain(rank: npt.NDArray[np.float32], k: int) -> Floats:
    rank64 = rank.astype(np.float64)
    return np.where(np.isnan(rank64), np.nan, (rank64 <= k) / np.log2(1 + rank64))


#: every metric of a result; ``hit@1`` counts the method's answer, ``hit@1_by_score`` its best-scored candidate
METRICS: dict[str, MetricSpec] = {
    "hit@1": MetricSpec(lambda r: r.hit1, True),
    "hit@1|valid": MetricSpec(lambda r: np.where(r.valid, r.hit1, np.nan), True),
    "valid_ratio": MetricSpec(lambda r: r.valid, True),
    "hit@1_by_score": MetricSpec(lambda r: _within(r.rank, 1), True),
    "ndcg@5": MetricSpec(lambda r: _gain(r.rank, 5), False),
    "ndcg@10": MetricSpec(lambda r: _gain(r.rank, 10), False),
    "mrr": MetricSpec(lambda r: 1.0 / r.rank.astype(np.float64), False),
    "full_hr@10": MetricSpec(lambda r: _within(r.full_rank, 10), True),
    "full_hr@20": MetricSpec(lambda r: _within(r.full_rank, 20), True),
    "full_ndcg@10": MetricSpec(lambda r: _gain(r.full_rank, 10), False),
    "full_ndcg@20": MetricSpec(lambda r: _gain(r.full_rank, 20), False),
}


def chance(metric: str, num_candidates: int) -> float | None:
    """Expected value of a candidate metric under a random order; ``None`` where chance is not defined.

    Args:
        metric: a name of :data:`METRICS`.
        num_candidates: C.
    """
    if num_candidates < 1 or metric.startswith("full_") or metric in ("valid_ratio", "hit@1|valid"):
        return None
    ranks = np.arange(1, num_candidates + 1, dtype=np.float32)
    if metric == "mrr":
        return float((1 / ranks).mean())
    kind, k = metric.split("_")[0].split("@")
    return float((_gain if kind == "ndcg" else _within)(ranks, int(k)).mean())


def write_atomically(path: Path, data: bytes, durable: bool = False, mode: int = 0o644) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Args:
        path: the file.
        data: its content.
        durable: come back only when it is on disk, where a power cut does not take it back.
        mode: permissions.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, mode)  # mkstemp makes files that only the owner can read
        os.replace(temporary, path)
        if durable:
            flush(path.parent)
    except BaseException:
        os.unlink(temporary)
        raise


def flush(path: Path) -> None:
    """Put a file, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
