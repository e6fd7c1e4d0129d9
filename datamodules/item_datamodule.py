"""Batches of item ids, for what is trained on the catalogue alone."""

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_sfubm.contracts import Catalogue
from lightning_sfubm.datamodules.batching import BatchIndex, BucketBatchSampler, ResumableLoader, shard_of
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.errors import ConfigError


class _Items(Dataset[Tensor]):
    """Ids of the rows that a sampler names."""

    def __getitem__(self, index: BatchIndex) -> Tensor:
        return torch.from_numpy(index.rows) + 1


class ItemDataModule(L.LightningDataModule):
    """The items of a domain, for the prompt projector.

    Args:
        source: the domain.
        batch_size: items of a batch, all of them negatives of each other in a contrastive loss.
        seed: of the order.

    Raises:
        ConfigError: a batch of fewer than 2 items.
    """

    def __init__(self, source: DomainDataModule, batch_size: int = 256, seed: int = 1) -> None:
        super().__init__()
        if batch_size < 2:
            raise ConfigError(f"batch_size must be at least 2, got {batch_size}: a lone item has no negatives")
        self.source, self.batch_size, self.seed = source, batch_size, seed

    def prepare_data(self) -> None:
        """Prepare the source."""
        self.source.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up the source."""
        self.source.setup(stage)

    @property
    def catalogue(self) -> Catalogue:
        """The items."""
        return self.source.catalogue

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Batches of item ids (B,), each item once an epoch over all processes."""
        rank, world_size = shard_of(self)
        alike = np.ones(self.catalogue.num_items, dtype=np.int64)
        sampler = BucketBatchSampler(
            alike, self.batch_size, seed=self.seed, name=f"{self.source.name} items", rank=rank, world_size=world_size
        )
        return ResumableLoader(_Items(), sampler)
