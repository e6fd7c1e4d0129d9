"""Membership inference: find out whether a user's sequence was among those that a model was trained on.

The attacker holds the model, the catalogue and the sequence in question. The score is the model's loss on the sequence,
as it is ("loss", Yeom et al., CSF 2018) or against what models that never saw the user make of the same sequence
("calibrated": Watson et al., ICLR 2022; with a common variance this is the offline attack of Carlini et al., S&P 2022).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.significance import Estimate
from lightning_sfubm.privacy.attacks.roc import area_under_roc, rate_at
from lightning_sfubm.seeds import torch_generator

FALSE_POSITIVES = 0.01  #: where the true-positive rate is read off


@dataclass(frozen=True)
class Membership:
    """Success of one score. Chance is .5 for ``auc`` and :data:`FALSE_POSITIVES` for ``tpr``."""

    auc: Estimate
    tpr: Estimate
    members: int
    others: int


def membership(scores: Tensor, member: Tensor, *, seed: int = 0) -> Membership:
    """Measure a score.

    Args:
        scores: (U,) higher = more likely a member: the negative loss, or :func:`calibrated_scores`.
        member: (U,) bool, the truth.
        seed: of the bootstrap.

    Raises:
        DataError: there are no members, or no others.
    """
    inside, outside = scores[member], scores[~member]
    return Membership(
        area_under_roc(inside, outside), rate_at(inside, outside, FALSE_POSITIVES, seed=seed), len(inside), len(outside)
    )


def calibrated_scores(losses: Tensor, shadow_losses: Tensor, shadow_member: Tensor) -> Tensor:
    """How much lower a user's loss is than models that never saw the user would have it.

    Args:
        losses: (U,) under the attacked model.
        shadow_losses: (S, U) under models trained on known users.
        shadow_member: (S, U) bool, whom each of them was trained on.

    Returns:
        (U,) scores.

    Raises:
        DataError: every shadow model was trained on some user.
    """
    outside = ~shadow_member
    if not outside.any(dim=0).all():
        raise DataError("every shadow model was trained on some user: train them on complementary halves")
    return (shadow_losses * outside).sum(dim=0) / outside.sum(dim=0) - losses


def complementary_halves(count: int, users: int, seed: int) -> Tensor:
    """Training users of ``count`` shadow models, (count, U) bool: pairs of random halves, so that each user is left out
    of half of the models.

    Raises:
        DataError: ``count`` is odd, or there are fewer than two users.
    """
    if count % 2 or count < 2 or users < 2:
        raise DataError(f"{count} shadow models over {users} users: an even number of models and two users are needed")
    halves = torch.zeros(count, users, dtype=torch.bool)
    for pair in range(count // 2):
        order = torch.randperm(users, generator=torch_generator(seed, "shadow users", pair))
        halves[2 * pair, order[: users // 2]] = True
        halves[2 * pair + 1] = ~halves[2 * pair]
    return halves
