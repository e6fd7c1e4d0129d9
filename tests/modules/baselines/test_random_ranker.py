import copy

import torch

from lightning_sfubm.contracts import Catalogue, CatalogueRanker, RankBatch
from lightning_sfubm.modules.baselines.random_ranker import RandomRanker


def test_scores_depend_on_user_and_item_alone(catalogue: Catalogue, rank_batch: RankBatch) -> None:
    """T13, and independence of the batch: rows reordered, alone or among others score the same."""
    ranker = RandomRanker(catalogue, seed=1)
    assert isinstance(ranker, CatalogueRanker)
    order = torch.randperm(10)
    shuffled = copy.copy(rank_batch)
    shuffled["candidates"] = rank_batch["candidates"][:, order]
    assert torch.equal(ranker.rank(shuffled), ranker.rank(rank_batch)[:, order])
    for rows in (torch.tensor([3]), torch.tensor([4, 0, 2])):
        part = {name: value[rows] for name, value in rank_batch.items()}
        assert torch.equal(ranker.rank(part), ranker.rank(rank_batch)[rows])
        assert torch.equal(ranker.score_all(part), ranker.score_all(rank_batch)[rows])
    everything = ranker.score_all(rank_batch)
    assert torch.equal(everything.gather(1, rank_batch["candidates"]), ranker.rank(rank_batch))
    assert not torch.equal(everything, RandomRanker(catalogue, seed=2).score_all(rank_batch))
    other = Catalogue("other", catalogue.num_items, catalogue.titles, None, catalogue.train_counts)
    assert not torch.equal(everything, RandomRanker(other, seed=1).score_all(rank_batch))


def test_every_item_is_first_equally_often(catalogue: Catalogue, rank_batch: RankBatch) -> None:
    scores = RandomRanker(catalogue, seed=1).score_all({**rank_batch, "user": torch.arange(20_000)})[:, 1:]
    best = torch.bincount(scores.argmax(1), minlength=30)
    assert best.min() > 550  # expectation 667, standard deviation 25
    assert best.max() < 785
    assert abs(torch.corrcoef(torch.stack([scores[:-1].flatten(), scores[1:].flatten()]))[0, 1]) < 0.01
    assert (scores.sort(1).values.diff(dim=1) > 0).all()
