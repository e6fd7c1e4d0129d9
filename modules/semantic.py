"""The semantic teacher: item vectors computed from text in a space all domains share, and an encoder over them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_sfubm.errors import MessageError
from lightning_sfubm.modules.layers.cache import VersionCache
from lightning_sfubm.modules.layers.fusion import GatedFusion
from lightning_sfubm.modules.layers.whitening import WhiteningExperts
from lightning_sfubm.modules.losses.cross_entropy import cosine_inputs
from lightning_sfubm.modules.losses.fkd import nearest_items
from lightning_sfubm.modules.losses.precision import Precision
from lightning_sfubm.modules.losses.unit import unit


class SemanticTeacher(nn.Module):
    """Adaptor, fusion of local and global view, and a sequence encoder with cosine logits.

    An item's vector is ``z = fuse(MoE(x), MoE(g))`` with x its own text vector and g the vector the federation sent back.
    Before anything was sent g = x, for which the fusion returns MoE(x): only one view is computed then, and the fusion gets
    no gradient.

    The parameters are what a federation may average; the text vectors are buffers and stay here.

    Args:
        encoder: sequence encoder of width H.
        num_items: N.
        text_dim: D.
        num_experts: experts of the adaptor.
        dropout: dropout of the text vectors while training.
        tau: temperature of the cosine logits.
        seed: root of the named streams.
        precision: number format of the adaptor's product.
        own_share: of the item's own view in the fusion, at the start.
    """

    text: Tensor
    global_text: Tensor | None

    def __init__(
        self,
        encoder: nn.Module,
        num_items: int,
        text_dim: int,
        num_experts: int = 8,
        dropout: float = 0.0,
        tau: float = 0.07,
        seed: int = 0,
        precision: Precision = "auto",
        own_share: float = 0.5,
    ) -> None:
        super().__init__()
        hidden_dim = int(encoder.hidden_dim)  # type: ignore[arg-type]
        self.tau = tau
        self.encoder = encoder
        self.adaptor = WhiteningExperts(text_dim, hidden_dim, num_experts, dropout, seed, precision)
        self.fusion = GatedFusion(hidden_dim, own_share)
        self.register_buffer("text", torch.zeros(num_items + 1, text_dim))
        self.register_buffer("global_text", None)
        self._cache = VersionCache(self)

    def receive(self, vectors: Tensor) -> None:
        """Take the global view of all items.

        Args:
            vectors: (N, D), row i belongs to item i + 1.

        Raises:
            MessageError: if the shape is another one or a value is not finite.
        """
        expected = (len(self.text) - 1, self.text.shape[1])
        if tuple(vectors.shape) != expected:
            raise MessageError(f"Aggregated semantics have shape {tuple(vectors.shape)}, this domain needs {expected}.")
        if not vectors.isfinite().all():
            raise MessageError("Aggregated semantics hold values that are not finite.")
        self.allocate_global()
        assert self.global_text is not None
        self.global_text[1:].copy_(vectors)

    def allocate_global(self) -> None:
        """Make room for a global view, for :meth:`receive` and for checkpoints that hold one."""
        if self.global_text is None:
            self.global_text = torch.zeros_like(self.text)

    def table(self) -> Tensor:
        """Semantic item vectors z (N + 1, H), row 0 zero."""
        z = self.adaptor(self.text[1:])
        if self.global_text is not None:
            z = self.fusion(z, self.adaptor(self.global_text[1:]))
        return F.pad(z, (0, 0, 1, 0))

    def frozen_table(self) -> Tensor:
        """Detached z (N + 1, H) in evaluation mode, computed once per change of the teacher."""
        return self._cache.get("table", self.table)

    def neighbours(self, k: int) -> Tensor:
        """The k nearest items of each in z-space (N + 1, k), computed once per change of the teacher."""
        return self._cache.get(f"neighbours_{k}", lambda: nearest_items(self.table(), k))

    def states(self, history: Tensor, table: Tensor) -> Tensor:
        """States (B, L, H) of histories (B, L) over item vectors (N + 1, H)."""
        return self.encoder(F.embedding(history, table, padding_idx=0), history != 0)

    def scaled(self, states: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """States and table whose dot products are the teacher's logits."""
        return cosine_inputs(states, table, self.tau)

    def frozen_scaled(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`scaled` with :meth:`frozen_table`, whose rows are made unit ones once per change of the teacher."""
        return unit(states) / self.tau, self._cache.get("unit", lambda: unit(self.frozen_table()))
