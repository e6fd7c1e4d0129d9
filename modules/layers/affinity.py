"""Affinity features on one scale."""

import torch
from torch import Tensor

PRODUCT_SCALE = 3.0  #: divides products, so that a penalty on weights bears on them more than on features [choice]


def standardise(affinities: Tensor) -> Tensor:
    """Standardise each feature within its row of candidates: (B, C, F) -> (B, C, F), mean 0 and deviation 1.

    A column without spread becomes zero.
    """
    affinities = affinities.float()
    mean = affinities.mean(dim=1, keepdim=True)
    centred = affinities - mean
    spread = centred.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-6)
    # Equal values differ from their mean by its rounding alone, which is no spread however small it is.
    return torch.where(spread > 1e-6 * (1 + mean.abs()), centred / spread, torch.zeros_like(centred))


def num_products(features: int) -> int:
    """Columns of :func:`with_products`: F (F + 3) / 2."""
    return features * (features + 3) // 2


def with_products(features: Tensor) -> Tensor:
    """Features, their squares and the products of each two: (..., F) -> (..., F (F + 3) / 2), the features first.

    A weighted sum of these can say that one feature counts more where another is high.
    """
    first, second = torch.triu_indices(features.shape[-1], features.shape[-1], device=features.device)
    return torch.cat([features, features[..., first] * features[..., second] / PRODUCT_SCALE], -1)
