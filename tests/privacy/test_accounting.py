"""The accountant: figures against Opacus, dp-accounting and the definition; state; budget (T4)."""

import io
import math
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.utils import get_noise_multiplier

from lightning_sfubm.errors import ConfigError, PrivacyError
from lightning_sfubm.privacy import accounting
from lightning_sfubm.privacy.accounting import PrivacyAccountant, noise_multiplier_for
from lightning_sfubm.privacy.gaussian import gaussian_delta

#: noise multiplier, sample rate, steps, delta, and the epsilon dp-accounting 0.6.0 gives for add-or-remove-one, computed in an
#: environment of its own: RdpAccountant(orders=range(2, 64)), and PLDAccountant() at its defaults.
DP_ACCOUNTING = [
    (1.0, 0.01, 1000, 1e-5, 2.1077530755, 1.8282),
    (5.0, 1.0, 50, 1e-5, 7.0878616288, 6.5730),
    (1.5, 0.04, 2250, 1e-5, 7.3298767738, 6.7688),
    (0.8, 0.001, 10000, 1e-6, 1.7201228859, 0.9473),
    (0.8, 0.05, 200, 1e-6, 9.9052572483, 8.8657),
    (2.0, 0.2, 500, 1e-5, 13.6923240510, 12.6212),
    (4.0, 0.5, 100, 1e-5, 6.3912926563, 5.8687),
    (3.0, 1.0, 10, 1e-6, 5.5557619943, 5.1890),
    (10.0, 0.3, 2000, 1e-7, 7.9533876541, 7.5117),
]
GRID = [row[:4] for row in DP_ACCOUNTING]
#: epsilons of dp-accounting 0.6.0 (RdpAccountant(orders=range(2, 64)), add-or-remove-one) by noise multiplier and sample rate:
#: after 1, 100 and 2,000 steps, each at delta 1e-5 and 1e-7
PRODUCT = {
    (0.8, 0.005): [1.4434213260, 2.1028146883, 1.7472971952, 2.5148255595, 2.6050553970, 3.5260894342],
    (0.8, 0.1): [3.3095264778, 4.4608190243, 13.8280102095, 16.6101304807, 84.1542132164, 88.7593834024],
    (0.8, 1.0): [6.1589783368, 7.3102708833, 166.3766311039, 170.9818012898, 3135.1266311038, 3139.7318012898],
    (1.5, 0.005): [0.3205849792, 0.5208097699, 0.3541685117, 0.5634944292, 0.6851122722, 0.9022253799],
    (1.5, 0.1): [0.9494090552, 1.4099260738, 3.9510429270, 4.9031659359, 21.2878995632, 24.8493987841],
    (1.5, 1.0): [2.9918869456, 3.6223258485, 54.5710755483, 59.1762457343, 899.0155199927, 903.6206901787],
    (4.0, 0.005): [0.1029190841, 0.1771960225, 0.1080505356, 0.1823274740, 0.2065329383, 0.2808098768],
    (4.0, 0.1): [0.1394758845, 0.2137528230, 1.0817024009, 1.3610963723, 5.5347032073, 6.6453796692],
    (4.0, 1.0): [1.0125506278, 1.2611384965, 14.1766914800, 16.4792765730, 135.1266311039, 139.7318012898],
}
# Opacus' own code warns of log(0) at q = 1 and of an optimum at the last order.
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Optimal order"),
]


def accountant_of(mechanism: str, *entries: tuple[float, float, int], **settings) -> PrivacyAccountant:
    accountant = PrivacyAccountant(mechanism, **settings)
    for entry in entries:
        accountant.step(*entry)
    return accountant


@pytest.mark.parametrize(("entry", "rdp", "prv"), [((1.0, 0.01, 1000), 2.101, 1.838), ((5.0, 1.0, 50), 7.077, 6.583)])
def test_known_figures(entry: tuple[float, float, int], rdp: float, prv: float) -> None:
    assert accountant_of("rdp", entry).epsilon(1e-5) == pytest.approx(rdp, abs=5e-4)
    assert accountant_of("prv", entry).epsilon(1e-5) == pytest.approx(prv, abs=5e-4)


