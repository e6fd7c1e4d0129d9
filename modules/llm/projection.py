"""Projectors from stage 1 into the token space of an LLM."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenProjector(nn.Module):
    """Soft tokens from user states, ID embeddings, semantic embeddings and affinities.

    Each projector is Linear, LayerNorm, GELU, Linear; its output is scaled to the mean norm of the LLM's token
    embeddings, so that a soft token looks like a token to the frozen layers. An item's soft token is the sum of its
    parts over the root of their number, which keeps that norm [choice]. The affinity part of a candidate is a linear
    map without bias, so that an affinity of zero (the row's mean) adds nothing.

    Args:
        input_dim: H.
        output_dim: d, width of the LLM's token embeddings.
        scale: mean norm of the LLM's token embeddings.
        user: build P_u.
        item: build P_i.
        semantic: build P_t.
        num_affinities: F, 0 for no affinity part.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        scale: float,
        user: bool = True,
        item: bool = True,
        semantic: bool = True,
        num_affinities: int = 0,
    ) -> None:
        super().__init__()
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.scale = scale
        self.user_map = _mlp(input_dim, output_dim) if user else None
        self.item_map = _mlp(input_dim, output_dim) if item else None
        self.semantic_map = _mlp(input_dim, output_dim) if semantic else None
        self.affinity_map = nn.Linear(num_affinities, output_dim, bias=False) if num_affinities else None
        if self.affinity_map is not None:
            nn.init.normal_(self.affinity_map.weight, std=scale / output_dim**0.5)

    def users(self, states: Tensor) -> Tensor:
        """(n, H) user states -> (n, d) soft tokens."""
        if self.user_map is None:
            raise ValueError("this projector was built without a user part")
        return self._scaled(self.user_map(states))

    def items(self, ids: Tensor, semantics: Tensor) -> Tensor:
        """(n, H) ID embeddings and (n, H) semantic embeddings -> (n, d); zeros where both parts are off."""
        parts = [
            self._scaled(layer(x))
            for layer, x in ((self.item_map, ids), (self.semantic_map, semantics))
            if layer is not None
        ]
        if not parts:
            return ids.new_zeros(len(ids), self.output_dim)
        return torch.stack(parts).sum(0) / len(parts) ** 0.5

    def affinities(self, standardised: Tensor) -> Tensor:
        """(n, F) affinities, standardised within their row -> (n, d)."""
        if self.affinity_map is None:
            raise ValueError("this projector was built without an affinity part")
        return self.affinity_map(standardised)

    def _scaled(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.scale


def _mlp(input_dim: int, output_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(input_dim, output_dim), nn.LayerNorm(output_dim), nn.GELU(), nn.Linear(output_dim, output_dim)
    )
