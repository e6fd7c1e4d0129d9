"""Rows with one target among candidates (validation, test, training samples of stage 2), and rows with none to predict."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_sfubm.contracts import PredictBatch, RankBatch
from lightning_sfubm.datamodules.batching import BatchIndex
from lightning_sfubm.datamodules.sequences import left_padded
from lightning_sfubm.evaluation.candidates import CandidateLists, CandidateSampler
from lightning_sfubm.seeds import numpy_generator


@dataclass(frozen=True)
class FixedCandidates:
    """Candidate lists drawn once (validation, test)."""

    lists: CandidateLists

    def at(self, epoch: int) -> CandidateLists:
        """The same lists in every epoch."""
        return self.lists


@dataclass
class RedrawnCandidates:
    """Candidate lists drawn anew for each epoch, from a stream named by it (training).

    The lists of an epoch do not depend on batch order or on the number of workers: each worker draws the whole table,
    which takes seconds where there are hundreds of thousands of rows.
    """

    sampler: CandidateSampler
    num_candidates: int
    seed: int
    name: str
    _drawn: tuple[int, CandidateLists] | None = field(default=None, repr=False)

    def at(self, epoch: int) -> CandidateLists:
        """The lists of an epoch."""
        if self._drawn is None or self._drawn[0] != epoch:
            generator = numpy_generator(self.seed, "training candidates", self.name, epoch)
            self._drawn = (epoch, self.sampler.draw(self.num_candidates, generator))
        return self._drawn[1]


class RankRows(Dataset[RankBatch]):
    """Predictions at given positions of the users' sequences.

    Args:
        items: (M,) item ids of the domain.
        starts: (R,) first position of each row's user.
        positions: (R,) position of each target; the history is everything before it.
        users: (R,) rows of the users.
        candidates: lists of the R rows.
        max_length: L, longest history.
        with_seen: whether batches carry the complete known history.

    Attributes:
        lengths: (R,) length of each row's history.
        seen_lengths: (R,) length of the complete one; ``None`` where batches do not carry it.
    """

    def __init__(
        self,
        items: np.ndarray,
        starts: np.ndarray,
        positions: np.ndarray,
        users: np.ndarray,
        candidates: FixedCandidates | RedrawnCandidates,
        max_length: int,
        with_seen: bool = False,
    ) -> None:
        self.items = items
        self.first = starts
        self.positions = positions
        self.users = users
        self.candidates = candidates
        self.starts = np.maximum(starts, positions - max_length)
        self.lengths = positions - self.starts
        self.seen_lengths = positions - starts if with_seen else None

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: BatchIndex) -> RankBatch:
        return self.batch(index.rows, index.epoch)

    def batch(self, rows: np.ndarray, epoch: int = 0) -> RankBatch:
        """The padded batch of some rows in an epoch."""
        lists = self.candidates.at(epoch)
        ends = self.positions[rows]
        batch: RankBatch = {
            "history": torch.from_numpy(left_padded(self.items, self.starts[rows], ends)),
            "target": torch.from_numpy(self.items[ends].astype(np.int64)),
            "candidates": torch.from_numpy(lists.candidates[rows].astype(np.int64)),
            "target_index": torch.from_numpy(lists.target_index[rows].astype(np.int64)),
            "user": torch.from_numpy(self.users[rows]),
        }
        if self.seen_lengths is not None:
            batch["seen"] = torch.from_numpy(left_padded(self.items, self.first[rows], ends))
        return batch


class CompleteRows(Dataset[PredictBatch]):
    """Complete sequences of users, the newest item among the history.

    Args:
        items: (M,) item ids of the domain.
        offsets: (U + 1,) bounds of the users' sequences; users without an item have no row.
        max_length: L, longest history.

    Attributes:
        lengths: (R,) length of each row's history.
        seen_lengths: (R,) length of the complete one.
    """

    def __init__(self, items: np.ndarray, offsets: np.ndarray, max_length: int) -> None:
        self.items = items
        self.users = np.flatnonzero(offsets[1:] > offsets[:-1])
        self.first, self.ends = offsets[self.users], offsets[self.users + 1]
        self.starts = np.maximum(self.first, self.ends - max_length)
        self.lengths = self.ends - self.starts
        self.seen_lengths = self.ends - self.first

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: BatchIndex) -> PredictBatch:
        rows = index.rows
        return {
            "history": torch.from_numpy(left_padded(self.items, self.starts[rows], self.ends[rows])),
            "user": torch.from_numpy(self.users[rows]),
            "seen": torch.from_numpy(left_padded(self.items, self.first[rows], self.ends[rows])),
        }
