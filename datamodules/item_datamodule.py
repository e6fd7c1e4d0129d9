"""Batches of item ids, for what is trained on the catalogue alone."""

from collections.abc import Iterator

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_sfubm.contracts import Catalogue
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.seeds import torch_generator


class _ItemBatches(IterableDataset[Tensor]):
    """All items 1..N once a pass, in batches (B,); a new order each pass, from a stream of its own."""

    def __init__(self, num_items: int, batch_size: int, seed: int, name: str) -> None:
        self.num_items, self.batch_size, self.seed, self.name = num_items, batch_size, seed, name
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.num_items // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch_generator(self.seed, "items", self.name, self.epoch)
        self.epoch += 1
        yield from (torch.randperm(self.num_items, generator=generator) + 1).split(self.batch_size)


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
        items = _ItemBatches(self.catalogue.num_items, self.batch_size, self.seed, self.source.name)
        return DataLoader(items, batch_size=None)
