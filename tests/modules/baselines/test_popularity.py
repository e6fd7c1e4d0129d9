import copy

import torch

from lightning_sfubm.contracts import Catalogue, CatalogueRanker, RankBatch
from lightning_sfubm.modules.baselines.popularity import Popularity, RandomRanker


def test_popularity_scores_by_training_counts(catalogue: Catalogue, rank_batch: RankBatch) -> None:
    ranker = Popularity(catalogue)
    assert isinstance(ranker, CatalogueRanker)
    assert torch.equal(ranker.rank(rank_batch), catalogue.train_counts[rank_batch["candidates"]].float())
    assert torch.equal(ranker.score_all(rank_batch)[4], catalogue.train_counts.float())


def test_random_ranker_is_uniform_and_independent_of_order(catalogue: Catalogue, rank_batch: RankBatch) -> None:
    ranker = RandomRanker(catalogue, seed=1)
    assert isinstance(ranker, CatalogueRanker)
    order = torch.randperm(10)
    shuffled = copy.copy(rank_batch)
    shuffled["candidates"] = rank_batch["candidates"][:, order]
    assert torch.equal(ranker.rank(shuffled), ranker.rank(rank_batch)[:, order])
    everything = ranker.score_all(rank_batch)
    assert torch.equal(everything.gather(1, rank_batch["candidates"]), ranker.rank(rank_batch))
    assert not torch.equal(everything, RandomRanker(catalogue, seed=2).score_all(rank_batch))

    users = torch.arange(20_000)
    scores = ranker.score_all({**rank_batch, "user": users})[:, 1:]
    best = torch.bincount(scores.argmax(1), minlength=30)
    assert best.min() > 550  # expectation 667, standard deviation 25
    assert best.max() < 785
    assert abs(torch.corrcoef(torch.stack([scores[:-1].flatten(), scores[1:].flatten()]))[0, 1]) < 0.01
