"""Aggregation of shared weights on the server (T16), server optimisers and their state."""

import io
import itertools
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sfubm.errors import CheckpointError, ConfigError, MessageError, SFUBMError
from lightning_sfubm.federated.robust import CoordinateMedian, Krum, TrimmedMean
from lightning_sfubm.federated.server_optimizers import FedAdam, FedYogi
from lightning_sfubm.federated.weights import (
    ClientUpdate,
    FedAvg,
    StatelessAggregator,
    TooFewClientsError,
    WeightAggregator,
    like,
    normalised_weights,
    participating,
)


class LastByName(StatelessAggregator):
    """A plug-in as a stranger would write it."""

    def aggregate(self, current: Mapping[str, Tensor], updates: Mapping[str, ClientUpdate]) -> dict[str, Tensor]:
        present = list(participating(current, updates).values())
        return like(current, present[-1].weights if present else current)


MAKERS = {
    "fedavg": FedAvg,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "median": CoordinateMedian,
    "trimmed": TrimmedMean,
    "krum": Krum,
    "multi-krum": lambda: Krum(num_byzantine=1, multi=3),
    "plug-in": LastByName,
}
ROBUST = ["median", "trimmed", "krum", "multi-krum"]
every = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def state(seed: int, spread: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layer.weight": (3, 4), "bias": (4,), "scale": ()}
    return {key: spread * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def double(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() for key, value in values.items()}


def clients(names: str = "abcde", spread: float = 1.0) -> dict[str, ClientUpdate]:
    return {name: ClientUpdate(state(ord(name), spread), weight=1 + i) for i, name in enumerate(names)}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[key] - other[key]).abs().max()) for key in one)


# ---------------------------------------------------------------------- every aggregator


@every
def test_result_is_new_has_the_form_of_current_and_inputs_stay(make) -> None:
    aggregator, current, updates = make(), state(0), clients()
    assert isinstance(aggregator, WeightAggregator)
    aggregator.check_clients(len(updates))
    before = {key: value.clone() for key, value in current.items()}
    sent = {name: {key: value.clone() for key, value in u.weights.items()} for name, u in updates.items()}
    result = aggregator.aggregate(current, updates)
    assert list(result) == list(current)
    assert all(result[k].shape == current[k].shape and result[k].dtype == current[k].dtype for k in current)
    assert not same(result, current)
    for value in result.values():
        value.fill_(7)
    assert same(current, before)
    assert all(same(u.weights, sent[name]) for name, u in updates.items())


@every
@given(order=st.permutations("abcde"), weights=st.lists(st.floats(0.1, 1e6), min_size=5, max_size=5))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_order_of_arrival_does_not_change_a_bit(make, order: list[str], weights: list[float]) -> None:
    # float64, since rounding the float64 sums to float32 would hide nearly every difference.
    updates = {n: ClientUpdate(double(state(ord(n))), w) for n, w in zip("abcde", weights, strict=True)}
    first, second = make(), make()
    current, again = double(state(0)), double(state(0))
    for _ in range(2):
        current = first.aggregate(current, updates)
        again = second.aggregate(again, {n: updates[n] for n in order})
    assert same(current, again)


@every
def test_a_client_of_weight_zero_is_ignored_even_if_it_sends_nan(make) -> None:
    updates = clients()
    nan = {key: torch.full_like(value, float("nan")) for key, value in state(1).items()}
    with_idle = {"0": ClientUpdate(nan, 0), **updates, "z": ClientUpdate(state(9, 1e4), 0)}
    assert same(make().aggregate(state(0), updates), make().aggregate(state(0), with_idle))


@every
def test_a_round_without_an_update_changes_neither_weights_nor_state(make) -> None:
    aggregator = make()
    current = aggregator.aggregate(state(0), clients())
    before = aggregator.state_dict()
    for nobody in ({}, {"a": ClientUpdate(state(1), 0)}):
        result = aggregator.aggregate(current, nobody)
        assert same(result, current)
        assert all(result[key] is not current[key] for key in current)
    assert same(aggregator.state_dict(), before)


def without(update: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: value for name, value in update.items() if name != key}


