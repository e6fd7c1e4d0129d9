"""The item table of a sequential model: learned per item, computed from text, or the sum of both."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.layers.cache import VersionCache
from lightning_sfubm.modules.layers.whitening import WhiteningExperts
from lightning_sfubm.modules.losses.precision import Precision
from lightning_sfubm.modules.losses.unit import unit
from lightning_sfubm.seeds import torch_generator


def id_table(num_items: int, hidden_dim: int, seed: int) -> nn.Embedding:
    """Embedding (N + 1, H) with rows of about unit length, row 0 zero, drawn from the stream ``("id_table",)``."""
    table = nn.Embedding(num_items + 1, hidden_dim, padding_idx=0)
    generator = torch_generator(seed, "id_table")
    table.weight.data.normal_(std=1.0 / math.sqrt(hidden_dim), generator=generator)
    table.weight.data[0] = 0.0
    return table


class ItemTable(nn.Module):
    """Item vectors (N + 1, H) from ids, text or both.

    Args:
        num_items: N.
        hidden_dim: H.
        features: ``"id"``, ``"text"`` or ``"id+text"`` (the sum).
        text_dim: D; needed where text is used.
        num_experts: experts of the text adaptor.
        dropout: dropout of the text vectors while training.
        seed: root of the named streams.
        precision: number format of the adaptor's product.
    """

    text: Tensor

    def __init__(
        self,
        num_items: int,
        hidden_dim: int,
        features: str,
        text_dim: int = 0,
        num_experts: int = 1,
        dropout: float = 0.0,
        seed: int = 0,
        precision: Precision = "auto",
    ) -> None:
        super().__init__()
        self._cache = VersionCache(self)
        self.ids = id_table(num_items, hidden_dim, seed) if "id" in features else None
        self.adaptor: WhiteningExperts | None = None
        if "text" in features:
            self.adaptor = WhiteningExperts(text_dim, hidden_dim, num_experts, dropout, seed, precision)
            self.register_buffer("text", torch.zeros(num_items + 1, text_dim))

    def semantic(self) -> Tensor | None:
        """The part computed from text (N + 1, H), or ``None``."""
        if self.adaptor is None:
            return None
        table = self.adaptor(self.text)
        # Row 0 is padding: the adaptor's bias would give it a direction.
        return F.pad(table[1:], (0, 0, 1, 0))

    def forward(self) -> Tensor:
        """The whole table (N + 1, H), row 0 zero."""
        semantic = self.semantic()
        if self.ids is None:
            assert semantic is not None
            return semantic
        return self.ids.weight if semantic is None else self.ids.weight + semantic

    def excerpt(self, *ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The learned vectors of some items as a small table, whose gradient is sparse.

        Args:
            ids: item ids of any shapes, 0 = padding.

        Returns:
            Table (U, H) of the distinct ids, padding among them as row 0, and the ids as rows of this table.

        Raises:
            ConfigError: the table has a part computed from text.
        """
        if self.ids is None or self.adaptor is not None:
            raise ConfigError("only a table of learned vectors can be trained by its rows: set features to 'id'")
        flat = torch.cat([torch.zeros_like(ids[0]).flatten()[:1], *(x.flatten() for x in ids)])
        distinct, rows = flat.unique(return_inverse=True)
        table = F.embedding(distinct, self.ids.weight, padding_idx=0, sparse=True)
        parts = rows[1:].split([x.numel() for x in ids])
        return table, [part.view(x.shape) for part, x in zip(parts, ids, strict=True)]

    def frozen(self) -> Tensor:
        """The detached table in evaluation mode (N + 1, H); with text, computed once per change of its parameters."""
        if self.adaptor is None:
            return self.forward().detach()
        return self._cache.get("table", self.forward)

    def frozen_unit(self, table: Tensor) -> Tensor:
        """Unit rows of :meth:`frozen`, given as ``table``; of text alone made once per change of the parameters.

        Where there are ids, telling whether they have changed takes as long.
        """
        return unit(table) if self.ids is not None else self._cache.get("unit", lambda: unit(table))