@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "rdp", "pld"), DP_ACCOUNTING)
def test_agrees_with_dp_accounting(noise: float, rate: float, steps: int, delta: float, rdp: float, pld: float) -> None:
    """RDP at the same (whole) orders to 1e-6; PRV is dp-accounting's PLD plus at most PRV's own margin of .01.

    At fractional orders dp-accounting sums the absolute values of an alternating series, an upper bound of what Opacus and the
    quadrature below compute.
    """
    accountant = accountant_of("rdp", (noise, rate, steps), orders=range(2, 64))
    assert accountant.epsilon(delta) == pytest.approx(rdp, abs=1e-6)
    assert 0 <= accountant_of("prv", (noise, rate, steps)).epsilon(delta) - pld < 0.011


@pytest.mark.parametrize(("noise", "rate"), PRODUCT)
def test_agrees_with_both_on_a_whole_grid(noise: float, rate: float) -> None:
    """Every combination of 3 noise multipliers, 3 rates, 3 numbers of steps and 2 deltas, to 1e-6."""
    grid = [(steps, delta) for steps in (1, 100, 2000) for delta in (1e-5, 1e-7)]
    for (steps, delta), expected in zip(grid, PRODUCT[noise, rate], strict=True):
        theirs = RDPAccountant()
        theirs.history = [(noise, rate, steps)]
        whole = accountant_of("rdp", (noise, rate, steps), orders=range(2, 64))
        assert whole.epsilon(delta) == pytest.approx(expected, abs=1e-6)
        usual = accountant_of("rdp", (noise, rate, steps))
        assert usual.epsilon(delta) == pytest.approx(theirs.get_epsilon(delta), abs=1e-6)
        stepped = accountant_of("rdp", *[(noise, rate, 1)] * min(steps, 100), (noise, rate, max(0, steps - 100)))
        assert stepped.epsilon(delta) == usual.epsilon(delta)  # one step counts as one, none is lost at the seams


def test_a_history_of_two_kinds_of_steps_agrees_with_dp_accounting() -> None:
    history = ((1.0, 0.01, 300), (2.0, 0.05, 400))
    assert accountant_of("rdp", *history, orders=range(2, 64)).epsilon(1e-5) == pytest.approx(2.7285584365, abs=1e-6)
    assert 0 <= accountant_of("prv", *history).epsilon(1e-5) - 2.4724 < 0.011


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.1), (1.5, 0.04), (2.0, 0.2), (5.0, 1.0)])
def test_renyi_divergence_is_that_of_its_definition(noise: float, rate: float) -> None:
    """Order a: log E[((1 - q) + q p1/p0)^a] / (a - 1) over N(0, sigma^2), by the trapezoidal rule."""
    x = np.linspace(-40 * noise, 60 * noise, 400_001)
    log_density = -(x**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    log_keep = math.log1p(-rate) if rate < 1 else -math.inf
    log_ratio = np.logaddexp(log_keep, math.log(rate) + (2 * x - 1) / (2 * noise**2))
    orders = (1.5, 2.0, 2.7, 4.0, 6.5, 8.0)
    moments = [float(np.trapezoid(np.exp(log_density + a * log_ratio), x)) for a in orders]
    expected = [7 * math.log(moment) / (a - 1) for a, moment in zip(orders, moments, strict=True)]
    assert accountant_of("rdp", (noise, rate, 7)).rdp(orders) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("mechanism", "theirs"), [("rdp", RDPAccountant), ("prv", PRVAccountant)])
@pytest.mark.parametrize(("noise", "rate", "steps", "delta"), GRID)
def test_agrees_with_opacus(mechanism: str, theirs: type, noise: float, rate: float, steps: int, delta: float) -> None:
    other = theirs()
    other.history = [(noise, rate, steps)]
    assert accountant_of(mechanism, (noise, rate, steps)).epsilon(delta) == pytest.approx(
        other.get_epsilon(delta), abs=1e-6
    )


