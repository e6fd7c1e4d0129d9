"""Item inference: find out which items of the catalogue a client was trained on in a round.

The attacker holds the weights before and after the client's local training (what the server sees) and the catalogue. Three
scores: how far the first layer's map of an item's text vector moved, how much likelier the item became as the next one, and how
strongly any single item now calls for it (a transition that the model remembers).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_sfubm.errors import DataError


def first_layer_shift(before: Tensor, after: Tensor, vectors: Tensor) -> Tensor:
    """Length of the movement of each item's image under the first layer.

    Args:
        before: (O, D) weight of the layer.
        after: (O, D) the same after training.
        vectors: (N, D) text vectors.

    Returns:
        (N,) scores, at least 0.
    """
    return (vectors @ (after - before).T).norm(dim=1)


def logit_shift(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], block: int = 256) -> Tensor:
    """Rise of each item's log-probability as the next item, averaged over probe histories.

    Args:
        before: states (Q, H) of the probes and item vectors (N, H) whose products are the logits.
        after: the same after training.
        block: probes at a time.

    Returns:
        (N,) scores.

    Raises:
        DataError: there are no probes.
    """
    queries = len(before[0])
    if not queries:
        raise DataError("item inference needs at least one probe history")
    total = before[1].new_zeros(len(before[1]))
    for start in range(0, queries, block):
        for sign, (states, items) in ((-1, before), (1, after)):
            logits = states[start : start + block] @ items.T
            total += sign * torch.log_softmax(logits, dim=1).sum(dim=0)
    return total / queries


def strongest_call(states: Tensor, items: Tensor, probes: Tensor, block: int = 256) -> Tensor:
    """Largest log-probability of each item as the next one after any probe but itself.

    Args:
        states: (Q, H) of histories of one item each, after training.
        items: (N, H) item vectors.
        probes: (Q,) int64, which row of ``items`` each history holds.
        block: probes at a time.

    Returns:
        (N,) scores.

    Raises:
        DataError: there are fewer than two probes.
    """
    if len(states) < 2:
        raise DataError("item inference needs at least two probe histories")
    best = items.new_full((len(items),), -torch.inf)
    for start in range(0, len(states), block):
        own = probes[start : start + block]
        logits = torch.log_softmax(states[start : start + block] @ items.T, dim=1)
        logits[torch.arange(len(own)), own] = -torch.inf
        best = torch.maximum(best, logits.max(dim=0).values)
    return best


def random_update(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """Weights after an update of the same length in every tensor and of random direction: one that knows no data.

    What a score makes of it shows how far from .5 an area can lie by chance alone. That is further than an interval over
    items says, since similar items move together.
    """
    moved = {}
    for name, value in before.items():
        noise = torch.randn(value.shape, generator=generator)
        moved[name] = value + noise * ((after[name] - value).norm() / noise.norm().clamp_min(1e-12))
    return moved
