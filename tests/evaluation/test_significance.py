import itertools
from math import comb, erfc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.significance import (
    bootstrap_ci,
    bootstrap_means,
    holm,
    mcnemar_exact,
    paired_difference,
    sign_flip_exact,
    wilson_interval,
)

from .conftest import make_result

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


def test_bootstrap_means_have_the_standard_error_of_the_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, (500, 1))
    means = bootstrap_means(values, resamples=4000)
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)
    assert means.std() == pytest.approx(values.std() / np.sqrt(500), rel=0.05)


def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    hits = [
        estimate.low <= 0.5 <= estimate.high
        for run in range(20)
        for estimate in bootstrap_ci(rng.random((200, 20)), resamples=400, seed=run)
    ]
    assert 0.90 <= np.mean(hits) <= 0.99  # 400 intervals: standard error .011


def test_bootstrap_is_seeded_and_independent_of_chunking(monkeypatch):
    values = np.random.default_rng(2).random((50, 3))
    whole = bootstrap_means(values, resamples=100, seed=5)
    assert np.array_equal(whole, bootstrap_means(values, resamples=100, seed=5))
    assert not np.array_equal(whole, bootstrap_means(values, resamples=100, seed=6))
    monkeypatch.setattr("lightning_sfubm.evaluation.significance._CHUNK", 120)
    assert np.allclose(whole, bootstrap_means(values, resamples=100, seed=5))


def test_undefined_users_count_in_no_mean():
    values = np.array([[1.0, np.nan], [3.0, 5.0], [2.0, np.nan], [2.0, 7.0]])
    first, second = bootstrap_ci(values)
    assert (first.value, first.n) == (2.0, 4)
    assert (second.value, second.n) == (6.0, 2)
    assert 5.0 <= second.low <= second.high <= 7.0


def test_no_users_and_one_user():
    empty = bootstrap_ci(np.empty((0, 1)))[0]
    assert empty.n == 0
    assert np.isnan(empty[:3]).all()
    assert bootstrap_ci(np.array([[0.25]]))[0] == (0.25, 0.25, 0.25, 1)
    assert wilson_interval(0, 0).n == 0


@PROPERTY
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_equation_and_never_collapses(case):
    successes, n = case
    share, low, high, _ = wilson_interval(successes, n)
    assert 0 <= low <= share <= high <= 1
    assert high - low > 0.001
    for bound in (low, high):
        if 0 < bound < 1:  # the bounds are where the score test just fails to reject
            assert abs(share - bound) == pytest.approx(1.959964 * np.sqrt(bound * (1 - bound) / n), abs=1e-9)


@PROPERTY
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_equals_the_binomial_sum(a_wins, b_wins):
    n = a_wins + b_wins
    expected = min(1.0, 2 * sum(comb(n, i) for i in range(min(a_wins, b_wins) + 1)) / 2**n)
    assert mcnemar_exact(a_wins, b_wins) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(b_wins, a_wins) == mcnemar_exact(a_wins, b_wins)


def test_mcnemar_of_many_users_neither_overflows_nor_rounds_to_zero():
    assert 0 < mcnemar_exact(9_000, 10_000) < 1e-12
    assert mcnemar_exact(50_000, 50_000) == 1.0


@PROPERTY
@given(st.lists(st.integers(-3, 3), max_size=10))
def test_sign_flips_equal_the_count_over_all_signs(differences):
    sums = [
        sum(s * d for s, d in zip(signs, differences)) for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    expected = np.mean([abs(total) >= abs(sum(differences)) for total in sums])
    assert sign_flip_exact(differences) == pytest.approx(expected, rel=1e-9)


@PROPERTY
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
def test_sign_flips_of_one_run_are_mcnemars_test(a_wins, b_wins, level):
    differences = [1] * a_wins + [-1] * b_wins + [0] * level
    assert sign_flip_exact(differences) == pytest.approx(mcnemar_exact(a_wins, b_wins), rel=1e-9)


def test_sign_flips_of_many_users_keep_their_digits():
    rng = np.random.default_rng(0)
    differences = rng.choice([-3, -2, -1, 0, 1, 2, 3], size=20_000, p=[0.03, 0.05, 0.1, 0.6, 0.12, 0.06, 0.04])
    z = differences.sum() / np.sqrt((differences**2).sum())
    assert z > 8
    assert sign_flip_exact(differences) == pytest.approx(erfc(z / np.sqrt(2)), rel=0.05)


def test_holm_on_a_worked_example_and_with_gaps():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([0.01, float("nan"), 0.5])
    assert adjusted[0] == pytest.approx(0.02)
    assert np.isnan(adjusted[1])
    assert holm([]) == []


@PROPERTY
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_monotone_and_lies_between_raw_and_bonferroni(raw):
    adjusted = holm(raw)
    for p, q in zip(raw, adjusted):
        assert p <= q <= min(1.0, p * len(raw)) + 1e-12
    for (p, q), (r, s) in itertools.combinations(zip(raw, adjusted), 2):
        assert (p - r) * (q - s) >= 0


def test_a_paired_difference_is_taken_user_by_user():
    a, b = make_result("a", strength=2.0), make_result("b", strength=1.0)
    result = paired_difference(a, b)
    assert result.difference == pytest.approx(a.hit1.mean() - b.hit1.mean())
    assert result.low < result.difference < result.high
    assert result.a_wins == (a.hit1 & ~b.hit1).sum()
    assert result.p_mcnemar == mcnemar_exact(result.a_wins, result.b_wins) < 0.01
    assert np.isnan(paired_difference(a, b, "ndcg@10").p_mcnemar)
    same = paired_difference(a, a)
    assert (same.difference, same.low, same.high, same.p_mcnemar) == (0, 0, 0, 1)


def test_pairing_follows_the_users_not_the_rows():
    a, b = make_result("a", strength=2.0), make_result("b", strength=1.0)
    shuffled = np.random.default_rng(0).permutation(len(b))
    for name in ("user", "target", "hit1", "rank", "valid", "full_rank", "history_length", "target_train_count"):
        setattr(b, name, getattr(b, name)[shuffled])
    assert paired_difference(a, b) == paired_difference(a, make_result("b", strength=1.0))


def test_users_that_only_one_method_has_are_left_out_and_counted():
    a, b = make_result("a"), make_result("b")
    result = paired_difference(a.select(a.user >= 30), b.select(b.user < 300))
    assert (result.users, result.only_in_a, result.only_in_b) == (270, 100, 30)
    nobody = paired_difference(a.select(a.user < 10), b.select(b.user >= 10))
    assert nobody.users == 0
    assert np.isnan(nobody.difference)


def test_results_on_other_lists_domains_or_targets_are_refused():
    a = make_result("a")
    for other in ({"candidate_hash": "deadbeef"}, {"split": "validation"}, {"ties": "optimistic"}):
        with pytest.raises(DataError, match=f"cannot be compared: {next(iter(other))}"):
            paired_difference(a, make_result("b", **other))
    with pytest.raises(DataError, match="domain is 'films' in one and 'books' in the other"):
        paired_difference(a, make_result("b", "books"))
    b = make_result("b")
    b.target[3] += 1
    with pytest.raises(DataError, match="disagree about the target"):
        paired_difference(a, b)


def test_a_metric_that_one_method_lacks_compares_nobody():
    result = paired_difference(make_result("a"), make_result("b", full=False), "full_ndcg@10")
    assert (result.users, result.only_in_a) == (0, 400)
