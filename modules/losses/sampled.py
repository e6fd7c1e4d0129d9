"""Losses on a few sampled negatives, for catalogues too large for the full softmax."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def proposal(train_counts: Tensor, power: float) -> Tensor:
    """Distribution from which negatives are drawn: training counts + 1, flattened by ``power``.

    Args:
        train_counts: (N + 1,) training interactions per item.
        power: 0 = uniform, 1 = by popularity; values between are common for large catalogues.

    Returns:
        (N + 1,) float32 probabilities, 0 at the padding row.
    """
    weights = (train_counts.float() + 1.0).pow(power)
    weights[0] = 0.0
    return weights / weights.sum()


def draw(cumulative: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Item ids drawn with replacement, in time that hardly depends on the number of items.

    Args:
        cumulative: (N + 1,) float64 running sum of the proposal's probabilities, on the CPU.
        count: M.
        generator: CPU generator of the named stream.

    Returns:
        (M,) item ids in ``1..N``.
    """
    # The last sum is 1 but for rounding; scaled by it, no draw lies beyond the end.
    points = torch.rand(count, dtype=torch.float64, generator=generator) * cumulative[-1]
    return torch.searchsorted(cumulative, points, right=True).clamp_(1, len(cumulative) - 1)


def sampled_cross_entropy(
    states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor, log_q: Tensor, logq: float = 1.0
) -> Tensor:
    """Softmax over the target and M shared negatives, corrected for how they were drawn (log-Q correction).

    Subtracting the log of the expected count from each negative's logit makes the partition function unbiased (Bengio and
    Senecal, 2008). Negatives equal to a row's target are masked in that row.

    Args:
        states: (V, H).
        table: (N + 1, H).
        targets: (V,) item ids.
        negatives: (M,) item ids drawn with replacement, shared by all rows.
        log_q: (M,) log-probability with which each of the negatives is drawn.
        logq: strength of the correction in [0, 1]; 0 leaves the logits as they are (GRU4Rec's default).

    Returns:
        Scalar mean loss; 0 if V is 0.
    """
    if len(states) == 0:
        return states.sum() + 0.0 * table.sum()
    positive = (states * F.embedding(targets, table)).sum(-1, keepdim=True)
    expected = log_q + math.log(len(negatives))
    logits = states @ F.embedding(negatives, table).T - logq * expected
    logits = logits.masked_fill(negatives == targets[:, None], -torch.inf)
    return (torch.cat([positive, logits], 1).logsumexp(1) - positive.squeeze(1)).mean()


def bpr_max(
    states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor, bpreg: float = 1.0, elu_param: float = 0.5
) -> Tensor:
    """BPR-max: the target against M shared negatives, each weighted by its softmax share (arXiv 1706.03847).

    With r the scores after an ELU and s the softmax over a row's negatives:
    ``-log(sum_j s_j sigmoid(r_target - r_j)) + bpreg sum_j s_j r_j^2``, computed in logs. Negatives equal to a row's
    target are masked in that row; a row without any other negative counts 0.

    Args:
        states: (V, H).
        table: (N + 1, H).
        targets: (V,) item ids.
        negatives: (M,) item ids, shared by all rows.
        bpreg: weight of the score regularisation, not negative.
        elu_param: alpha of the ELU, not negative; 0 leaves the scores linear.

    Returns:
        Scalar mean loss; 0 if V is 0.
    """
    if len(states) == 0:
        return states.sum() + 0.0 * table.sum()
    positive = (states * F.embedding(targets, table)).sum(-1, keepdim=True)
    scores = states @ F.embedding(negatives, table).T
    if elu_param:
        positive, scores = F.elu(positive, elu_param), F.elu(scores, elu_param)
    same = negatives == targets[:, None]
    alone = same.all(1)
    # A row of nothing but -inf would make the softmax, and with it every gradient, NaN.
    log_share = scores.masked_fill(same & ~alone[:, None], -torch.inf).log_softmax(1)
    won = (log_share + F.logsigmoid(positive - scores)).logsumexp(1)
    penalty = (log_share.exp() * scores.square()).sum(1)
    return (bpreg * penalty - won).masked_fill(alone, 0.0).mean()


def binary_cross_entropy(states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """One observed and one sampled item per position, each classified alone (the loss of the original SASRec).

    Args:
        states: (V, H).
        table: (N + 1, H).
        targets: (V,) item ids.
        negatives: (V,) item ids.

    Returns:
        Scalar mean loss; 0 if V is 0.
    """
    if len(states) == 0:
        return states.sum() + 0.0 * table.sum()
    positive = (states * F.embedding(targets, table)).sum(-1)
    negative = (states * F.embedding(negatives, table)).sum(-1)
    return (F.softplus(-positive) + F.softplus(negative)).mean()


def other_items(targets: Tensor, num_items: int, generator: torch.Generator) -> Tensor:
    """One uniform item per target that is not the target.

    Args:
        targets: (V,) item ids in ``1..N``.
        num_items: N, at least 2.
        generator: CPU generator of the named stream.

    Returns:
        (V,) item ids.
    """
    draw = torch.randint(1, num_items, targets.shape, generator=generator).to(targets.device)
    return draw + (draw >= targets)
