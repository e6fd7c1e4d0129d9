"""The reference that knows nothing: what chance gives."""

import torch
from torch import Tensor, nn

from lightning_sfubm.contracts import Catalogue, RankBatch
from lightning_sfubm.seeds import derive_seed


class RandomRanker(nn.Module):
    """Scores every item at random for every user. A ``CatalogueRanker``.

    A score is a hash of seed, user and item, so it depends neither on the order of the candidates nor on the batch. Two
    items of one user never get the same hash: each step of the mixer is a bijection of 31-bit integers.

    Args:
        catalogue: items of the domain.
        seed: root seed.

    Example:
        >>> catalogue = Catalogue("tiny", 3, ["", "a", "b", "c"], None, torch.zeros(4))
        >>> batch = {"user": torch.tensor([7]), "candidates": torch.tensor([[3, 1, 2]])}
        >>> RandomRanker(catalogue).rank(batch).shape
        torch.Size([1, 3])
    """

    def __init__(self, catalogue: Catalogue, seed: int = 0) -> None:
        super().__init__()
        self.num_items = catalogue.num_items
        self.key = derive_seed(seed, "random_ranker", catalogue.name)

    def _hash(self, users: Tensor, items: Tensor) -> Tensor:
        """Uniform scores in [0, 1) for users (B, 1) and items (B, C), by two rounds of a 31-bit integer mixer."""
        value = (users * 0x9E3779B1 + items * 0x85EBCA6B + self.key) & 0x7FFFFFFF
        for factor in (0x2C1B3C6D, 0x297A2D39):
            value = ((value ^ (value >> 15)) * factor) & 0x7FFFFFFF
        return (value ^ (value >> 16)).double() / 2.0**31

    def rank(self, batch: RankBatch) -> Tensor:
        """Scores (B, C)."""
        return self._hash(batch["user"][:, None], batch["candidates"])

    def score_all(self, batch: RankBatch) -> Tensor:
        """Scores (B, N + 1)."""
        items = torch.arange(self.num_items + 1, device=batch["user"].device)
        return self._hash(batch["user"][:, None], items[None, :])