@every
@pytest.mark.parametrize(
    ("bad", "weight", "named"),
    [
        ({**state(1), "bias": torch.full((4,), float("nan"))}, 1, "'bias' of client 'aa'"),
        ({**state(1), "bias": torch.full((4,), float("inf"))}, 1, "'bias' of client 'aa'"),
        ({**state(1), "bias": torch.ones(4, dtype=torch.long)}, 1, "'bias' of client 'aa'"),
        ({**state(1), "bias": torch.ones(1, 4)}, 1, r"client 'aa' differ.*\['bias'\]"),
        (without(state(1), "bias"), 1, r"client 'aa' differ.*\['bias'\]"),
        ({**state(1), "ids.weight": torch.ones(2)}, 1, r"client 'aa' differ.*\['ids.weight'\]"),
        (state(1), -1, "client 'aa' has the weight -1"),
        (state(1), float("nan"), "client 'aa' has the weight nan"),
        (state(1), float("inf"), "client 'aa' has the weight inf"),
    ],
)
def test_a_bad_update_is_refused_by_name_and_the_state_stays(make, bad, weight: float, named: str) -> None:
    aggregator = make()
    current = aggregator.aggregate(state(0), clients())
    before = aggregator.state_dict()
    with pytest.raises(MessageError, match=named):
        aggregator.aggregate(current, {**clients(), "aa": ClientUpdate(bad, weight)})
    assert same(aggregator.state_dict(), before)


