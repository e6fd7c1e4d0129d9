"""Two trained first stages as one: what both say of a candidate, for a fusion to weigh."""

import torch
from torch import Tensor, nn

from lightning_sfubm.contracts import RankBatch, Stage1
from lightning_sfubm.modules.layers.text_affinity import TEXT_AFFINITIES


class SideBySide(nn.Module):
    """A stage 1 whose affinities have the learned columns of another one besides; all else is the first one's [choice].

    Untrained text similarities are of the same texts in both, so the other's are left out.

    Args:
        stage1: trained module; not copied, not changed.
        other: another one of the same domain, the silo's own student beside the federated one for instance.
    """

    def __init__(self, stage1: Stage1, other: Stage1) -> None:
        super().__init__()
        self.stage1, self.other = stage1, other
        self.hidden_dim = stage1.hidden_dim
        self._learned = [place for place, name in enumerate(other.affinity_names) if name not in TEXT_AFFINITIES]

    @property
    def affinity_names(self) -> tuple[str, ...]:
        """Names of the columns of :meth:`affinities`."""
        names = self.other.affinity_names
        return (*self.stage1.affinity_names, *(f"other_{names[place]}" for place in self._learned))

    def user_states(self, batch: RankBatch) -> Tensor:
        """(B, H) state after the newest item."""
        return self.stage1.user_states(batch)

    def item_tables(self) -> tuple[Tensor, Tensor]:
        """ID embeddings e (N + 1, H) and semantic embeddings z (N + 1, H)."""
        return self.stage1.item_tables()

    def affinities(self, batch: RankBatch) -> Tensor:
        """(B, C, F) raw affinity features, first column the first one's score."""
        return torch.cat([self.stage1.affinities(batch), self.other.affinities(batch)[..., self._learned]], -1)