def test_steps_are_counted_as_opacus_counts_them() -> None:
    ours, theirs = PrivacyAccountant("rdp"), RDPAccountant()
    for noise, rate in [(1.0, 0.1), (1.0, 0.1), (2.0, 0.1), (1.0, 0.1), (1.0, 0.2)]:
        ours.step(noise, rate)
        theirs.step(noise_multiplier=noise, sample_rate=rate)
    assert ours.history == theirs.history
    assert ours.steps == 5


@pytest.mark.parametrize("mechanism", ["rdp", "prv"])
def test_a_resumed_accountant_goes_on_as_one_that_never_stopped(mechanism: str) -> None:
    straight = accountant_of(mechanism, *[(1.1, 0.05, 1)] * 60, (2.0, 0.05, 10))
    first = accountant_of(mechanism, *[(1.1, 0.05, 1)] * 37)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = PrivacyAccountant(mechanism)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for entry in [*[(1.1, 0.05, 1)] * 23, (2.0, 0.05, 10)]:
        resumed.step(*entry)
    assert resumed.state_dict() == straight.state_dict()
    assert resumed.epsilon(1e-5) == straight.epsilon(1e-5)


@pytest.mark.parametrize(("ours", "other"), [("rdp", "prv"), ("prv", "rdp"), ("rdp", "gdp")])
def test_a_foreign_state_is_refused(ours: str, other: str) -> None:
    accountant = accountant_of(ours, (1.0, 0.1, 3))
    with pytest.raises(PrivacyError, match=f"'{other}'.*'{ours}'"):
        accountant.load_state_dict({"mechanism": other, "history": [[1.0, 0.1, 3]]})
    assert accountant.steps == 3


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"history": [[1.0, 0.1]]},
        {"history": [[1.0, 7.0, 1]]},
        {"history": 3},
        {"history": [[1.0, 0.1, 1], ["much", 0.1, 1]]},
    ],
)
def test_a_broken_state_is_refused(state: dict) -> None:
    accountant = accountant_of("rdp", (2.0, 0.1, 3))
    with pytest.raises(PrivacyError, match="no history"):
        accountant.load_state_dict({"mechanism": "rdp", **state})
    assert accountant.history == [(2.0, 0.1, 3)]


def test_nothing_spends_nothing_and_a_step_without_noise_spends_everything() -> None:
    assert PrivacyAccountant().epsilon(1e-5) == 0
    assert accountant_of("prv", (0.0, 0.1, 1), (5.0, 0.1, 1)).epsilon(1e-5) == math.inf


@given(noise=st.floats(0.7, 8), rate=st.floats(0.001, 1), steps=st.integers(1, 500), more=st.integers(1, 500))
@settings(max_examples=30, deadline=None)
def test_more_steps_or_less_noise_never_cost_less(noise: float, rate: float, steps: int, more: int) -> None:
    spent = accountant_of("rdp", (noise, rate, steps)).epsilon(1e-5)
    assert 0 <= spent <= accountant_of("rdp", (noise, rate, steps), (noise, rate, more)).epsilon(1e-5)
    assert spent <= accountant_of("rdp", (noise * 0.9, rate, steps)).epsilon(1e-5) + 1e-9


@pytest.mark.parametrize("mechanism", ["rdp", "prv"])
def test_the_budget_is_never_passed(mechanism: str) -> None:
    accountant = PrivacyAccountant(mechanism, target_epsilon=3.0, delta=1e-5)

    def train() -> None:
        while accountant.steps < 1000:
            accountant.check(2.0, 0.2, 5)
            accountant.step(2.0, 0.2, 5)

    with pytest.raises(PrivacyError, match="over the budget of 3"):
        train()
    assert accountant.steps >= 10
    assert accountant.epsilon() <= 3.0
    accountant.step(2.0, 0.2, 5)
    assert accountant.epsilon() > 3.0


def test_a_plan_that_fits_makes_its_steps_free_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    accountant = accountant_of("rdp", (3.0, 0.1, 5), target_epsilon=5.0, delta=1e-5)
    accountant.check(2.0, 0.1, 100)
    monkeypatch.setattr(accounting, "_epsilon", partial(pytest.fail, "computed again"))
    for _ in range(100):
        accountant.check(2.0, 0.1)
        accountant.step(2.0, 0.1)
    monkeypatch.setattr(accounting, "_epsilon", lambda *_: math.inf)
    with pytest.raises(PrivacyError):
        accountant.check(2.0, 0.1)
    with pytest.raises(PrivacyError):
        accountant.check(1.0, 0.1)  # another mechanism was never part of the plan


