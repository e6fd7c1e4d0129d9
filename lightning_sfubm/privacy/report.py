"""Perturbation figures for each domain and noise level. A function of vectors: it reads nothing and sends nothing."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_sfubm.privacy.attacks import perturbation_report
from lightning_sfubm.privacy.mechanisms import GaussianPerturbation


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
        ``{domain: [figures by rising sigma]}``, see :func:`~lightning_sfubm.privacy.attacks.perturbation_report`.
    """
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in clean}
    for sigma in sorted({*sigmas, *([] if used is None else [used])}):
        sent = {name: mechanism(name, sigma)(vectors) for name, vectors in clean.items()}
        views = aggregate(sent)
        for name, vectors in clean.items():
            report = perturbation_report(vectors, sent[name], views.get(name), sigma, seed=seed)
            figures[name].append({**report, "used": sigma == used})
    return figures
