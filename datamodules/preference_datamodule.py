"""Data of a binary task, "will the user like this title?": a title taken or a title drawn, told with likes and dislikes."""

from typing import TypedDict

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_sfubm.contracts import Catalogue
from lightning_sfubm.datamodules.batching import BatchIndex, BucketBatchSampler, ResumableLoader, SortedBatchSampler
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule, Split, shard_of
from lightning_sfubm.datamodules.ranking import RankRows
from lightning_sfubm.datamodules.splits import check_subsets
from lightning_sfubm.errors import ConfigError, DataError
from lightning_sfubm.seeds import numpy_generator


class PreferenceBatch(TypedDict):
    """P titles to be judged per row: 1 in training; in validation and test 2, the item taken and one that was drawn."""

    history: Tensor  #: (B, L) int64, left-padded with 0: what the user took, hence liked
    disliked: Tensor  #: (B, M) int64
    candidates: Tensor  #: (B, P) int64, the items to be judged
    labels: Tensor  #: (B, P) int64, 1 = taken, 0 = drawn
    user: Tensor  #: (B,) int64 row of the user in the domain


class PreferenceRows(Dataset[PreferenceBatch]):
    """Positions of a split as judgements.

    Interactions are implicit, so that nothing is known to be disliked: M + 1 negatives a row are drawn as candidates
    are (uniform over the items outside the user's history, titles distinct, seeded). M are said to be disliked, one is
    to be judged. A row says the same in every epoch.

    Args:
        rows: the positions with M + 2 candidates, the target among them.
        chosen: (R,) rows in use.
        labels: (R,) 1 judges the target, 0 the negative; ``None`` judges both.
    """

    def __init__(self, rows: RankRows, chosen: np.ndarray, labels: np.ndarray | None = None) -> None:
        self.rows, self.chosen, self.labels = rows, chosen, labels
        self.lengths = rows.lengths[chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: BatchIndex) -> PreferenceBatch:
        return self.batch(index.rows)

    def batch(self, numbers: np.ndarray) -> PreferenceBatch:
        """The padded batch of some rows."""
        ranked = self.rows.batch(self.chosen[numbers])
        candidates, target = ranked["candidates"], ranked["target"].unsqueeze(1)
        negatives = candidates[candidates != target].view(len(candidates), candidates.shape[1] - 1)
        pair, labels = torch.cat([target, negatives[:, -1:]], 1), torch.tensor([1, 0]).expand(len(candidates), 2)
        if self.labels is not None:
            labels = torch.from_numpy(self.labels[numbers]).unsqueeze(1)
            pair = pair.gather(1, 1 - labels)
        return {
            "history": ranked["history"],
            "disliked": negatives[:, :-1],
            "candidates": pair,
            "labels": labels,
            "user": ranked["user"],
        }


class PreferenceDataModule(L.LightningDataModule):
    """TALLRec's few-shot setting (arXiv 2305.00447) on implicit data.

    Training samples are positions held out from stage 1, half of them the item taken and half an item drawn; validation
    and test judge the split's target and one drawn item of each user.

    Args:
        source: the domain, with ``stage2_positions`` of at least 1.
        shots: training samples, 16, 64 or 256 in the paper; ``None`` = all. A larger set contains a smaller one.
        num_disliked: M, titles said to be disliked.
        batch_size: samples a training batch.
        eval_batch_size: users a validation or test batch.
        max_val_users: seeded subset of users for validation; ``None`` = all.
        max_test_users: seeded subset of users for test.
        seed: of samples, order and negatives.

    Raises:
        ConfigError: a size out of range.
    """

    def __init__(
        self,
        source: DomainDataModule,
        shots: int | None = 64,
        num_disliked: int = 3,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        max_val_users: int | None = None,
        max_test_users: int | None = None,
        seed: int = 1,
    ) -> None:
        super().__init__()
        if (shots is not None and shots < 2) or num_disliked < 0:
            raise ConfigError(f"shots={shots} must be at least 2 or none, num_disliked={num_disliked} not negative")
        check_subsets(max_val_users=max_val_users, max_test_users=max_test_users)
        self.source = source
        self.shots = shots
        self.num_disliked = num_disliked
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_val_users = max_val_users
        self.max_test_users = max_test_users
        self.seed = seed

    def prepare_data(self) -> None:
        """Prepare the source."""
        self.source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up the source."""
        self.source.setup(stage)

    @property
    def catalogue(self) -> Catalogue:
        """What a model may know of the items."""
        return self.source.catalogue

    def train_rows(self) -> PreferenceRows:
        """The training samples.

        Raises:
            DataError: the source holds out fewer positions than ``shots``.
        """
        rows = self._rows("train2", None)
        shots = len(rows) if self.shots is None else self.shots
        if not 0 < shots <= len(rows):
            raise DataError(
                f"domain '{self.source.name}' holds {len(rows)} positions out for stage 2, {max(shots, 1)} are asked "
                "for: lower shots, or raise stage2_positions or stage2_users"
            )
        generator = numpy_generator(self.seed, "preference samples", self.source.domain.fingerprint)
        return PreferenceRows(rows, generator.permutation(len(rows))[:shots], 1 - np.arange(shots) % 2)

    def train_dataloader(self) -> DataLoader[PreferenceBatch]:
        """Training samples, shuffled in buckets of history length."""
        rows = self.train_rows()
        rank, world_size = shard_of(self)
        sampler = BucketBatchSampler(
            rows.lengths,
            self.batch_size,
            seed=self.seed,
            name=f"{self.source.name} preferences",
            rank=rank,
            world_size=world_size,
        )
        return ResumableLoader(rows, sampler)

    def val_dataloader(self) -> DataLoader[PreferenceBatch]:
        """Validation targets, each with an item drawn."""
        return self._evaluation("val", self.max_val_users)

    def test_dataloader(self) -> DataLoader[PreferenceBatch]:
        """Test targets, each with an item drawn."""
        return self._evaluation("test", self.max_test_users)

    def _rows(self, split: Split, max_users: int | None) -> RankRows:
        return self.source.rank_rows(split, self.num_disliked + 2, max_users, self.seed)

    def _evaluation(self, split: Split, max_users: int | None) -> DataLoader[PreferenceBatch]:
        ranked = self._rows(split, max_users)
        rows = PreferenceRows(ranked, np.arange(len(ranked)))
        rank, world_size = shard_of(self)
        sampler = SortedBatchSampler(rows.lengths, self.eval_batch_size, rank=rank, world_size=world_size)
        return DataLoader(rows, sampler=sampler, batch_size=None)
