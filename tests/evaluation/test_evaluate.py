import numpy as np
import pytest
import torch
from torch import nn

from lightning_sfubm.contracts import Catalogue
from lightning_sfubm.errors import DataError, SFUBMError
from lightning_sfubm.evaluation.evaluate import evaluate_ranker

N, C = 30, 6


@pytest.fixture
def catalogue():
    counts = torch.arange(N + 1)
    return Catalogue("films", N, [""] + [f"film {i}" for i in range(1, N + 1)], None, counts)


def make_batches(users=10, size=4, seen=True):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for start in range(0, users, size):
        rows = range(start, min(users, start + size))
        items = torch.stack([1 + torch.randperm(N, generator=generator) for _ in rows])
        target_index = torch.randint(0, C, (len(items),), generator=generator)
        candidates = items[:, :C]
        batch = {
            "history": torch.cat([torch.zeros(len(items), 2, dtype=torch.int64), items[:, C : C + 3]], dim=1),
            "target": candidates.gather(1, target_index[:, None])[:, 0],
            "candidates": candidates,
            "target_index": target_index,
            "user": torch.tensor(list(rows)),
        }
        if seen:
            batch["seen"] = items[:, C : C + 8]
        batches.append(batch)
    return batches


class ByPrice(nn.Module):
    """Scores an item by a fixed random price."""

    def __init__(self):
        super().__init__()
        self.price = nn.Embedding(N + 1, 1)
        self.frozen = nn.Parameter(torch.zeros(7), requires_grad=False)
        nn.init.normal_(self.price.weight, generator=torch.Generator().manual_seed(1))

    def rank(self, batch):
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.price(batch["candidates"])[..., 0]


class ByPriceEverywhere(ByPrice):
    def score_all(self, batch):
        return self.price.weight[:, 0].expand(len(batch["target"]), -1)


class Answering(ByPrice):
    """Answers with the candidate of the right position for even users, nonsense for odd ones."""

    def rank_with_validity(self, batch):
        scores = torch.nn.functional.one_hot(batch["target_index"], batch["candidates"].shape[1]).float()
        return scores, batch["target_index"], batch["user"] % 2 == 0


class Undecided(ByPrice):
    """One score for all candidates; the first is the choice, as ``argmax`` has it."""

    def rank_with_validity(self, batch):
        scores = torch.zeros(batch["candidates"].shape)
        return scores, scores.argmax(1), torch.ones(len(scores), dtype=torch.bool)


class AgainstItsScores(ByPrice):
    """Answers with the target, which it scores last."""

    def rank_with_validity(self, batch):
        index = batch["target_index"]
        scores = -torch.nn.functional.one_hot(index, batch["candidates"].shape[1]).float()
        return scores, index, torch.ones(len(scores), dtype=torch.bool)


def run(ranker, batches, catalogue, **settings):
    return evaluate_ranker(ranker, batches, catalogue=catalogue, method="m", domain="films", split="test", seed=1,
                           candidate_hash="abc", progress=False, **settings)  # fmt: skip


def test_columns_equal_a_loop_over_users(catalogue):
    model, batches = ByPriceEverywhere(), make_batches()
    model.train()
    result = run(model, batches, catalogue, label="By price", order=2, extra={"note": 1})
    price = model.price.weight.detach()[:, 0].numpy()
    row = 0
    for batch in batches:
        for b in range(len(batch["user"])):
            target, candidates = int(batch["target"][b]), batch["candidates"][b].numpy()
            seen = set(batch["seen"][b].tolist())
            assert result.user[row] == batch["user"][b]
            assert result.target[row] == target
            assert result.rank[row] == 1 + (price[candidates] > price[target]).sum()
            assert result.hit1[row] == (result.rank[row] == 1)
            allowed = [i for i in range(1, N + 1) if i not in seen]
            assert result.full_rank[row] == 1 + (price[allowed] > price[target]).sum()
            assert result.history_length[row] == 8
            assert result.target_train_count[row] == target
            row += 1
    assert row == len(result) == 10
    assert result.valid.all()
    assert model.training, "the training mode is restored"
    meta = result.meta
    assert (meta.label, meta.order, meta.extra, meta.num_candidates, meta.num_items) == (
        "By price",
        2,
        {"note": 1},
        C,
        N,
    )
    assert meta.trainable_params == N + 1
    assert min(meta.wall_s, meta.peak_rss_mb) > 0


