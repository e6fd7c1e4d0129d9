"""Each attack on planted data, where it must succeed, and on data that holds nothing, where it must be at chance."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from lightning_sfubm.errors import DataError
from lightning_sfubm.privacy.attacks import (
    area_limit,
    area_under_roc,
    attribute_inference,
    averaged,
    calibrated_scores,
    complementary_halves,
    first_layer_shift,
    linkage,
    logit_shift,
    membership,
    random_update,
    rate_at,
    rate_limit,
    strongest_call,
)
from lightning_sfubm.privacy.attacks.attribute import most_common


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- measures


def test_area_counts_pairs_and_half_of_the_ties() -> None:
    positives, negatives = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([2.0, 0.0])
    assert area_under_roc(positives, negatives).value == pytest.approx((2 + 1.5 + 1) / 6)


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [
        # Roots of |A - a| = 1.959964 sd(a), sd after Newcombe (2006), found by scipy.optimize.brentq.
        ([3.0, 2.0, 1.0], [2.0, 0.0], (0.75, 0.260127, 0.959978)),
        ([2.0, 3.0], [0.0, 1.0], (1.0, 0.385636, 1.0)),
        ([0.0, 0.0], [0.0, 0.0], (0.5, 0.112243, 0.887757)),
    ],
)
def test_the_interval_of_an_area_has_these_values(
    positives: list[float], negatives: list[float], expected: tuple[float, float, float]
) -> None:
    estimate = area_under_roc(torch.tensor(positives), torch.tensor(negatives))
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx(expected, abs=2e-6)


def test_the_interval_of_an_area_covers_the_truth_as_often_as_it_says() -> None:
    truth, covered = 0.5 * math.erfc(-0.5 / math.sqrt(2) / math.sqrt(2)), 0
    for seed in range(400):
        scores = draw(80, seed=seed)
        estimate = area_under_roc(scores[:40] + 0.5, scores[40:])
        covered += estimate.low <= truth <= estimate.high
    assert 0.92 <= covered / 400 <= 0.98  # .95, sd .011


def test_the_rate_keeps_its_false_positives_and_reads_ties_against_the_attacker() -> None:
    negatives = torch.arange(100.0)
    positives = torch.tensor([98.0, 98.5, 99.0, 100.0])
    assert rate_at(positives, negatives, 0.01).value == 0.75  # one negative may lie above: the threshold is 98
    assert rate_at(positives, negatives, 0.0).value == 0.25
    assert rate_at(torch.full((5,), 99.0), negatives[-5:], 0.01).value == 0


def test_the_interval_of_a_rate_covers_chance_on_data_that_hold_nothing() -> None:
    covered = 0
    for seed in range(100):
        scores = draw(800, seed=seed)
        estimate = rate_at(scores[:400], scores[400:], 0.01, resamples=200)
        covered += estimate.low <= 0.01 <= estimate.high
    assert covered >= 90


@pytest.mark.parametrize("scores", [torch.zeros(0), torch.tensor([float("nan")]), torch.zeros(2, 2)])
def test_scores_that_are_none_are_refused(scores: torch.Tensor) -> None:
    with pytest.raises(DataError, match="positives"):
        area_under_roc(scores, torch.zeros(3))


# ---------------------------------------------------------------------- limits


def test_no_privacy_allows_everything_and_perfect_privacy_nothing() -> None:
    assert area_limit(math.inf, 0) == rate_limit(math.inf, 1e-5, 0.01) == area_limit(1000, 0) == 1
    assert area_limit(0, 0) == pytest.approx(0.5)
    assert rate_limit(0, 0, 0.01) == pytest.approx(0.01)
    assert rate_limit(0, 1, 0.01) == area_limit(0, 1) == 1


def test_the_limits_have_these_values() -> None:
    assert rate_limit(1.0, 1e-5, 0.01) == pytest.approx(0.0271928, abs=1e-6)  # e * .01 + 1e-5
    assert rate_limit(3.0, 0.0, 0.5) == pytest.approx(1 - 0.5 / math.exp(3))
    assert area_limit(1.0, 0.0) == pytest.approx(math.e / (1 + math.e))  # the corner lies at 1 / (1 + e)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 0.0), (1.0, 0.01), (4.0, 1e-5)])
def test_the_area_is_the_integral_of_the_rate(epsilon: float, delta: float) -> None:
    grid = np.linspace(0, 1, 200_001)
    rates = [rate_limit(epsilon, delta, x) for x in grid]
    assert area_limit(epsilon, delta) == pytest.approx(float(np.trapezoid(rates, grid)), abs=1e-5)


# ---------------------------------------------------------------------- item vectors


def test_averaging_defeats_fresh_noise_and_not_a_fixed_draw() -> None:
    clean = normalize(draw(300, 16), dim=1)
    fresh = [normalize(clean + 0.5 * draw(300, 16, seed=seed), dim=1) for seed in range(1, 17)]
    owner = torch.arange(300)
    assert linkage(averaged(fresh), clean, owner) > linkage(fresh[0], clean, owner) + 0.2
    torch.testing.assert_close(averaged([fresh[0]] * 16), fresh[0])


def test_an_attribute_that_the_vectors_tell_is_found() -> None:
    labels = torch.arange(600) % 3
    vectors = normalize(draw(3, 24, seed=5)[labels] + 0.5 * draw(600, 24), dim=1)
    found = attribute_inference(vectors[:300], labels[:300], vectors[300:], labels[300:])
    assert found.accuracy.low > 0.9
    assert found.majority == pytest.approx(1 / 3)
    assert found.classes == 3


def test_an_attribute_that_the_vectors_do_not_tell_is_guessed_by_its_majority() -> None:
    labels = (torch.arange(2000) % 10 >= 7).long()  # 70 % in class 0
    vectors = normalize(draw(2000, 24), dim=1)
    found = attribute_inference(vectors[:1000], labels[:1000], vectors[1000:], labels[1000:])
    assert found.majority == pytest.approx(0.7)
    assert found.accuracy.value <= 0.7 + 1.96 * math.sqrt(0.21 / 1000)
    assert found.accuracy.high >= 0.68


def test_classes_of_the_sent_items_that_nobody_knows_are_misses() -> None:
    vectors = normalize(draw(40, 4), dim=1)
    known = torch.tensor([3, 7] * 10)
    found = attribute_inference(vectors[:20], known, vectors[20:], torch.full((20,), 5))
    assert found.accuracy.value == found.majority == 0
    with pytest.raises(DataError, match="nothing to tell apart"):
        attribute_inference(vectors[:20], torch.zeros(20), vectors[20:], torch.zeros(20))


def test_the_most_common_values_are_the_classes() -> None:
    assert most_common(["b", "a", "", "b", "c", "a", "b"], 2).tolist() == [0, 1, -1, 0, -1, 1, 0]


# ---------------------------------------------------------------------- membership


def test_membership_is_found_where_it_shows_and_not_where_it_does_not() -> None:
    member = torch.arange(1000) < 500
    planted = membership(draw(1000) + 1.0 * member, member)
    assert planted.auc.low > 0.7  # the truth is .76
    assert planted.tpr.low > 0.01
    assert (planted.members, planted.others) == (500, 500)
    nothing = membership(draw(1000, seed=4), member)
    assert nothing.auc.low <= 0.5 <= nothing.auc.high
    assert nothing.tpr.low <= 0.01 <= nothing.tpr.high


def test_calibration_finds_what_hard_sequences_hide() -> None:
    users, member = 600, torch.arange(600) % 2 == 0
    difficulty = 5 * draw(users)
    losses = difficulty - 0.5 * member + 0.1 * draw(users, seed=1)
    halves = complementary_halves(4, users, seed=2)
    shadows = difficulty - 0.5 * halves + 0.1 * torch.stack([draw(users, seed=s) for s in range(3, 7)])
    plain = membership(-losses, member)
    calibrated = membership(calibrated_scores(losses, shadows, halves), member)
    assert plain.auc.low <= 0.55
    assert calibrated.auc.low > 0.98
    assert calibrated.tpr.low > 0.5


def test_calibration_compares_only_with_models_that_never_saw_the_user() -> None:
    losses, shadows = torch.tensor([1.0, 1.0]), torch.tensor([[4.0, 100.0], [100.0, 2.0]])
    inside = torch.tensor([[False, True], [True, False]])
    assert calibrated_scores(losses, shadows, inside).tolist() == [3.0, 1.0]
    with pytest.raises(DataError, match="complementary"):
        calibrated_scores(losses, shadows, torch.ones(2, 2, dtype=torch.bool))


def test_every_user_is_left_out_of_half_of_the_shadow_models() -> None:
    halves = complementary_halves(6, 101, seed=1)
    assert (halves.sum(dim=0) == 3).all()
    assert halves[0].sum() == 50
    assert not torch.equal(halves[0], halves[2])
    for count in (0, 3):
        with pytest.raises(DataError, match="even"):
            complementary_halves(count, 10, seed=1)


# ---------------------------------------------------------------------- items


def test_items_whose_text_moved_the_first_layer_are_found() -> None:
    vectors = normalize(draw(400, 64), dim=1)
    trained = torch.arange(400) < 40
    before = draw(16, 64, seed=1)
    after = before + draw(16, 40, seed=2) @ vectors[trained]  # gradients are outer products with the inputs
    scores = first_layer_shift(before, after, vectors)
    assert area_under_roc(scores[trained], scores[~trained]).low > 0.75
    blind = first_layer_shift(
        before, random_update({"w": before}, {"w": after}, torch.Generator().manual_seed(3))["w"], vectors
    )
    chance = area_under_roc(blind[trained], blind[~trained])
    assert chance.low <= 0.5 <= chance.high


def test_items_that_became_likelier_are_found() -> None:
    items, states = draw(200, 8), draw(50, 8, seed=1)
    trained = torch.arange(200) % 4 == 0
    moved = items + 0.5 * trained[:, None] * states.mean(dim=0)
    scores = logit_shift((states, items), (states, moved))
    assert area_under_roc(scores[trained], scores[~trained]).low > 0.95
    assert torch.equal(logit_shift((states, items), (states, items)), torch.zeros(200))
    torch.testing.assert_close(scores, logit_shift((states, items), (states, moved), block=7), atol=1e-5, rtol=1e-4)
    with pytest.raises(DataError, match="probe"):
        logit_shift((states[:0], items), (states[:0], moved))


def test_items_that_another_item_calls_for_are_found() -> None:
    items = normalize(draw(200, 16), dim=1)
    trained, probes = torch.arange(200) % 4 == 0, torch.arange(200)
    states = 8 * normalize(draw(200, 16, seed=1), dim=1)
    states[1:] += 12 * (items * trained[:, None])[:-1]  # what stands before a trained item leads to it
    scores = strongest_call(states, items, probes)
    assert area_under_roc(scores[trained], scores[~trained]).low > 0.8
    itself = strongest_call(20 * items, items, probes)  # an item that calls for itself says nothing
    chance = area_under_roc(itself[trained], itself[~trained])
    assert chance.low <= 0.5 <= chance.high
    torch.testing.assert_close(scores, strongest_call(states, items, probes, block=7))
    with pytest.raises(DataError, match="two probe"):
        strongest_call(states[:1], items, probes[:1])


def test_a_random_update_has_the_length_of_the_true_one_in_every_tensor() -> None:
    before = {"a": draw(5, 5), "b": draw(3, seed=1)}
    after = {"a": before["a"] + draw(5, 5, seed=2), "b": before["b"]}
    blind = random_update(before, after, torch.Generator().manual_seed(0))
    torch.testing.assert_close((blind["a"] - before["a"]).norm(), (after["a"] - before["a"]).norm())
    assert torch.equal(blind["b"], before["b"])
