"""Linkage: trace uploaded item vectors back to the catalogue.

The attacker knows the text encoder and the clean vectors of every catalogue item (both are public in practice) and
sees one upload, or several, of perturbed vectors in unknown order.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

_BLOCK = 2048


def nearest_matches(uploaded: Tensor, catalogue: Tensor) -> Tensor:
    """Row of the nearest catalogue vector for each uploaded one, with replacement: (n, D), (N, D) -> (n,)."""
    return torch.cat([(uploaded[i : i + _BLOCK] @ catalogue.T).argmax(dim=1) for i in range(0, len(uploaded), _BLOCK)])


def one_to_one_matches(uploaded: Tensor, catalogue: Tensor) -> Tensor:
    """Greedy one-to-one matching, most similar pairs first: (n, D), (N, D) -> (n,), n <= N.

    With similarities as both sides' preferences this is the stable matching. It is computed by rounds of mutual best
    choices instead of sorting all n x N pairs.
    """
    match = torch.full((len(uploaded),), -1, dtype=torch.long)
    rows, columns = torch.arange(len(uploaded)), torch.arange(len(catalogue))
    while len(rows):
        similarity = uploaded[rows] @ catalogue[columns].T
        best_column = similarity.argmax(dim=1)
        best_row = similarity.argmax(dim=0)
        mutual = best_row[best_column] == torch.arange(len(rows))
        match[rows[mutual]] = columns[best_column[mutual]]
        keep = torch.ones(len(columns), dtype=torch.bool)
        keep[best_column[mutual]] = False
        rows, columns = rows[~mutual], columns[keep]
    return match


def linked(uploaded: Tensor, catalogue: Tensor, owner: Tensor, *, one_to_one: bool = False) -> Tensor:
    """Which uploaded vectors are traced to their own item.

    Args:
        uploaded: (n, D) vectors as received.
        catalogue: (N, D) clean vectors of all items.
        owner: (n,) true catalogue row of each uploaded vector. Items with identical clean vectors count as one.
        one_to_one: match without replacement (the attacker knows that no item was uploaded twice).

    Returns:
        (n,) bool. Chance is 1 / N.
    """
    _, canonical = torch.unique(catalogue, dim=0, return_inverse=True)
    match = one_to_one_matches if one_to_one else nearest_matches
    return canonical[match(uploaded, catalogue)] == canonical[owner]


def linkage(uploaded: Tensor, catalogue: Tensor, owner: Tensor, *, one_to_one: bool = False) -> float:
    """Share of uploaded vectors traced to their own item, in [0, 1]; see :func:`linked`."""
    return float(linked(uploaded, catalogue, owner, one_to_one=one_to_one).float().mean())


def averaged(uploads: list[Tensor]) -> Tensor:
    """The mean direction of several uploads of the same items, each (n, D): independent noise would cancel in it."""
    return normalize(torch.stack(uploads).sum(dim=0), dim=1)
