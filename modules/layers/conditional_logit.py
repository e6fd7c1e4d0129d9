"""Maximum likelihood of a choice among candidates, for a handful of weights."""

import torch
from torch import Tensor, nn


def fit_conditional_logit(
    features: Tensor, target: Tensor, start: Tensor, towards: Tensor, strength: float | Tensor
) -> Tensor:
    """Weights w (F,) that maximise the mean log-likelihood of ``softmax(features @ w)`` less a quadratic penalty.

    The objective is concave, so the start only saves steps. Solved with L-BFGS in float32.

    Args:
        features: (B, C, F) of the candidates.
        target: (B,) position of the chosen candidate.
        start: (F,) first weights.
        towards: (F,) weights that the penalty draws to.
        strength: of the penalty ``strength * |w - towards|^2``, beside a mean over samples; one for all or one each (F,).
    """
    with torch.enable_grad():
        weights = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(features @ weights, target)
            loss = loss + (strength * (weights - towards).square()).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()
