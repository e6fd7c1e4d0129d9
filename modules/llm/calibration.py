"""How far to trust a tuned head: one factor, by likelihood on validation data."""

import torch
from torch import Tensor


@torch.no_grad()
def fit_factor(base: Tensor, added: Tensor, target: Tensor, largest: float = 4.0, steps: int = 60) -> float:
    """The factor g in [0, largest] under which ``softmax(base + g added)`` gives the targets the highest likelihood.

    The log-likelihood is concave in g, so its derivative falls; the zero is found by bisection.

    Args:
        base: (B, C) scores that stand.
        added: (B, C) scores to be weighed.
        target: (B,) index of the target.
        largest: upper bound of g.
        steps: halvings of the interval.
    """
    wanted = added.gather(1, target.unsqueeze(1)).squeeze(1)

    def slope(factor: float) -> float:
        chances = torch.softmax(base + factor * added, dim=1)
        return float((wanted - (chances * added).sum(1)).sum())

    if slope(0.0) <= 0:
        return 0.0
    if slope(largest) >= 0:
        return largest
    low, high = 0.0, largest
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2
