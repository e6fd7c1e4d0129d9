"""Perturbation figures for each domain and noise level. A function of vectors: it reads nothing and sends nothing."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_sfubm.privacy.attacks.linkage import linkage
from lightning_sfubm.privacy.mechanisms import GaussianPerturbation, expected_cosine
from lightning_sfubm.seeds import torch_generator


def privacy_figures(
    clean: Mapping[str, Tensor],
    mechanism: Callable[[str, float], GaussianPerturbation],
    aggregate: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    *,
    sigmas: list[float],
    used: float | None,
    seed: int,
) -> dict[str, list[dict[str, Any]]]:
    """Cosines and linkage by domain and sigma, for the noise in use and for others beside it.

    Args:
        clean: unperturbed unit vectors (N, D) by domain.
        mechanism: the perturbation of a domain at a sigma.
        aggregate: the server's answer to a set of uploads; ``{}`` where nothing comes back.
        sigmas: levels to look at.
        used: the level in use, added to them and marked; ``None`` where nothing was sent.
        seed: of the attacks' own draws.

    Returns:
        ``{domain: [figures by rising sigma]}``, see :func:`perturbation_report`.
    """
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in clean}
    for sigma in sorted({*sigmas, *([] if used is None else [used])}):
        sent = {name: mechanism(name, sigma)(vectors) for name, vectors in clean.items()}
        views = aggregate(sent)
        for name, vectors in clean.items():
            report = perturbation_report(vectors, sent[name], views.get(name), sigma, seed=seed)
            figures[name].append({**report, "used": sigma == used})
    return figures


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
