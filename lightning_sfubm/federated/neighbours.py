"""Exact nearest vectors of other domains: one product for each pair of domains, and no matrix of all pairs.

The vectors of each domain are cut into groups. One product of two domains serves both directions: of each vector's
similarities to the other domain only the maximum over each group is kept, in bfloat16. A group whose maximum lies below the
k-th largest one by more than rounding can explain holds none of the k best; the others, about ten of a thousand, are
compared in float32. Only where most vectors are alike to within that rounding are most groups compared, at several times
the cost of a plain search.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lightning_sfubm.precision import has_fast_bf16

_GROUPS = 1024  # as many in all, and up to one more for each domain: the maxima take 2 KiB a vector
_MEMBERS = 16  # of a group, at least: each group costs a handful of calls
_ROWS = 8192  # vectors at a time: fewer, and two threads that share their cores with others mostly wait for each other


def foreign_neighbours(vectors: Tensor, sizes: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
    """The k vectors of other domains that are most similar to each vector, best first.

    The neighbours are those of a plain float32 search. Which of several equally similar vectors come first or make the
    last of the k places is not specified; the same input has the same answer on the same machine and number of threads.

    Args:
        vectors: (N, D) float32 unit rows, domain after domain.
        sizes: vectors of each domain, at least 1; their sum is N.
        k: neighbours.

    Returns:
        Cosines (N, k), falling, and rows of ``vectors`` (N, k). Where the other domains together hold fewer than k
        vectors, the last places have the cosine ``-inf`` and the row -1.
    """
    groups, real, bounds = _grouped(sizes, max(_MEMBERS, -(-len(vectors) // _GROUPS)))
    near = _near(*_maxima(vectors, groups, bounds), real, k)
    values = torch.full((len(vectors), k), -torch.inf)
    rows = torch.full((len(vectors), k), -1)
    for group in range(groups.shape[1]):
        members = groups[real[:, group], group]
        for queries in groups[near[group]].split(_ROWS):
            found = (vectors[queries] @ vectors[members].T).topk(min(k, len(members)), dim=1)
            best = torch.cat([values[queries], found.values], dim=1).topk(k, dim=1)
            values[queries] = best.values
            rows[queries] = torch.cat([rows[queries], members[found.indices]], dim=1).gather(1, best.indices)
    return values, rows


def _grouped(sizes: Sequence[int], members: int) -> tuple[Tensor, Tensor, list[int]]:
    """Cut every domain into groups.

    Returns:
        The rows of each group (members, G), the last group of a domain filled up with its last row, which changes no
        maximum; which of them are no such repetition (members, G); the first group of each domain, and G.
    """
    places = [torch.arange(-(-size // members) * members).view(-1, members).T for size in sizes]
    starts = accumulate(sizes[:-1], initial=0)
    rows = [place.clamp_max(size - 1) + start for place, size, start in zip(places, sizes, starts, strict=True)]
    real = [place < size for place, size in zip(places, sizes, strict=True)]
    return torch.cat(rows, dim=1), torch.cat(real, dim=1), list(accumulate((p.shape[1] for p in places), initial=0))


def _maxima(vectors: Tensor, groups: Tensor, bounds: Sequence[int]) -> tuple[Tensor, float]:
    """The largest similarity of each vector in each group of other domains, and how far rounding may have moved two of them.

    Returns:
        Maxima (members, G, G) in bfloat16: vector, as its place in its group and its group, by group; ``-inf`` for the
        groups of its own domain. The error covers the products; the rounding of the maxima themselves is not in it.
    """
    members, number = groups.shape
    dim = vectors.shape[1]
    error = (
        dim * 2.0**-22
    )  # four float32 sums of D products, D * 2^-24 each: two similarities, here and in a plain search
    if has_fast_bf16(vectors.device):
        # x'y' - xy = (x' - x)y' + x(y' - y): twice what rounding takes off a vector (1 % for norms that are 1 to 1e-3).
        error += 4.04 * max(float((part - part.bfloat16()).norm(dim=1).max()) for part in vectors.split(_ROWS))
        vectors = vectors.bfloat16()
    grouped = vectors[groups]
    maxima = torch.full((members, number, number), -torch.inf, dtype=torch.bfloat16)
    step = max(1, _ROWS // members)
    for begin, end in pairwise(bounds[:-1]):
        for first in range(begin, end, step):
            last = min(first + step, end)
            block = grouped[:, first:last].reshape(-1, dim)
            own = maxima[:, first:last, end:]
            for member in range(members):
                product = (block @ grouped[member, end:].T).view(members, last - first, -1).bfloat16()
                torch.maximum(own, product, out=own)
                maxima[member, end:, first:last] = product.amax(dim=0).T
    return maxima, error


def _near(maxima: Tensor, error: float, real: Tensor, k: int) -> Tensor:
    """The vectors for which each group may hold one of the k best: (G, members, G) bool, group by vector.

    At least k vectors reach the k-th largest maximum. A group with one of the k best comes up to it but for the error and
    twice the rounding to bfloat16, 2^-8 of a value each.
    """
    number = maxima.shape[1]
    near = torch.empty(number, *real.shape, dtype=torch.bool)
    for member, found in enumerate(maxima):
        # Each vector has a group of its own domain, at -inf: with fewer than k others everything but that is near.
        kth = found.topk(min(k, number), dim=1).values[:, -1:].float()
        near[:, member] = (found >= (kth - error - 2.0**-7 * kth.abs()).clamp_min(-2)).T & real[member]
    return near
