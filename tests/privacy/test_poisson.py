"""Poisson sampling of users and the secret that may seed it."""

import math

import numpy as np
import pytest

from lightning_sfubm.errors import ConfigError, PrivacyError
from lightning_sfubm.privacy.poisson import PoissonSampler
from lightning_sfubm.privacy.secret import client_secret


def sampler(users: int = 500, expected: float = 25, step: int = 0, **names: object) -> PoissonSampler:
    return PoissonSampler(users, expected, lambda: step, **names)  # type: ignore[arg-type]


def test_every_user_is_drawn_with_the_same_probability_on_its_own() -> None:
    source, steps = sampler(), 2000
    drawn = np.zeros((steps, 500), dtype=bool)
    for step in range(steps):
        drawn[step, source.draw(step)] = True
    assert source.sample_rate == 0.05
    # Binomial counts: mean n p, variance n p (1 - p); six standard deviations.
    assert np.abs(drawn.sum(0) - steps * 0.05).max() < 6 * math.sqrt(steps * 0.05 * 0.95)
    sizes = drawn.sum(1)
    assert abs(sizes.mean() - 25) < 6 * math.sqrt(500 * 0.05 * 0.95 / steps)
    assert sizes.var() == pytest.approx(500 * 0.05 * 0.95, rel=0.2)  # batches of a fixed size have none
    pairs = (drawn[:, 0::2] & drawn[:, 1::2]).mean()
    assert pairs == pytest.approx(0.05**2, rel=0.1)


def test_a_step_without_users_is_a_step() -> None:
    batches = list(sampler(users=20, expected=0.5))
    assert len(batches) == 40
    assert min(len(batch.rows) for batch in batches) == 0


def test_an_epoch_visits_every_user_once_in_the_mean() -> None:
    assert len(sampler(500, 25)) == 20
    assert len(sampler(500, 500)) == 1
    assert len(sampler(10, 4)) == 2
    assert len(sampler(11, 4)) == 3


def test_draws_are_named_by_step_client_and_seed() -> None:
    def draws(**names: object) -> list[list[int]]:
        return [batch.rows.tolist() for batch in sampler(**names)]  # type: ignore[arg-type]

    assert draws(seed=1, name="alpha") == draws(seed=1, name="alpha")
    assert draws(seed=1, name="alpha")[5:] == draws(seed=1, name="alpha", step=5)[:-5]
    others = [draws(seed=1, name="beta"), draws(seed=2, name="alpha"), draws(seed=1, name="alpha", step=20)]
    for other in others:
        assert not any(mine == theirs for mine, theirs in zip(draws(seed=1, name="alpha"), other, strict=True))


@pytest.mark.parametrize("expected", [0, -1, 501, math.nan])
def test_an_impossible_batch_is_refused(expected: float) -> None:
    with pytest.raises(ConfigError, match="expected batch"):
        sampler(expected=expected)


def test_a_secret_is_made_once_and_read_by_its_owner_only(tmp_path) -> None:
    first = client_secret(tmp_path / "keys", "alpha")
    assert len(first) == 32
    assert client_secret(tmp_path / "keys", "alpha") == first
    assert client_secret(tmp_path / "keys", "beta") != first
    assert (tmp_path / "keys" / "alpha.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700


def test_what_is_no_secret_is_refused(tmp_path) -> None:
    (tmp_path / "alpha.key").write_bytes(b"short")
    with pytest.raises(PrivacyError, match=r"alpha\.key.*5 bytes"):
        client_secret(tmp_path, "alpha")
    with pytest.raises(ConfigError, match="file name"):
        client_secret(tmp_path, "../alpha")
