"""Attribute inference: a property of an item (its category, say) from the vector that was sent.

The attacker does not hold the item itself, but other items with the property known, from a public shop for instance, and
knows the noise level. A linear classifier (ridge regression on one-hot classes) is fitted to those.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.significance import Estimate, wilson_interval


@dataclass(frozen=True)
class Attribute:
    """Success of the attack. Chance is ``majority``: always to answer the class most common among the known items."""

    accuracy: Estimate
    majority: float
    classes: int


def attribute_inference(
    known: Tensor, known_labels: Tensor, sent: Tensor, labels: Tensor, *, ridge: float = 1.0
) -> Attribute:
    """Predict labels from vectors.

    Args:
        known: (n, D) vectors of the attacker's own items, perturbed as the sent ones are.
        known_labels: (n,) int64 classes of them.
        sent: (m, D) vectors under attack.
        labels: (m,) int64, the truth.
        ridge: weight of the penalty; inputs are unit vectors.

    Returns:
        Share of right answers with a 95 % interval, and the chance level.

    Raises:
        DataError: there are no items, or fewer than two classes are known.
    """
    classes, known_index = torch.unique(known_labels, return_inverse=True)
    if not len(sent) or len(classes) < 2:
        raise DataError(
            f"attribute inference over {len(sent)} items and {len(classes)} known classes: nothing to tell apart"
        )
    counts = torch.bincount(known_index)
    majority = float((labels == classes[counts.argmax()]).double().mean())
    mean, shares = known.double().mean(dim=0), counts.double() / len(known)
    centred = known.double() - mean
    targets = torch.nn.functional.one_hot(known_index, len(classes)).double() - shares
    gram = centred.T @ centred + ridge * torch.eye(known.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, centred.T @ targets)
    answers = classes[((sent.double() - mean) @ weights + shares).argmax(dim=1)]
    hits = int((answers == labels).sum())
    return Attribute(wilson_interval(hits, len(labels)), majority, len(classes))


def most_common(values: list[str], limit: int) -> Tensor:
    """Class of each value among the ``limit`` most common ones; -1 for the others, (n,) int64.

    Args:
        values: one an item; an empty one is nobody's class.
        limit: number of classes.
    """
    counts: dict[str, int] = {}
    for value in values:
        if value:
            counts[value] = counts.get(value, 0) + 1
    ranked = sorted(counts, key=lambda value: (-counts[value], value))[:limit]
    number = {value: index for index, value in enumerate(ranked)}
    return torch.tensor([number.get(value, -1) for value in values], dtype=torch.int64)
