"""The analytic Gaussian mechanism: exact for every epsilon, and tied to the clipping norm."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sfubm.errors import ConfigError, PrivacyError
from lightning_sfubm.privacy.gaussian import GaussianMechanism, gaussian_delta, gaussian_sigma
from lightning_sfubm.privacy.noise import NoiseStream

#: epsilon, delta and the least sigma at sensitivity 1, by dp-accounting 0.6.0 (get_sigma_gaussian).
LITERALS = [
    (0.01, 0.1, 3.8094438061),
    (0.1, 1e-5, 30.7495661320),
    (0.5, 1e-6, 8.0576184807),
    (1.0, 1e-5, 3.7306316348),
    (1.0, 1e-6, 4.2246788893),
    (5.0, 1e-5, 0.8918682650),
    (10.0, 1e-5, 0.4998886197),
    (20.0, 1e-8, 0.3437766670),
    (50.0, 1e-5, 0.1497606076),
]


def precise_delta(epsilon: float, sigma: float, sensitivity: float) -> mpmath.mpf:
    """Balle and Wang's formula with 400 digits."""
    with mpmath.workdps(400):
        e, s, d = (mpmath.mpf(x) for x in (epsilon, sigma, sensitivity))
        return mpmath.ncdf(d / (2 * s) - e * s / d) - mpmath.exp(e) * mpmath.ncdf(-d / (2 * s) - e * s / d)


@pytest.mark.parametrize(("epsilon", "delta", "sigma"), LITERALS)
def test_agrees_with_dp_accounting(epsilon: float, delta: float, sigma: float) -> None:
    assert gaussian_sigma(epsilon, delta) == pytest.approx(sigma, rel=1e-9)
    assert gaussian_sigma(epsilon, delta, 3.0) == pytest.approx(3 * sigma, rel=1e-9)


@given(epsilon=st.floats(0, 700), log_delta=st.floats(-12, -0.05), sensitivity=st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_sigma_spends_exactly_its_delta(epsilon: float, log_delta: float, sensitivity: float) -> None:
    delta = 10**log_delta
    sigma = gaussian_sigma(epsilon, delta, sensitivity)
    spent = float(precise_delta(epsilon, sigma, sensitivity))
    assert spent == pytest.approx(delta, rel=1e-8)
    assert gaussian_delta(epsilon, sigma, sensitivity) == pytest.approx(spent, rel=1e-8)


def test_both_regimes_are_met() -> None:
    """The formula's first argument is negative where delta is small for its epsilon, and positive where it is large."""
    signs = []
    for epsilon, delta in ((1.0, 1e-5), (1.0, 0.4)):
        sigma = gaussian_sigma(epsilon, delta)
        signs.append(1 / (2 * sigma) > epsilon * sigma)
        assert float(precise_delta(epsilon, sigma, 1.0)) == pytest.approx(delta, rel=1e-10)
    assert signs == [False, True]


def test_the_textbook_sigma_breaks_its_promise_at_large_epsilon_and_wastes_at_small() -> None:
    def textbook(epsilon: float, delta: float) -> float:
        return math.sqrt(2 * math.log(1.25 / delta)) / epsilon

    assert gaussian_delta(10.0, textbook(10.0, 1e-5)) > 2e-5
    assert gaussian_delta(50.0, textbook(50.0, 1e-5)) > 0.5
    assert gaussian_sigma(10.0, 1e-5) > textbook(10.0, 1e-5)
    assert gaussian_sigma(0.5, 1e-5) < 0.8 * textbook(0.5, 1e-5)


def message(scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"a": scale * torch.randn(40, 50, generator=generator), "b": scale * torch.randn(7, generator=generator)}


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


@pytest.mark.parametrize(("neighbours", "factor"), [("add_remove", 1.0), ("replacement", 2.0)])
def test_sensitivity_follows_from_the_clipping_norm(neighbours: str, factor: float) -> None:
    mechanism = GaussianMechanism(4.0, 1e-5, clip_norm=0.7, neighbours=neighbours)
    assert mechanism.sensitivity == pytest.approx(0.7 * factor)
    assert mechanism.sigma == pytest.approx(gaussian_sigma(4.0, 1e-5) * 0.7 * factor)
    assert mechanism.describe()["neighbours"] == neighbours


def test_several_releases_share_the_budget() -> None:
    """k releases are a Gaussian with sqrt(k) times the sensitivity: mu of Gaussian DP adds up in squares."""
    mechanism = GaussianMechanism(2.0, 1e-5, clip_norm=1.0, releases=9)
    assert mechanism.sigma == pytest.approx(3 * GaussianMechanism(2.0, 1e-5, clip_norm=1.0).sigma)
    noise = NoiseStream(b"0")
    for _ in range(9):
        mechanism(message(), noise)
    with pytest.raises(PrivacyError, match="9 releases"):
        mechanism(message(), noise)


def test_the_whole_message_is_clipped_and_then_perturbed() -> None:
    mechanism = GaussianMechanism(1e6, 1e-5, clip_norm=0.5)  # next to no noise
    sent = mechanism(message(), NoiseStream(b"0"))
    assert norm(sent) == pytest.approx(0.5, rel=0.02)
    scale = 0.5 / norm(message())
    torch.testing.assert_close(sent["a"], message()["a"] * scale, atol=5e-3, rtol=0)

    short = {name: tensor * scale / 2 for name, tensor in message().items()}
    sent = GaussianMechanism(1e6, 1e-5, clip_norm=0.5)(short, NoiseStream(b"0"))
    assert norm(sent) == pytest.approx(0.25, rel=0.05)  # under the bound nothing is scaled


def test_noise_has_the_stated_size_and_is_the_stream_s() -> None:
    def send(seed: int) -> dict[str, torch.Tensor]:
        return mechanism(zeros, NoiseStream(str(seed).encode()))

    mechanism = GaussianMechanism(1.0, 1e-5, clip_norm=1.0, releases=3)
    zeros = {"a": torch.zeros(200, 100)}
    first, again, other = send(1), send(1), send(2)
    assert torch.equal(first["a"], again["a"])
    assert not torch.isclose(first["a"], other["a"]).any(dim=1).all()
    # n squared standard normals have mean n and standard deviation sqrt(2 n); six of them.
    count = first["a"].numel()
    assert abs(norm(first) ** 2 / mechanism.sigma**2 - count) < 6 * math.sqrt(2 * count)


def test_a_message_that_is_not_finite_is_refused() -> None:
    with pytest.raises(PrivacyError, match="not finite"):
        GaussianMechanism(1.0, 1e-5, clip_norm=1.0)({"a": torch.tensor([math.nan])}, NoiseStream(b"0"))


@pytest.mark.parametrize(
    "settings",
    [
        {"epsilon": 0.0},
        {"delta": 0.0},
        {"delta": 1.0},
        {"clip_norm": 0.0},
        {"clip_norm": math.inf},
        {"releases": 0},
        {"neighbours": "bounded"},
    ],
)
def test_impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError):
        GaussianMechanism(**{"epsilon": 1.0, "delta": 1e-5, "clip_norm": 1.0, **settings})


@pytest.mark.parametrize("arguments", [(-1.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0), (math.nan, 1.0, 1.0)])
def test_the_formula_refuses_what_it_is_not_defined_for(arguments: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError):
        gaussian_delta(*arguments)
