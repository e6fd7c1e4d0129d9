"""Item vectors to start from: a spectral embedding of which items stand near each other in training sequences."""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sfubm.contracts import TrainHistories
from lightning_sfubm.seeds import torch_generator

OVERSAMPLING = 32  #: further columns of the subspace: the spectrum is flat, and the leading ones converge slowly
ITERATIONS = 15
NOTHING = 1e-5


def cooccurrences(histories: TrainHistories, num_items: int, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How near items stand to each other, over all users: two items d places apart count 1 / d, in both directions.

    Args:
        histories: training sequences.
        num_items: N.
        window: largest distance that counts.

    Returns:
        Row, column (E,), items from 0, sorted by row and column, and weight (E,) float64 of each pair that occurs.
    """
    lengths = histories.ends - histories.starts
    users = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    items = histories.items[np.repeat(histories.starts, lengths) + within].astype(np.int64) - 1
    keys, weights = [], []
    for distance in range(1, window + 1):
        first, second = items[:-distance], items[distance:]
        pairs = (users[:-distance] == users[distance:]) & (first != second)
        first, second = first[pairs], second[pairs]
        keys += [first * num_items + second, second * num_items + first]
        weights.append(np.full(2 * len(first), 1.0 / distance))
    distinct, place = np.unique(np.concatenate(keys), return_inverse=True)
    return distinct // num_items, distinct % num_items, np.bincount(place, np.concatenate(weights), len(distinct))


def cooccurrence_vectors(
    histories: TrainHistories, num_items: int, hidden_dim: int, seed: int, window: int = 5, length: float = 2.0
) -> Tensor:
    """A spectral embedding of the co-occurrence graph, to start an item table from.

    Weights are divided by the root of both items' degrees (the symmetric normalised adjacency), so that frequent items do not
    rule. Its leading eigenvectors, times the root of their absolute values, are found by subspace iteration and turned by a
    random rotation, so that no coordinate (and no attention head) holds all of the variance. Rows get one length.
    [choice: this form of four, with nearly equal outcome; figures in docs/methods/sasrec.md]

    Args:
        histories: training sequences.
        num_items: N.
        hidden_dim: H; where N is smaller, the columns left over are zero before the rotation.
        seed: root of the named stream.
        window: largest distance of two items that counts.
        length: of a row. A random start has rows of length 1 [choice: twice that where nothing else is in the table;
            validation NDCG@10 of SASRec on Beauty .0611 against .0581 with 1].

    Returns:
        (N + 1, H) float32, rows of the length asked for; row 0 and items without neighbours are zero.
    """
    rows, columns, weights = cooccurrences(histories, num_items, window)
    table = torch.zeros(num_items + 1, hidden_dim)
    if not len(rows):
        return table
    degrees = np.bincount(rows, weights, num_items)
    values = weights / np.sqrt(degrees[rows] * degrees[columns])
    bounds = np.searchsorted(rows, np.arange(num_items + 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        graph = torch.sparse_csr_tensor(
            torch.from_numpy(bounds),
            torch.from_numpy(columns),
            torch.from_numpy(values).float(),
            (num_items, num_items),
            check_invariants=False,
        )
    generator = torch_generator(seed, "co-occurrence")
    width = min(hidden_dim + OVERSAMPLING, num_items)
    basis = torch.linalg.qr(graph @ torch.randn(num_items, width, generator=generator)).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(graph @ (graph @ basis)).Q
    # The graph is symmetric: its singular vectors are its eigenvectors, found exactly within the subspace.
    eigenvalues, turn = torch.linalg.eigh(basis.T @ (graph @ basis))
    leading = eigenvalues.abs().argsort(descending=True)[:hidden_dim]
    vectors = (basis @ turn[:, leading]) * eigenvalues[leading].abs().sqrt()
    rotation = torch.linalg.qr(torch.randn(hidden_dim, hidden_dim, generator=generator)).Q
    vectors = F.pad(vectors, (0, hidden_dim - vectors.shape[1])) @ rotation
    # What an item without neighbours gets is rounding alone, of a millionth of the others' length.
    table[1:] = length * F.normalize(vectors, dim=1) * (vectors.norm(dim=1, keepdim=True) > NOTHING)
    return table
