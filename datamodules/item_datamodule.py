"""Batches of item ids, for what is trained on the catalogue alone."""

from collections.abc import Iterator

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_sfubm.contracts import Catalogue
from lightning_sfubm.datamodules.batching import BatchIndex, shard_of
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.seeds import torch_generator


class _Items(Dataset[Tensor]):
    """Ids of the rows that a sampler names."""

    def __getitem__(self, index: BatchIndex) -> Tensor:
        return torch.from_numpy(index.rows) + 1


class _ItemSampler(Sampler[BatchIndex]):
    """All items once an epoch, in an order of its own, dealt out to the processes.

    A global batch holds ``batch_size`` items for each process, of which every process takes its share; a process that the
    last one leaves without any takes the first item again. Lightning calls :meth:`set_epoch`.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int, name: str, rank: int, world_size: int) -> None:
        self.num_items, self.seed, self.name = num_items, seed, name
        self.step, self.rank, self.world_size = batch_size * world_size, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_items // self.step)

    def __iter__(self) -> Iterator[BatchIndex]:
        generator = torch_generator(self.seed, "items", self.name, self.epoch)
        for batch in torch.randperm(self.num_items, generator=generator).split(self.step):
            own = batch[self.rank :: self.world_size]
            yield BatchIndex(self.epoch, (own if len(own) else batch[:1]).numpy())


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
        """Batches of item ids (B,)."""
        rank, world_size = shard_of(self)
        sampler = _ItemSampler(self.catalogue.num_items, self.batch_size, self.seed, self.source.name, rank, world_size)
        return DataLoader(_Items(), sampler=sampler, batch_size=None)
