"""Affinity features on one scale."""

from torch import Tensor


def standardise(affinities: Tensor) -> Tensor:
    """Standardise each feature within its row of candidates: (B, C, F) -> (B, C, F), mean 0 and deviation 1.

    A column without spread becomes zero.
    """
    affinities = affinities.float()
    centred = affinities - affinities.mean(dim=1, keepdim=True)
    return centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-6)