@pytest.mark.parametrize("mechanism", ["rdp", "prv"])
@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(0.5, 0.1, 200), (3.0, 0.02, 500), (8.0, 1.0, 40)])
def test_the_noise_for_a_budget_is_the_least_that_keeps_it(
    mechanism: str, epsilon: float, rate: float, steps: int
) -> None:
    noise = noise_multiplier_for(epsilon, 1e-5, rate, steps, mechanism)
    assert accountant_of(mechanism, (noise, rate, steps)).epsilon(1e-5) <= epsilon
    assert accountant_of(mechanism, (noise * 0.998, rate, steps)).epsilon(1e-5) > epsilon
    # Opacus stops within .01 of epsilon, so it may ask for a little more noise.
    theirs = get_noise_multiplier(
        target_epsilon=epsilon, target_delta=1e-5, sample_rate=rate, steps=steps, accountant=mechanism
    )
    assert noise == pytest.approx(theirs, rel=0.03)


def test_a_delta_too_small_for_the_numbers_of_prv_is_refused() -> None:
    """Against the exact Gaussian at q = 1: a bound down to the least delta, which at a hundredth of it PRV would not be."""
    sigma, steps = 200.0, 20_000
    for delta in (1e-5, 1e-8, 1e-10):
        spent = accountant_of("prv", (sigma, 1.0, steps)).epsilon(delta)
        assert gaussian_delta(spent, sigma, math.sqrt(steps)) <= delta
    for refused in (
        lambda: accountant_of("prv", (sigma, 1.0, steps)).epsilon(9e-11),
        lambda: noise_multiplier_for(3.0, 1e-12, 0.1, 10, "prv"),
    ):
        with pytest.raises(PrivacyError, match=r"no bound at delta .*account with 'rdp'"):
            refused()
    assert gaussian_delta(accountant_of("rdp", (sigma, 1.0, steps)).epsilon(1e-12), sigma, math.sqrt(steps)) <= 1e-12


def test_the_search_for_the_noise_asks_prv_of_no_noise_that_is_much_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 100,000 steps of all users it takes 109 GiB for a noise multiplier of 1."""
    asked: list[float] = []
    real = accounting._epsilon

    def epsilon(mechanism: str, history: Any, *rest: Any) -> float:
        if mechanism == "prv":
            asked.append(history[0][0])
        return real(mechanism, history, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(accounting, "_epsilon", epsilon)
    noise = noise_multiplier_for(3.0, 1e-6, 1.0, 100_000, "prv")
    assert min(asked) > noise / 3
    assert gaussian_delta(3.0, noise, math.sqrt(100_000)) <= 1e-6


def test_an_impossible_budget_is_refused() -> None:
    with pytest.raises(PrivacyError, match="no noise keeps"):
        noise_multiplier_for(1e-3, 1e-5, 1.0, 10, "prv")  # PRV's own margin is .01


@pytest.mark.parametrize("entry", [(-1.0, 0.1, 1), (math.nan, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, 0.1, -1)])
def test_impossible_steps_are_refused(entry: tuple[float, float, int]) -> None:
    with pytest.raises(ConfigError):
        PrivacyAccountant().step(*entry)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="'moments'"):
        PrivacyAccountant("moments")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="target_epsilon"):
        PrivacyAccountant(target_epsilon=1.0)
    with pytest.raises(ConfigError, match="delta"):
        PrivacyAccountant(delta=1.0)
    with pytest.raises(ConfigError, match="delta"):
        accountant_of("rdp", (1.0, 0.1, 1)).epsilon()


def test_a_missing_opacus_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(PrivacyError, match=r"lightning-sfubm\[dp\]"):
        accountant_of("rdp", (1.2345, 0.0987, 3)).epsilon(1e-5)
