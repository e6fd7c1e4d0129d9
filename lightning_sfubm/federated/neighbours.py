"""Exact nearest neighbours by cosine in blocks: no matrix of all pairs, low precision where it can be proved harmless."""

import torch
from torch import Tensor

from lightning_sfubm.precision import has_fast_bf16

_ROWS = 2048
_LARGE = 1 << 25  # a pool with which _ROWS rows have more similarities than this is searched by groups
_BLOCK = 1 << 27  # similarities at a time: 256 MiB in bfloat16, 512 in float32
_GROUP = 64
_SHORTLIST = 32
# Rounding unit vectors to bfloat16 (unit roundoff 2^-9) moves their product by up to 2^-8 (Cauchy-Schwarz), rounding a
# product of at most 1 by another 2^-9; the rest is for sums in float32 and norms that are 1 to 1e-3.
_ERROR = 2.0**-8 + 2.0**-9 + 2.0**-12


def nearest(queries: Tensor, pool: Tensor, k: int, low_precision: bool | None = None) -> tuple[Tensor, Tensor]:
    """The k vectors of a pool that are most similar to each query, best first.

    A large pool is searched by the maxima of groups: the k best vectors lie in the k groups of the largest maxima. Where
    bfloat16 is fast, it proposes a short list, float32 ranks it, and a bound on the rounding shows that nothing outside could
    be among the k best; queries for which it does not show that are searched in float32.

    Args:
        queries: (n, D) float32 unit rows.
        pool: (m, D) float32 unit rows, m >= k.
        k: neighbours.
        low_precision: whether to propose in bfloat16; ``None`` = for large pools on hardware that multiplies it natively.

    Returns:
        Cosines (n, k), falling, and rows of the pool (n, k).
    """
    large = len(pool) * _ROWS > _LARGE
    if low_precision is None:
        low_precision = large and has_fast_bf16(pool.device)
    rows = min(_ROWS, max(_GROUP, _BLOCK // max(1, len(pool))))
    coarse = pool.bfloat16() if low_precision else pool
    values = torch.empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.long)
    for start in range(0, len(queries), rows):
        block = queries[start : start + rows]
        found = _proposed(block, pool, coarse, k) if low_precision else _best(block @ pool.T, k, large)
        values[start : start + rows], indices[start : start + rows] = found
    return values, indices


def _proposed(block: Tensor, pool: Tensor, coarse: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Propose in bfloat16, rank in float32; what the bound does not settle is done again in float32."""
    rough, short = _best(block.bfloat16() @ coarse.T, min(max(_SHORTLIST, k), len(pool)), groups=True)
    exact = torch.einsum("nd,nsd->ns", block, pool[short])
    values, places = exact.topk(k, dim=1)
    indices = short.gather(1, places)
    if short.shape[1] < len(pool):
        open_ = (values[:, -1] <= rough[:, -1].float() + _ERROR).nonzero().flatten()
        if len(open_):
            values[open_], indices[open_] = _best(block[open_] @ pool.T, k, groups=True)
    return values, indices


def _best(similarity: Tensor, k: int, groups: bool) -> tuple[Tensor, Tensor]:
    """``similarity.topk(k, dim=1)``; with groups, columns j, j + g, j + 2 g ... are looked at through their maximum."""
    number = similarity.shape[1] // _GROUP
    if not groups or number < 2 * k:
        return similarity.topk(k, dim=1)  # type: ignore[return-value]
    maxima = similarity[:, :number].clone()
    for start in range(number, number * _GROUP, number):  # three times as fast as amax over a strided dimension
        torch.maximum(maxima, similarity[:, start : start + number], out=maxima)
    chosen = maxima.topk(k, dim=1).indices
    offsets = torch.arange(_GROUP, device=chosen.device) * number
    columns = (chosen.unsqueeze(2) + offsets).flatten(1)
    rest = torch.arange(number * _GROUP, similarity.shape[1], device=chosen.device).expand(len(similarity), -1)
    columns = torch.cat([columns, rest], dim=1)
    values, places = similarity.gather(1, columns).topk(k, dim=1)
    return values, columns.gather(1, places)
