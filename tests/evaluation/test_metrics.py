import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sfubm.errors import SFUBMError
from lightning_sfubm.evaluation.metrics import (
    MRR,
    NDCG,
    TIES,
    HitGivenValid,
    HitRate,
    ValidRatio,
    candidate_ranks,
    catalogue_ranks,
    ranking_metrics,
    user_blocks,
)

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


def reference_rank(scores, target, ties):
    """The rank of one user by counting, in plain NumPy."""
    others = np.delete(scores, target)
    above, tied = (others > scores[target]).sum(), (others == scores[target]).sum()
    return 1 + above + {"conservative": 1, "optimistic": 0, "expected": 0.5}[ties] * tied


@st.composite
def scored(draw):
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(2, 9))
    cells = st.lists(st.integers(-2, 2), min_size=columns, max_size=columns)  # few values: ties are common
    scores = np.array(draw(st.lists(cells, min_size=rows, max_size=rows)), dtype=np.float32)
    target = draw(st.lists(st.integers(1, columns - 1), min_size=rows, max_size=rows))
    seen = draw(st.lists(st.lists(st.integers(0, columns - 1), min_size=6, max_size=6), min_size=rows, max_size=rows))
    return scores, np.array(target), np.array(seen)


@PROPERTY
@given(scored(), st.sampled_from(TIES))
def test_candidate_ranks_equal_counting(data, ties):
    scores, target, _ = data
    ranks = candidate_ranks(torch.from_numpy(scores), torch.from_numpy(target), ties)
    assert ranks.dtype == torch.float32
    assert ranks.tolist() == [reference_rank(s, t, ties) for s, t in zip(scores, target)]


@PROPERTY
@given(scored(), st.sampled_from(TIES), st.booleans())
def test_catalogue_ranks_equal_counting_over_allowed_items(data, ties, masked):
    scores, target, seen = data
    expected = []
    for row, t, s in zip(scores, target, seen):
        excluded = {0} | (set(s.tolist()) - {t} if masked else set())
        kept = [i for i in range(len(row)) if i not in excluded]
        expected.append(reference_rank(row[kept], kept.index(t), ties))
    tensor = torch.from_numpy(scores)
    before = tensor.clone()
    ranks = catalogue_ranks(tensor, torch.from_numpy(target), torch.from_numpy(seen) if masked else None, ties)
    assert ranks.tolist() == expected
    assert torch.equal(tensor, before)


@PROPERTY
@given(scored(), st.sampled_from(TIES), st.integers(1, 6))
def test_metrics_equal_numpy_over_any_batching(data, ties, split):
    scores, target, _ = data
    ranks = np.array([reference_rank(s, t, ties) for s, t in zip(scores, target)])
    collection = ranking_metrics("val/", hits=(1, 3), ndcgs=(2, 5))
    for start in range(0, len(ranks), split):
        part = slice(start, start + split)
        collection.update(candidate_ranks(torch.from_numpy(scores[part]), torch.from_numpy(target[part]), ties))
    expected = {f"val/hit@{k}": (ranks <= k).mean() for k in (1, 3)}
    expected |= {f"val/ndcg@{k}": ((ranks <= k) / np.log2(1 + ranks)).mean() for k in (2, 5)}
    expected["val/mrr"] = (1 / ranks).mean()
    assert {key: value.item() for key, value in collection.compute().items()} == pytest.approx(expected, abs=1e-6)


def test_constant_scores_hit_only_under_the_optimistic_policy():
    scores, target = torch.zeros(4, 20), torch.arange(4)
    assert candidate_ranks(scores, target, "optimistic").tolist() == [1.0] * 4
    assert candidate_ranks(scores, target, "conservative").tolist() == [20.0] * 4
    assert candidate_ranks(scores, target, "expected").tolist() == [10.5] * 4
    assert catalogue_ranks(scores, 1 + target, None, "optimistic").tolist() == [1.0] * 4
    assert catalogue_ranks(scores, 1 + target, None, "conservative").tolist() == [19.0] * 4


def test_seen_items_repeated_padded_or_equal_to_the_target():
    scores = torch.tensor([[99.0, 5.0, 4.0, 3.0, 2.0]])
    target = torch.tensor([4])
    assert catalogue_ranks(scores, target).item() == 4
    assert catalogue_ranks(scores, target, torch.tensor([[0, 0, 1, 1, 1]])).item() == 3
    assert catalogue_ranks(scores, target, torch.tensor([[1, 2, 3, 4, 4]])).item() == 1


