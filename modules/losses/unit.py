"""Rows of length one with gradients that stay within bounds."""

import torch.nn.functional as F
from torch import Tensor

#: Vectors below this length are divided by it: about what one step of AdamW makes of zero. Those of items and states start,
#: and stay, more than ten times as long.
SHORTEST = 1e-2


def unit(vectors: Tensor) -> Tensor:
    """Normalise rows (..., H); a zero row stays zero.

    Its gradient is ``1 / SHORTEST`` times what arrives for the result. By the default of ``F.normalize`` it would be 1e12
    times that, after which AdamW, which divides by the longest gradients it has seen, hardly moves what gave the row.
    """
    return F.normalize(vectors, dim=-1, eps=SHORTEST)
