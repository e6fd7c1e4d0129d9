"""Fusion of an item's local and global semantic view."""

import math

import torch
from torch import Tensor, nn


class GatedFusion(nn.Module):
    """Convex mixture of two views with a learned gate per dimension [choice]: ``s * local + (1 - s) * other``.

    Two equal views are returned as they are.

    Args:
        hidden_dim: H.
        own_share: what s starts at, between 0 and 1.
    """

    def __init__(self, hidden_dim: int, own_share: float = 0.5) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * hidden_dim, hidden_dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, math.log(own_share / (1 - own_share)))

    def forward(self, local: Tensor, other: Tensor) -> Tensor:
        """Fuse (M, H) and (M, H) into (M, H)."""
        shares = torch.sigmoid(self.gate(torch.cat([local, other], -1)))
        return torch.lerp(other, local, shares.to(local.dtype))  # under autocast the gate alone is of a lower precision
