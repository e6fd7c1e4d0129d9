import torch

from lightning_sfubm.contracts import Catalogue, CatalogueRanker, RankBatch
from lightning_sfubm.modules.baselines.popularity import Popularity


def test_popularity_scores_by_training_counts(catalogue: Catalogue, rank_batch: RankBatch) -> None:
    ranker = Popularity(catalogue)
    assert isinstance(ranker, CatalogueRanker)
    assert torch.equal(ranker.rank(rank_batch), catalogue.train_counts[rank_batch["candidates"]].float())
    assert torch.equal(ranker.score_all(rank_batch)[4], catalogue.train_counts.float())
