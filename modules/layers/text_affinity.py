"""Similarity of candidates to a history by untrained text vectors: three columns that cost nothing to learn."""

import torch
import torch.nn.functional as F
from torch import Tensor

TEXT_AFFINITIES = ("text_mean", "text_last", "text_max")
MEAN_OVER, MAX_OVER = 5, 10


def text_affinities(text: Tensor, history: Tensor, candidates: Tensor) -> Tensor:
    """Cosines between candidates and the newest items of a history.

    Args:
        text: (N + 1, D) unit rows, row 0 zero.
        history: (B, L) item ids, left-padded.
        candidates: (B, C) item ids.

    Returns:
        (B, C, 3): cosine to the mean vector of the last 5 items, cosine to the last item, largest cosine to one of the
        last 10; all 0 for an empty history.
    """
    recent = history[:, -MAX_OVER:]
    past = F.embedding(recent, text)
    # (B, C, J): one cosine for each of the J newest items.
    cosines = F.embedding(candidates, text) @ past.transpose(1, 2)
    mean = F.normalize(past[:, -MEAN_OVER:].sum(1), dim=-1)
    by_mean = (F.embedding(candidates, text) @ mean.unsqueeze(-1)).squeeze(-1)
    padded = (recent == 0).unsqueeze(1)
    best = cosines.masked_fill(padded, -torch.inf).amax(-1)
    return torch.stack([by_mean, cosines[..., -1], best.masked_fill(best == -torch.inf, 0.0)], -1)
