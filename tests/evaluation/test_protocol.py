"""Rankers whose result is known in advance, through the one evaluation all methods go through."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_sfubm.contracts import RankBatch, Ranker
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.synthetic import SyntheticReader
from lightning_sfubm.evaluation.evaluate import evaluate_ranker
from lightning_sfubm.evaluation.metrics import Ties
from lightning_sfubm.evaluation.results import PerUserResults, chance
from lightning_sfubm.modules.baselines.random_ranker import RandomRanker

USERS, ITEMS, CANDIDATES = 2000, 150, 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DomainDataModule]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUBM_CACHE", str(tmp_path_factory.mktemp("cache")))
        module = DomainDataModule("shop", SyntheticReader(num_users=USERS, num_items=ITEMS, mean_length=7), k_core=0)
        module.prepare_data()
        module.setup()
        yield module


class Oracle:
    """Knows the target."""

    def rank(self, batch: RankBatch) -> Tensor:
        return (batch["candidates"] == batch["target"][:, None]).float()

    def score_all(self, batch: RankBatch) -> Tensor:
        return torch.zeros(len(batch["target"]), ITEMS + 1).scatter(1, batch["target"][:, None], 1.0)


class Constant:
    """Finds all items equally good."""

    def rank(self, batch: RankBatch) -> Tensor:
        return torch.full(batch["candidates"].shape, 3.5)

    def score_all(self, batch: RankBatch) -> Tensor:
        return torch.full((len(batch["target"]), ITEMS + 1), 3.5)


def evaluated(data: DomainDataModule, ranker: Ranker, ties: Ties = "conservative", size: int = 256) -> PerUserResults:
    batches = data.rank_dataloader("test", size, with_seen=True)
    return evaluate_ranker(ranker, batches, catalogue=data.catalogue, method="m", domain="shop", split="test", seed=1,
                           candidate_hash=data.candidate_hash["test"], ties=ties, progress=False)  # fmt: skip


def test_oracle_is_always_right(data: DomainDataModule) -> None:
    result = evaluated(data, Oracle())
    assert len(result) == USERS
    summary = result.summary()
    for metric in ("hit@1", "hit@1_by_score", "ndcg@5", "ndcg@10", "mrr", "full_hr@10", "full_ndcg@10", "valid_ratio"):
        assert summary[metric].value == 1.0, metric
        assert summary[metric].n == USERS


def unseen(data: DomainDataModule) -> Tensor:
    """(U,) items of the catalogue outside each known history, the target itself counted in."""
    rows = [
        torch.tensor([ITEMS - len(set(seen[seen > 0].tolist()) - {int(target)})])
        for batch in data.rank_dataloader("test", 256, with_seen=True)
        for seen, target in zip(batch["seen"], batch["target"], strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("ties", ["conservative", "optimistic", "expected"])
def test_constant_gets_what_the_tie_policy_says(data: DomainDataModule, ties: Ties) -> None:
    result = evaluated(data, Constant(), ties)
    left = unseen(data).double()
    rank, full_rank = {
        "conservative": (CANDIDATES, left),
        "optimistic": (1, torch.ones(USERS)),
        "expected": ((1 + CANDIDATES) / 2, (1 + left) / 2),
    }[ties]
    assert (result.rank == rank).all()
    assert torch.equal(torch.from_numpy(result.full_rank).double(), full_rank.double())
    assert result.hit1.all() == (ties == "optimistic")
    assert result.hit1.any() == (ties == "optimistic")


def test_random_is_at_chance(data: DomainDataModule) -> None:
    """Hits lie within 3.3 binomial standard deviations of .05 (99.9 %), other metrics within as many standard errors."""
    ranker = RandomRanker(data.catalogue, seed=1)
    result = evaluated(data, ranker)
    assert abs(result.hit1.sum() - 0.05 * USERS) < 3.3 * (0.05 * 0.95 * USERS) ** 0.5
    for metric in ("hit@1", "ndcg@5", "ndcg@10", "mrr"):
        values, expected = result.per_user(metric), chance(metric, CANDIDATES)
        assert abs(values.mean() - expected) < 3.3 * values.std() / USERS**0.5, metric
    counts = torch.bincount(torch.from_numpy(result.rank).long(), minlength=CANDIDATES + 1)[1:]
    assert ((counts - USERS / CANDIDATES) ** 2 / (USERS / CANDIDATES)).sum() < 43.8  # chi-square of 19, 99.9 %
    share = torch.from_numpy(result.full_rank) / unseen(data)
    assert abs(share.mean() - 0.5) < 0.03  # standard error .0065


def test_random_does_not_depend_on_batches(data: DomainDataModule) -> None:
    ranker = RandomRanker(data.catalogue, seed=1)
    large, small = evaluated(data, ranker, size=512), evaluated(data, ranker, size=37)
    order, other = large.user.argsort(), small.user.argsort()
    assert (large.rank[order] == small.rank[other]).all()
    assert (large.full_rank[order] == small.full_rank[other]).all()
    assert large.meta.candidate_hash == small.meta.candidate_hash