def test_results_do_not_depend_on_batching(catalogue):
    model = ByPriceEverywhere()
    small = make_batches(size=3)
    big = [{key: torch.cat([batch[key] for batch in small]) for key in small[0]}]
    a, b = run(model, small, catalogue), run(model, big, catalogue)
    for name in ("user", "rank", "full_rank", "hit1", "history_length"):
        assert np.array_equal(getattr(a, name), getattr(b, name))


def test_an_invalid_answer_is_a_miss(catalogue):
    result = run(Answering(), make_batches(), catalogue)
    assert result.valid.tolist() == [user % 2 == 0 for user in range(10)]
    assert result.hit1.tolist() == result.valid.tolist()
    assert not np.array_equal(result.hit1, result.rank == 1), "the answer counts, not the scores"
    assert np.isnan(result.full_rank).all()


def test_history_stands_in_where_the_complete_one_is_absent(catalogue):
    result = run(ByPriceEverywhere(), make_batches(seen=False), catalogue)
    assert result.history_length.tolist() == [3] * 10


def test_full_ranking_can_be_left_out(catalogue):
    assert np.isnan(run(ByPriceEverywhere(), make_batches(), catalogue, full=False).full_rank).all()


def test_no_batches_give_an_empty_result(catalogue):
    result = run(ByPrice(), [], catalogue)
    assert len(result) == 0
    assert result.summary()["hit@1"].n == 0


def test_a_tie_policy_reaches_the_ranks(catalogue):
    class Constant:
        def rank(self, batch):
            return torch.zeros(batch["candidates"].shape)

    assert set(run(Constant(), make_batches(), catalogue).rank) == {float(C)}
    optimistic = run(Constant(), make_batches(), catalogue, ties="optimistic")
    assert set(optimistic.rank) == {1.0}
    assert optimistic.meta.ties == "optimistic"
    assert optimistic.meta.trainable_params is None


def test_bf16_runs_the_ranker_under_autocast(catalogue):
    seen = []

    class Matrix(ByPrice):
        def rank(self, batch):
            scores = torch.ones(2, 2) @ torch.ones(2, 2)
            seen.append(scores.dtype)
            return super().rank(batch)

    run(Matrix(), make_batches(), catalogue, precision="bf16-mixed")
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_scores_that_bf16_makes_equal_are_told_apart(catalogue, precision):
    model = ByPriceEverywhere()
    model.price.weight.data = 1 + 1e-4 * torch.arange(N + 1.0)[:, None]  # in bf16 all are 1
    batches = make_batches()
    result = run(model, batches, catalogue, precision=precision)
    rows = [(batch, b) for batch in batches for b in range(len(batch["user"]))]
    for row, (batch, b) in enumerate(rows):
        target, seen = int(batch["target"][b]), batch["seen"][b].tolist()
        assert result.rank[row] == 1 + int((batch["candidates"][b] > target).sum())
        assert result.full_rank[row] == 1 + len({*range(target + 1, N + 1)} - {*seen})


def test_broken_rankers_get_one_clear_error(catalogue):
    class Wide(ByPrice):
        def rank(self, batch):
            return torch.zeros(len(batch["user"]), C + 1)

    class Diverged(ByPrice):
        def rank(self, batch):
            return torch.full(batch["candidates"].shape, torch.nan)

    class Short(ByPrice):
        def score_all(self, batch):
            return torch.zeros(len(batch["user"]), N)

    with pytest.raises(DataError, match=r"'m' returned scores of shape \(4, 7\), expected \(4, 6\)"):
        run(Wide(), make_batches(), catalogue)
    with pytest.raises(DataError, match=r"catalogue scores of shape \(4, 30\), expected \(4, 31\)"):
        run(Short(), make_batches(), catalogue)
    with pytest.raises(SFUBMError, match="NaN"):
        run(Diverged(), make_batches(), catalogue)
    model = Diverged()
    model.train()
    with pytest.raises(SFUBMError):
        run(model, make_batches(), catalogue)
    assert model.training, "the mode is restored after an error too"
    with pytest.raises(DataError, match="more than once"):
        run(ByPrice(), make_batches() * 2, catalogue)


def test_a_tie_counts_against_a_method_that_answers_too(catalogue):
    assert not run(Undecided(), make_batches(), catalogue).hit1.any()


def test_an_answer_counts_whatever_the_scores_say_unless_they_leave_it_to_chance(catalogue):
    """Generated answers and scores can differ; ``hit@1`` is of the answer, ``rank`` of the scores."""
    result = run(AgainstItsScores(), make_batches(), catalogue)
    assert result.hit1.all()
    assert (result.rank > 1).all()
