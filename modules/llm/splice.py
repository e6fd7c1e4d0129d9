"""Soft tokens into the sequence of token embeddings."""

from torch import Tensor


def splice(embeddings: Tensor, places: Tensor, vectors: Tensor) -> Tensor:
    """Replace the embeddings at the marked places by vectors, in row-major order of the places.

    Args:
        embeddings: (B, S, d) token embeddings.
        places: (B, S) bool, True where a soft token stands.
        vectors: (n, d) soft tokens; gradients flow into them.

    Returns:
        (B, S, d).

    Raises:
        ValueError: if n differs from the number of places, or the widths differ.
    """
    count = int(places.sum())
    if vectors.shape != (count, embeddings.shape[-1]):
        raise ValueError(
            f"{count} soft-token places of width {embeddings.shape[-1]}, but vectors of shape {tuple(vectors.shape)}"
        )
    return embeddings.masked_scatter(places.unsqueeze(-1), vectors.to(embeddings.dtype))
