"""Means over all ranks of a data-parallel run, where each rank has its own number of terms."""

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_sfubm.ranks import num_ranks


def mean_over_ranks(loss: Tensor, count: int) -> Tensor:
    """Scale a rank's mean so that the ranks' average is the mean over all their terms.

    Data parallelism averages gradients with equal weights, but ranks rarely hold equally many terms: sequences differ in
    length. Scaled like this, several ranks take the very step that one process takes on all their rows together.

    Args:
        loss: scalar mean over ``count`` terms of this rank.
        count: terms of this rank; may be 0, if the loss is then 0 too.

    Returns:
        ``loss * count * ranks / sum of counts``; ``loss`` itself outside a distributed run.
    """
    ranks = num_ranks()
    if ranks == 1:
        return loss
    total = torch.tensor(float(count), device=loss.device)
    dist.all_reduce(total)
    return loss * (count * ranks / total.clamp_min(1.0))


def any_rank(here: bool, device: torch.device) -> bool:
    """Whether something holds on this rank or on another. Every rank has to ask.

    Args:
        here: whether it holds on this one.
        device: of the model, which the ranks' backend can send from.
    """
    if num_ranks() == 1:
        return here
    flag = torch.tensor(int(here), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def least_over_ranks(here: int, device: torch.device) -> int:
    """The least of a number that each rank has. Every rank has to ask.

    Args:
        here: the number on this rank.
        device: of the model, which the ranks' backend can send from.
    """
    if num_ranks() == 1:
        return here
    number = torch.tensor(here, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MIN)
    return int(number)


def union_over_ranks(ids: Tensor, size: int) -> Tensor:
    """The distinct ids of all ranks, in rising order.

    Args:
        ids: ids in ``0..size - 1``, any shape.
        size: number of possible ids.

    Returns:
        (K,) int64, the same on every rank.
    """
    if num_ranks() == 1:
        return torch.unique(ids)
    present = torch.zeros(size, dtype=torch.uint8, device=ids.device)
    present[ids.flatten()] = 1
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    return present.nonzero().squeeze(1)
