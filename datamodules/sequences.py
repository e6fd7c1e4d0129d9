"""Stage-1 training rows: windows over the users' training sequences, turned into padded batches in one gather."""

from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_sfubm.contracts import TrainBatch
from lightning_sfubm.datamodules.batching import BatchIndex
from lightning_sfubm.datamodules.domain import Domain
from lightning_sfubm.datamodules.splits import Splits
from lightning_sfubm.errors import ConfigError

Windows = Literal["last", "all"]


def left_padded(items: np.ndarray, starts: np.ndarray, ends: np.ndarray, length: int | None = None) -> np.ndarray:
    """Gather slices ``items[start:end]`` into rows, newest last.

    Args:
        items: (M,) item ids.
        starts: (B,) first positions.
        ends: (B,) one past the last positions.
        length: L; ``None`` = the longest slice, at least 1. A longer slice loses its oldest items.

    Returns:
        (B, L) int64, left-padded with 0.
    """
    if length is None:
        length = max(1, int((ends - starts).max(initial=0)))
    positions = ends[:, None] - np.arange(length, 0, -1)
    real = positions >= starts[:, None]
    return np.where(real, items[np.where(real, positions, 0)], 0).astype(np.int64)


class TrainSequences(Dataset[TrainBatch]):
    """Rows of at most ``max_length`` inputs and as many targets, taken from the stage-1 part of each user's sequence.

    Args:
        domain: the domain.
        splits: bounds of its parts.
        max_length: L, longest history.
        windows: ``"last"`` = one row a user, their latest L + 1 items; ``"all"`` = consecutive windows from the newest
            item backwards, so that every position but a user's first is a target exactly once.

    Attributes:
        users: (R,) int64 row of the user.
        starts: (R,) int64 first position of a window.
        ends: (R,) int64 one past its last position.
        lengths: (R,) int64 number of inputs, for bucketing.
    """

    def __init__(self, domain: Domain, splits: Splits, max_length: int, windows: Windows = "last") -> None:
        if max_length < 1:
            raise ConfigError(f"max_length must be at least 1, not {max_length}")
        if windows not in ("last", "all"):
            raise ConfigError(f"windows must be 'last' or 'all', not {windows!r}")
        self.items = domain.items
        targets = np.maximum(splits.train_end - splits.train_start - 1, 0)
        rows = -(-targets // max_length) if windows == "all" else (targets > 0).astype(np.int64)
        self.users = np.repeat(np.arange(len(rows)), rows)
        number = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
        self.ends = splits.train_end[self.users] - number * max_length
        self.starts = np.maximum(splits.train_start[self.users], self.ends - max_length - 1)
        self.lengths = self.ends - self.starts - 1

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: BatchIndex) -> TrainBatch:
        return self.batch(index.rows)

    def batch(self, rows: np.ndarray) -> TrainBatch:
        """The padded batch of some rows."""
        length = max(1, int(self.lengths[rows].max(initial=0)))
        both = left_padded(self.items, self.starts[rows], self.ends[rows], length + 1)
        targets = np.where(both[:, :-1] > 0, both[:, 1:], 0)
        return {
            "history": torch.from_numpy(np.ascontiguousarray(both[:, :-1])),
            "targets": torch.from_numpy(targets),
            "user": torch.from_numpy(self.users[rows]),
        }