@pytest.mark.parametrize("width", [1023, 1024, 1025, 5000, 33_000])
@pytest.mark.parametrize("constant", [False, True])
def test_wide_catalogues_are_counted_as_narrow_ones(width, constant):
    """Eight comparisons are summed at a time: the most that a byte then holds, and rows that are no multiple of anything."""
    generator = torch.Generator().manual_seed(width)
    scores = torch.randint(0, 50, (7, width), generator=generator).float() * (not constant)
    target = torch.randint(1, width, (7,), generator=generator)
    expected = [reference_rank(row[1:], t - 1, "conservative") for row, t in zip(scores.numpy(), target.tolist())]
    assert catalogue_ranks(scores, target).tolist() == expected
    assert catalogue_ranks(scores[:, :].T.contiguous().T, target).tolist() == expected
    assert catalogue_ranks(scores[:0], target[:0]).shape == (0,)  # a process that no user was dealt to


@pytest.mark.parametrize(("users", "items"), [(0, 10), (1, 10), (500, 12_087), (17, 10**6), (100, 2**20)])
def test_blocks_hold_every_user_once_and_few_scores(users, items):
    blocks = list(user_blocks(users, items, torch.device("cpu")))
    assert blocks  # an empty batch has an empty block, so that what is computed of the blocks can be joined
    assert [row for block in blocks for row in range(users)[block]] == list(range(users))
    assert all((block.stop - block.start) * items <= max(2**20, 16 * items) for block in blocks)


def test_a_masked_score_of_minus_infinity_ranks_last():
    scores = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert candidate_ranks(scores, torch.tensor([1])).item() == 3


@pytest.mark.parametrize("row", [0, 2])
def test_nan_scores_are_refused_with_their_row(row):
    scores = torch.zeros(3, 5)
    scores[row, 2] = torch.nan
    with pytest.raises(SFUBMError, match=rf"1 of 15 candidate scores are NaN, first in row {row}"):
        candidate_ranks(scores, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(SFUBMError, match=rf"1 of 12 catalogue scores are NaN, first in row {row}"):
        catalogue_ranks(scores, torch.ones(3, dtype=torch.int64))


def test_nan_in_the_ignored_padding_column_is_harmless():
    scores = torch.tensor([[torch.nan, 2.0, 1.0]])
    for ties in TIES:
        assert catalogue_ranks(scores, torch.tensor([2]), None, ties).item() == 2


def test_wrong_shapes_and_names_are_refused():
    with pytest.raises(SFUBMError, match=r"\(2, 3\).*\(3,\)"):
        candidate_ranks(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(SFUBMError, match="ties must be one of"):
        candidate_ranks(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), "random")
    with pytest.raises(SFUBMError, match="at least 1"):
        HitRate(0)


def test_metrics_whose_first_batch_agrees_stay_apart():
    # torchmetrics merges metrics with equal states after one batch unless compute groups are off
    collection = ranking_metrics("", hits=(1, 5, 10), ndcgs=(5, 10))
    collection.update(torch.tensor([1.0]))
    collection.update(torch.tensor([7.0]))
    values = collection.compute()
    assert values["hit@1"] == values["hit@5"] == 0.5
    assert values["hit@10"] == 1.0


def test_ndcg_and_mrr_conventions():
    ndcg, mrr = NDCG(5), MRR()
    for metric in (ndcg, mrr):
        metric.update(torch.tensor([3.0, 6.0]))
    assert ndcg.compute().item() == pytest.approx(0.25)  # 1 / log2(4), and nothing beyond the cut-off
    assert mrr.compute().item() == pytest.approx((1 / 3 + 1 / 6) / 2)


def test_validity_metrics():
    hit = torch.tensor([True, True, False, False])
    valid = torch.tensor([True, False, True, False])
    given_valid, ratio = HitGivenValid(), ValidRatio()
    for metric in (given_valid, ratio):
        metric.update(hit, valid)
    assert (given_valid.compute().item(), ratio.compute().item()) == (0.5, 0.5)


def test_states_are_sums_so_uneven_shards_are_exact():
    shards = [torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0])]
    parts = [HitRate(1) for _ in shards]
    for metric, ranks in zip(parts, shards):
        metric.update(ranks)
    assert all(metric._reductions[name].__name__ == "dim_zero_sum" for metric in parts for name in metric._reductions)
    merged = sum(m.numerator for m in parts) / sum(m.count for m in parts)
    whole = HitRate(1)
    whole.update(torch.cat(shards))
    assert merged.item() == whole.compute().item() == 0.5  # the mean of shard means would be 2/3


@pytest.mark.filterwarnings("ignore:.*compute.*before.*update")
def test_nothing_counted_is_nan():
    assert torch.isnan(HitRate(1).compute())
    metric = HitGivenValid()
    metric.update(torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool))
    assert torch.isnan(metric.compute())
