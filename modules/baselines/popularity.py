"""The reference that learns nothing about users: what most of them took."""

from torch import Tensor, nn

from lightning_sfubm.contracts import Catalogue, RankBatch


class Popularity(nn.Module):
    """Scores an item by its number of training interactions. A ``CatalogueRanker``.

    Args:
        catalogue: items of the domain.
    """

    scores: Tensor

    def __init__(self, catalogue: Catalogue) -> None:
        super().__init__()
        self.register_buffer("scores", catalogue.train_counts.float())

    def rank(self, batch: RankBatch) -> Tensor:
        """Scores (B, C)."""
        return self.scores[batch["candidates"]]

    def score_all(self, batch: RankBatch) -> Tensor:
        """Scores (B, N + 1)."""
        return self.scores.expand(len(batch["user"]), -1)
