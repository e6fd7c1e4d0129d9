"""Data of stage 2: one prediction per row, among candidates, over a domain prepared for stage 1."""

import lightning as L
from torch.utils.data import DataLoader

from lightning_sfubm.contracts import Catalogue, RankBatch
from lightning_sfubm.datamodules.batching import order_seed_of, shard_of
from lightning_sfubm.datamodules.domain import Domain
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.splits import check_subsets
from lightning_sfubm.errors import ConfigError


class RankingDataModule(L.LightningDataModule):
    """Training on the positions that stage 1 never saw, or for text alone on those it did; tests on stored candidate lists.

    Args:
        source: the domain, with ``stage2_positions`` of at least 1.
        batch_size: samples a training batch.
        eval_batch_size: users a validation or test batch.
        train_candidates: C in training; lists are drawn anew each epoch.
        max_train_users: seeded subset of the stage-2 users; ``None`` = all.
        max_val_users: seeded subset of users for validation.
        max_test_users: seeded subset of users for test; method comparisons must share it.
        seed: of the subsets; of order and training candidates where the trainer's run has no seed.
        text_samples: train on so many of the positions that trained stage 1 instead of the held-out ones. For a model that
            reads nothing of stage 1: another would learn to trust it more than it may.

    Raises:
        ConfigError: a subset is of less than one user or sample.
    """

    def __init__(
        self,
        source: DomainDataModule,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        train_candidates: int = 8,
        max_train_users: int | None = None,
        max_val_users: int | None = None,
        max_test_users: int | None = None,
        seed: int = 1,
        text_samples: int | None = None,
    ) -> None:
        super().__init__()
        check_subsets(max_train_users=max_train_users, max_val_users=max_val_users, max_test_users=max_test_users)
        check_subsets(text_samples=text_samples)
        self.source = source
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.train_candidates = train_candidates
        self.max_train_users = max_train_users
        self.max_val_users = max_val_users
        self.max_test_users = max_test_users
        self.seed = seed
        self.text_samples = text_samples

    def prepare_data(self) -> None:
        """Prepare the source."""
        self.source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up the source.

        Raises:
            ConfigError: the source holds no positions out for stage 2, yet training is asked for.
        """
        self.source.setup(stage)
        if stage == "fit" and self.text_samples is None and len(self.source.splits.stage2) == 0:
            raise ConfigError(
                f"domain '{self.source.name}' holds no positions out for stage 2: set stage2_positions to 1, 2 or 3 "
                "before stage 1 is trained"
            )

    @property
    def domain(self) -> Domain:
        """The prepared domain."""
        return self.source.domain

    @property
    def catalogue(self) -> Catalogue:
        """What a model may know of the items."""
        return self.source.catalogue

    def train_dataloader(self) -> DataLoader[RankBatch]:
        """The training positions, shuffled in buckets of history length."""
        rank, world_size = shard_of(self)
        of_text = self.text_samples is not None
        return self.source.rank_dataloader(
            "train1" if of_text else "train2",
            self.batch_size,
            self.train_candidates,
            None if of_text else self.max_train_users,
            self.seed,
            shuffle=True,
            draws_seed=order_seed_of(self),
            rank=rank,
            world_size=world_size,
            max_rows=self.text_samples,
        )

    def held_out_dataloader(self, batch_size: int) -> DataLoader[RankBatch]:
        """The held-out positions in a fixed order, whole to every process: to choose numbers by, not to train on."""
        return self.source.rank_dataloader("train2", batch_size, self.train_candidates, self.max_train_users, self.seed)

    def val_dataloader(self) -> DataLoader[RankBatch]:
        """Validation targets of the seeded subset."""
        return self._evaluation("val", self.max_val_users)

    def test_dataloader(self) -> DataLoader[RankBatch]:
        """Test targets of the seeded subset."""
        return self._evaluation("test", self.max_test_users)

    def predict_dataloader(self) -> DataLoader[RankBatch]:
        """The same as :meth:`test_dataloader`: an LLM scores candidates, and the stored ones are those of the test."""
        return self.test_dataloader()

    def _evaluation(self, split: str, max_users: int | None) -> DataLoader[RankBatch]:
        rank, world_size = shard_of(self)
        return self.source.rank_dataloader(
            "val" if split == "val" else "test",
            self.eval_batch_size,
            max_users=max_users,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )
