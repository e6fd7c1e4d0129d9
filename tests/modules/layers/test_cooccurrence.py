import numpy as np
import pytest
import torch

from lightning_sfubm.contracts import Catalogue, TrainHistories
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.layers.cooccurrence import cooccurrence_vectors, cooccurrences
from lightning_sfubm.modules.sequential import SequentialRecommender

NUM_ITEMS = 40


@pytest.fixture
def histories() -> TrainHistories:
    """60 users of 0 to 12 items; after every sequence stand two items that are not for training."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 13, 60)
    starts = np.concatenate([[0], np.cumsum(lengths + 2)[:-1]])
    items = generator.integers(1, NUM_ITEMS, (lengths + 2).sum())  # item 40 is never seen
    return TrainHistories(items, starts, starts + lengths)


def by_hand(histories: TrainHistories, window: int) -> np.ndarray:
    """The same counts, one pair of places at a time."""
    table = np.zeros((NUM_ITEMS, NUM_ITEMS))
    for start, end in zip(histories.starts, histories.ends, strict=True):
        for a in range(start, end):
            for b in range(start, end):
                first, second = histories.items[a] - 1, histories.items[b] - 1
                if 1 <= abs(a - b) <= window and first != second:
                    table[first, second] += 1 / abs(a - b)
    return table


@pytest.mark.parametrize("window", [1, 5, 30])
def test_weights_are_those_of_all_pairs_within_the_window(histories: TrainHistories, window: int) -> None:
    rows, columns, weights = cooccurrences(histories, NUM_ITEMS, window)
    found = np.zeros((NUM_ITEMS, NUM_ITEMS))
    found[rows, columns] = weights
    expected = by_hand(histories, window)
    np.testing.assert_allclose(found, expected)
    assert len(rows) == (expected > 0).sum()


def test_vectors_are_the_leading_eigenvectors_of_the_normalised_weights(histories: TrainHistories) -> None:
    """Against the dense eigendecomposition: cosines do not change under the rotation."""
    weights = by_hand(histories, 5)
    degrees = weights.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        values, vectors = np.linalg.eigh(np.nan_to_num(weights / np.sqrt(np.outer(degrees, degrees))))
    leading = np.argsort(-np.abs(values))[:8]
    expected = (vectors[:, leading] * np.abs(values[leading])) @ vectors[:, leading].T
    lengths = np.sqrt(np.maximum(np.diag(expected), 1e-12))
    found = cooccurrence_vectors(histories, NUM_ITEMS, 8, seed=0, length=3.0)
    assert found.shape == (NUM_ITEMS + 1, 8)
    assert found.dtype == torch.float32
    cosines = (found[1:] @ found[1:].T).numpy() / 9
    np.testing.assert_allclose(cosines, expected / np.outer(lengths, lengths), atol=1e-3)
    torch.testing.assert_close(found[1:NUM_ITEMS].norm(dim=1), torch.full((NUM_ITEMS - 1,), 3.0))


def test_padding_and_unseen_items_stay_zero_and_the_seed_only_turns(histories: TrainHistories) -> None:
    first, again, other = (cooccurrence_vectors(histories, NUM_ITEMS, 8, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert first[0].abs().max() == 0
    assert first[NUM_ITEMS].abs().max() == 0
    assert not torch.allclose(first, other, atol=1e-2)
    torch.testing.assert_close(first @ first.T, other @ other.T, atol=1e-3, rtol=0)


def test_fewer_items_than_columns_and_no_pairs_at_all() -> None:
    pair = TrainHistories(np.array([1, 2, 1]), np.array([0]), np.array([3]))
    vectors = cooccurrence_vectors(pair, 2, 16, seed=0)
    assert vectors.shape == (3, 16)
    assert vectors.isfinite().all()
    assert vectors[1].norm() > 0
    alone = TrainHistories(np.array([1, 2, 3]), np.array([0, 1, 2]), np.array([1, 2, 3]))
    assert torch.equal(cooccurrence_vectors(alone, 3, 4, seed=0), torch.zeros(4, 4))


def test_held_out_items_leave_no_trace(synthetic: DomainDataModule) -> None:
    """T15: validation and test items may change at will."""
    histories = synthetic.catalogue.histories
    assert histories is not None
    items = np.array(histories.items)
    held_out = np.concatenate([synthetic.splits.val, synthetic.splits.test])
    items[held_out] = items[held_out] % synthetic.num_items + 1
    changed = TrainHistories(items, histories.starts, histories.ends)
    before, after = (cooccurrence_vectors(h, synthetic.num_items, 8, 0) for h in (histories, changed))
    assert torch.equal(before, after)


def test_other_training_users_mean_other_histories(synthetic: DomainDataModule) -> None:
    users = np.zeros(synthetic.domain.num_users, dtype=bool)
    users[:10] = True
    histories = synthetic.trained_by(users).catalogue.histories
    assert histories is not None
    assert (histories.ends[10:] == histories.starts[10:]).all()
    assert (histories.ends[:10] > histories.starts[:10]).all()


@pytest.mark.parametrize("logits", ["dot", "cosine"])
def test_an_item_without_neighbours_has_a_gradient_that_is_bounded(histories: TrainHistories, logits: str) -> None:
    """Under cosine logits the gradient of a zero vector is not: such an item keeps its random start."""
    counts = torch.ones(NUM_ITEMS + 1, dtype=torch.long)
    module = SequentialRecommender(SASRec(8, dropout=0.0), item_init="cooccurrence", logits=logits)  # type: ignore[arg-type]
    module.bind(Catalogue("shop", NUM_ITEMS, [""] * (NUM_ITEMS + 1), None, counts, histories))
    module.train_histories = lambda: histories  # type: ignore[method-assign]
    module._start_items()
    assert module.items.ids is not None
    alone = module.items.ids.weight[NUM_ITEMS]
    assert (float(alone.detach().norm()) > 0.1) == (logits == "cosine")
    assert not module.items.ids.weight[0].any()
    history = torch.tensor([[1, 2, NUM_ITEMS]])
    module.train()
    module.log_losses = lambda *args, **kwargs: None  # type: ignore[method-assign]
    batch = {"history": history, "targets": torch.tensor([[2, NUM_ITEMS, 3]]), "user": torch.arange(1)}
    module.training_step(batch, 0).backward()  # type: ignore[arg-type]
    gradient = module.items.ids.weight.grad
    assert gradient is not None
    assert float(gradient.norm(dim=1).max()) < 1e3