@every
def test_state_goes_through_a_weights_only_file_bit_for_bit(make) -> None:
    aggregator, current = make(), state(0)
    for number in range(2):
        current = aggregator.aggregate(current, clients(spread=1 + number))
    file = io.BytesIO()
    torch.save(aggregator.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert same(resumed.state_dict(), aggregator.state_dict())
    straight = aggregator.aggregate(current, clients(spread=0.1))
    assert same(resumed.aggregate(current, clients(spread=0.1)), straight)
    assert same(resumed.state_dict(), aggregator.state_dict())


@every
def test_a_foreign_state_is_refused(make) -> None:
    other = FedYogi() if make is FedAdam else FedAdam()
    other.aggregate(state(0), clients())
    with pytest.raises(CheckpointError, match="resume with the same config"):
        make().load_state_dict(other.state_dict())


# ---------------------------------------------------------------------- FedAvg


@given(st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=8))
@settings(derandomize=True, deadline=None)
def test_fedavg_weights_sum_to_one_and_identical_clients_are_kept(weights: list[float]) -> None:
    updates = {f"c{i}": ClientUpdate(state(3), w) for i, w in enumerate(weights)}
    shares = normalised_weights(participating(state(0), updates))
    assert sum(shares.values()) == pytest.approx(1, abs=1e-14)
    assert same(FedAvg().aggregate(state(0), updates), state(3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [1, 17, 0.3])
def test_fedavg_of_one_client_is_the_identity(dtype: torch.dtype, weight: float) -> None:
    sent = {key: value.to(dtype) for key, value in state(5).items()}
    current = {key: value.to(dtype) for key, value in state(0).items()}
    assert same(FedAvg().aggregate(current, {"a": ClientUpdate(sent, weight)}), sent)


def test_fedavg_is_the_weighted_mean() -> None:
    updates = {"a": ClientUpdate({"w": torch.tensor([1.0])}, 3), "b": ClientUpdate({"w": torch.tensor([5.0])}, 1)}
    assert FedAvg().aggregate({"w": torch.tensor([99.0])}, updates)["w"].tolist() == [2.0]


# ---------------------------------------------------------------------- server optimisers


def reddi(kind: str, x: np.ndarray, rounds: list[list[tuple[np.ndarray, float]]], lr, beta1, beta2, tau) -> np.ndarray:
    """Algorithm 2 of arXiv 2003.00295 in numpy; a round is a list of (client's weights, number of examples)."""
    m, v = np.zeros_like(x), np.full_like(x, tau**2)
    for sent in rounds:
        total = sum(n for _, n in sent)
        delta = sum(n / total * (y - x) for y, n in sent)
        m = beta1 * m + (1 - beta1) * delta
        adam = beta2 * v + (1 - beta2) * delta**2
        yogi = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        v = adam if kind == "adam" else yogi
        x = x + lr * m / (np.sqrt(v) + tau)
    return x


@pytest.mark.parametrize(("kind", "cls"), [("adam", FedAdam), ("yogi", FedYogi)])
@pytest.mark.parametrize(
    "setting",
    [
        {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3},
        {"lr": 0.5, "beta1": 0.0, "beta2": 0.5, "tau": 0.1},
    ],
)
def test_server_optimizers_follow_the_paper(kind: str, cls, setting: dict) -> None:
    rng = np.random.default_rng(0)
    # Changes shrink over the rounds, so that v - Delta^2 takes both signs and Adam and Yogi part.
    rounds = [[(size * rng.normal(size=6), n) for n in (1.0, 3.0)] for size in (1.0, 0.3, 0.01, 0.001)]
    aggregator, start = cls(**setting), rng.normal(size=6)
    x = {"w": torch.from_numpy(start.copy())}
    for sent in rounds:
        x = aggregator.aggregate(
            x, {name: ClientUpdate({"w": torch.from_numpy(y)}, n) for name, (y, n) in zip("ab", sent, strict=True)}
        )
    np.testing.assert_allclose(x["w"].numpy(), reddi(kind, start, rounds, **setting), rtol=1e-12)
    other = reddi("yogi" if kind == "adam" else "adam", start, rounds, **setting)
    assert np.abs(x["w"].numpy() - other).max() > 1e-6


def test_moments_of_another_model_are_refused() -> None:
    aggregator = FedAdam()
    aggregator.aggregate({"w": torch.zeros(2)}, {"a": ClientUpdate({"w": torch.ones(2)})})
    with pytest.raises(CheckpointError, match="other parameters"):
        aggregator.aggregate({"w": torch.zeros(3)}, {"a": ClientUpdate({"w": torch.ones(3)})})


def test_a_torn_state_is_refused() -> None:
    aggregator = FedAdam()
    aggregator.aggregate(state(0), clients())
    torn = {name: value for name, value in aggregator.state_dict().items() if name != "FedAdam/v/bias"}
    with pytest.raises(CheckpointError, match="torn"):
        FedAdam().load_state_dict(torn)


@pytest.mark.parametrize("cls", [FedAdam, FedYogi])
@pytest.mark.parametrize(
    "bad", [{"lr": 0}, {"lr": float("nan")}, {"tau": 0}, {"beta1": 1.0}, {"beta2": -0.1}, {"beta2": float("nan")}]
)
def test_server_optimizers_refuse_settings_out_of_range(cls, bad: dict) -> None:
    with pytest.raises(ConfigError, match=cls.__name__):
        cls(**bad)


# ---------------------------------------------------------------------- robust aggregators


@pytest.mark.parametrize("name", ROBUST)
@given(
    poisoned=st.sampled_from("abcde"), value=st.sampled_from([-1e4, -3.0, 3.0, 1e4]), weight=st.sampled_from([1, 1e9])
)
@settings(derandomize=True, deadline=None, max_examples=20)
def test_one_poisoned_client_of_five_moves_fedavg_but_not_the_robust(name, poisoned, value, weight) -> None:
    honest = {n: {key: 1 + 0.01 * x for key, x in state(ord(n)).items()} for n in "abcde"}
    poison = {key: torch.full_like(x, value) for key, x in state(0).items()}
    updates = {n: ClientUpdate(w) for n, w in honest.items()} | {poisoned: ClientUpdate(poison, weight)}
    result = MAKERS[name]().aggregate(state(0), updates)
    sane = [w for n, w in honest.items() if n != poisoned]
    for key, x in result.items():
        stacked = torch.stack([w[key] for w in sane])
        assert (x >= stacked.amin(0) - 1e-6).all()
        assert (x <= stacked.amax(0) + 1e-6).all()
    assert distance(FedAvg().aggregate(state(0), updates), result) > 0.3


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_median_is_numpys(n: int) -> None:
    updates = clients("abcdef"[:n])
    result = CoordinateMedian().aggregate(state(0), updates)
    for key in result:
        expected = np.median(np.stack([u.weights[key].double().numpy() for u in updates.values()]), axis=0)
        np.testing.assert_allclose(result[key].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("n", "share", "cut"), [(3, 0.1, 1), (5, 0.2, 1), (9, 0.2, 1), (10, 0.2, 2), (7, 0.45, 3)])
def test_trimmed_mean_cuts_its_share_and_at_least_one(n: int, share: float, cut: int) -> None:
    updates = clients("abcdefghij"[:n])
    result = TrimmedMean(share).aggregate(state(0), updates)
    for key in result:
        ordered = np.sort(np.stack([u.weights[key].double().numpy() for u in updates.values()]), axis=0)
        np.testing.assert_allclose(result[key].numpy(), ordered[cut : n - cut].mean(0), rtol=1e-6)


def test_trimmed_mean_counts_whole_clients_and_always_leaves_one() -> None:
    assert TrimmedMean(0.29).num_cut(100) == 29
    assert TrimmedMean(0.5 - 1e-13).num_cut(100) == 49


def krum(vectors: np.ndarray, f: int, multi: int) -> np.ndarray:
    """Krum of vectors (n, P) by trying every set of n - f - 2 neighbours."""
    n, scores = len(vectors), []
    for i in range(n):
        squares = [((vectors[i] - vectors[j]) ** 2).sum() for j in range(n) if j != i]
        scores.append(min(sum(subset) for subset in itertools.combinations(squares, n - f - 2)))
    return vectors[np.argsort(scores, kind="stable")[:multi]].mean(0)


@pytest.mark.parametrize(("n", "f", "multi"), [(3, 0, 1), (5, 1, 1), (6, 1, 1), (7, 2, 1), (7, 2, 5), (6, 0, 6)])
@pytest.mark.parametrize("seed", range(5))
def test_krum_is_its_definition(n: int, f: int, multi: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(n, 7))
    updates = {
        f"c{i}": ClientUpdate({"w": torch.from_numpy(x[:6].reshape(2, 3)), "b": torch.tensor(x[6])})
        for i, x in enumerate(vectors)
    }
    current = {"w": torch.zeros(2, 3, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    result = Krum(f, multi).aggregate(current, updates)
    expected = krum(vectors, f, multi)
    np.testing.assert_allclose(torch.cat([result["w"].flatten(), result["b"].reshape(1)]).numpy(), expected, rtol=1e-12)
    if multi == 1:
        assert any(same(result, u.weights) for u in updates.values())


def test_krum_sees_small_differences_between_large_weights() -> None:
    # 1e4 apart from zero and 1e-3 from each other: |a|^2 + |b|^2 - 2ab in float32 would see nothing of it.
    offsets = {"a": 0.05, "b": 0.001, "c": 0.0, "d": 0.001, "e": 0.9}
    updates = {
        n: ClientUpdate({"w": torch.full((100,), 1e4, dtype=torch.float64) + x * torch.linspace(-1, 1, 100)})
        for n, x in offsets.items()
    }
    result = Krum(1).aggregate({"w": torch.zeros(100, dtype=torch.float64)}, updates)
    assert torch.equal(result["w"], updates["b"].weights["w"])  # b and d tie; the first by name wins


@pytest.mark.parametrize(
    ("aggregator", "needed"),
    [
        (CoordinateMedian(), 3),
        (TrimmedMean(0.1), 3),
        (Krum(0), 3),
        (Krum(1), 5),
        (Krum(2), 7),
        (Krum(1, multi=4), 5),
        (Krum(1, multi=5), 6),
    ],
)
def test_too_few_clients_are_refused_at_set_up_and_in_the_round(aggregator, needed: int) -> None:
    aggregator.check_clients(needed)
    assert not same(aggregator.aggregate(state(0), clients("abcdefg"[:needed])), state(0))
    few = rf"{type(aggregator).__name__}.*at least {needed} clients"
    with pytest.raises(ConfigError, match=rf"{few}, this federation has {needed - 1}: add clients"):
        aggregator.check_clients(needed - 1)
    # Two drop out, one by weight 0: what is left is not enough.
    left = {**clients("abcdefg"[: needed - 1]), "z": ClientUpdate(state(1), 0)}
    with pytest.raises(TooFewClientsError, match=rf"{few}, only {needed - 1} took part .*a, b"):
        aggregator.aggregate(state(0), left)
    assert issubclass(TooFewClientsError, SFUBMError)
    assert not issubclass(TooFewClientsError, (ConfigError, MessageError))


def test_errors_of_krum_name_the_numbers_and_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"num_byzantine=2, multi=1\).*at least 7.*has 5.*lower num_byzantine"):
        Krum(2).check_clients(5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TrimmedMean(0.0),
        lambda: TrimmedMean(0.5),
        lambda: TrimmedMean(-0.1),
        lambda: TrimmedMean(float("nan")),
        lambda: Krum(-1),
        lambda: Krum(1, multi=0),
    ],
)
def test_robust_aggregators_refuse_settings_out_of_range(make) -> None:
    with pytest.raises(ConfigError, match=r"TrimmedMean: share = |Krum: num_byzantine = "):
        make()
