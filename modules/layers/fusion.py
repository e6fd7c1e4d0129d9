"""Fusion of an item's local and global semantic view."""

import torch
from torch import Tensor, nn


class GatedFusion(nn.Module):
    """Convex mixture of two views with a learned gate per dimension [choice]: ``s * local + (1 - s) * other``.

    The gate starts at one half. Two equal views are returned as they are.

    Args:
        hidden_dim: H.
    """

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * hidden_dim, hidden_dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, local: Tensor, other: Tensor) -> Tensor:
        """Fuse (M, H) and (M, H) into (M, H)."""
        shares = torch.sigmoid(self.gate(torch.cat([local, other], -1)))
        return torch.lerp(other, local, shares.to(local.dtype))  # under autocast the gate alone is of a lower precision
