"""Attacks on uploaded item vectors: what someone who holds the catalogue's texts can find out.

The attacker knows the text encoder and the clean vectors of every catalogue item (both are public in practice) and
sees one upload of perturbed vectors in unknown order.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_sfubm.privacy.mechanisms import expected_cosine
from lightning_sfubm.seeds import torch_generator

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


def linkage(uploaded: Tensor, catalogue: Tensor, owner: Tensor, *, one_to_one: bool = False) -> float:
    """Share of uploaded vectors traced to their own item.

    Args:
        uploaded: (n, D) vectors as received.
        catalogue: (N, D) clean vectors of all items.
        owner: (n,) true catalogue row of each uploaded vector. Items with identical clean vectors count as one.
        one_to_one: match without replacement (the attacker knows that no item was uploaded twice).

    Returns:
        A share in [0, 1]. Chance is 1 / N.
    """
    _, canonical = torch.unique(catalogue, dim=0, return_inverse=True)
    match = one_to_one_matches if one_to_one else nearest_matches
    return float((canonical[match(uploaded, catalogue)] == canonical[owner]).float().mean())


def perturbation_report(
    clean: Tensor,
    sent: Tensor,
    global_view: Tensor | None,
    sigma: float,
    *,
    seed: int,
    max_items: int = 2000,
    uploads: tuple[int, ...] = (1, 2, 4, 8, 16),
) -> dict[str, object]:
    """Cosine figures of a perturbation and the success of the attacks on it, for one domain and one sigma.

    Args:
        clean: (N, D) clean unit vectors.
        sent: (N, D) vectors as uploaded, same row order.
        global_view: (N, D) what the server returned, or ``None``.
        sigma: noise of ``sent``.
        seed: names the attacked subset and the fresh draws of the averaging attack.
        max_items: attacks run on at most this many items (the matching is quadratic); the catalogue stays whole with
            replacement and is cut to the attacked items without.
        uploads: how many *freshly* perturbed uploads the averaging attack sees, for comparison: the product sends one
            fixed draw, so that its own curve stays at the first value.

    Returns:
        A JSON-able dictionary.
    """
    cosine = (clean * sent).sum(dim=1)
    pick = torch.randperm(len(clean), generator=torch_generator(seed, "linkage items"))[:max_items]
    subset = clean[pick]
    with_replacement = linkage(sent[pick], clean, pick)
    without = linkage(sent[pick], subset, torch.arange(len(pick)), one_to_one=True)
    averaged = []
    generator = torch_generator(seed, "averaging attack", sigma)
    total, drawn = torch.zeros_like(subset), 0
    for count in uploads:
        while drawn < count:
            total += normalize(subset + sigma * torch.randn(subset.shape, generator=generator), dim=1)
            drawn += 1
        averaged.append(linkage(normalize(total, dim=1), clean, pick))
    report: dict[str, object] = {
        "sigma": sigma,
        "dim": clean.shape[1],
        "items": len(clean),
        "attacked_items": len(pick),
        "cosine_mean": float(cosine.mean()),
        "cosine_min": float(cosine.min()),
        "cosine_max": float(cosine.max()),
        "expected_cosine": expected_cosine(sigma, clean.shape[1]),
        "obfuscation": float(1 - cosine.mean()),
        "linkage_with_replacement": with_replacement,
        "linkage_without_replacement": without,
        "averaging": {"uploads": list(uploads), "linkage": averaged},
        "chance": 1 / len(clean),
    }
    if global_view is not None:
        view = (clean * global_view).sum(dim=1)
        report |= {
            "global_cosine_mean": float(view.mean()),
            "global_cosine_min": float(view.min()),
            "global_cosine_max": float(view.max()),
        }
    return report
