"""The noise and the attacks on it (T5, T6)."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.privacy.attacks import linkage, nearest_matches, one_to_one_matches
from lightning_sfubm.privacy.mechanisms import GaussianPerturbation, expected_cosine, row_hashes
from lightning_sfubm.privacy.report import perturbation_report


def items(n: int = 400, dim: int = 384, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_no_noise_sends_the_vectors_bit_for_bit() -> None:
    assert torch.equal(GaussianPerturbation(0.0, b"s")(items()), items())


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.1, 0.2])
def test_measured_cosine_matches_the_formula(sigma: float) -> None:
    x = items(2000)
    sent = GaussianPerturbation(sigma, b"secret")(x)
    assert abs(float((x * sent).sum(1).mean()) - expected_cosine(sigma, 384)) < 0.01
    torch.testing.assert_close(sent.norm(dim=1), torch.ones(2000))


def test_the_paper_figures() -> None:
    assert expected_cosine(0.05, 384) == pytest.approx(0.714, abs=5e-4)
    assert expected_cosine(0.1, 384) == pytest.approx(0.454, abs=1e-3)


def test_noise_norm_is_that_of_the_gaussian() -> None:
    x = items(500)
    noise = GaussianPerturbation(0.1, b"secret")._noise(x)
    # Sum of n*D squared standard normals: mean n*D, sd sqrt(2 n D); 6 sd.
    count = noise.numel()
    assert abs(float(noise.double().square().sum()) - count) < 6 * math.sqrt(2 * count)
    assert abs(float(noise.double().mean())) < 6 / math.sqrt(count)


def test_two_uploads_of_an_item_are_identical_whatever_lies_beside_it() -> None:
    mechanism, x = GaussianPerturbation(0.1, b"secret"), items(50)
    first = mechanism(x)
    assert torch.equal(first, mechanism(x))
    assert torch.equal(first[10:20], mechanism(x[10:20]))
    assert torch.equal(first.flip(0), mechanism(x.flip(0)))


def test_a_vector_that_differs_by_rounding_keeps_its_noise_under_its_name() -> None:
    """T6: on another machine a text has other last bits; the mean of two uploads must not be nearer to it than one."""
    here, texts = items(50), [bytes([place]) for place in range(50)]
    there = normalize(here + 1e-4 * items(50, seed=1), dim=1)
    noises = [
        GaussianPerturbation(0.1, b"secret", dict(zip(row_hashes(x), texts, strict=True)))._noise(x)
        for x in (here, there)
    ]
    assert torch.equal(*noises)
    assert not torch.isclose(GaussianPerturbation(0.1, b"secret")._noise(there), noises[1]).all(dim=1).any()


def test_noise_differs_by_item_and_by_secret() -> None:
    x = items(50)
    first, other = GaussianPerturbation(0.1, b"one")._noise(x), GaussianPerturbation(0.1, b"two")._noise(x)
    assert not torch.isclose(first, other).all(dim=1).any()
    gram = normalize(first, dim=1) @ normalize(first, dim=1).T - torch.eye(50)
    assert float(gram.abs().max()) < 0.35  # independent draws: sd 1 / sqrt(384) = .05


@pytest.mark.parametrize("place", [0, 7, 31, 63])
def test_every_byte_of_the_secret_counts(place: int) -> None:
    secret, x = bytearray(64), items(5)
    plainly = GaussianPerturbation(0.1, bytes(secret))(x)
    secret[place] = 1
    assert not torch.isclose(GaussianPerturbation(0.1, bytes(secret))(x), plainly).all(dim=1).any()


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf")])
def test_a_bad_sigma_is_refused(sigma: float) -> None:
    with pytest.raises(ConfigError, match="sigma"):
        GaussianPerturbation(sigma, b"s")


def test_linkage_finds_clean_vectors_and_only_guesses_pure_noise() -> None:
    x = items()
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    assert linkage(x[order], x, order) == 1
    assert linkage(x[order], x, order, one_to_one=True) == 1
    assert linkage(items(seed=9), x, order) < 0.03
    assert linkage(items(seed=9), x, order, one_to_one=True) < 0.03


def test_one_to_one_matching_is_a_permutation_and_the_greedy_one() -> None:
    x, y = items(60, 6), items(60, 6, seed=2)
    match = one_to_one_matches(y, x)
    assert sorted(match.tolist()) == list(range(60))
    similarity, greedy = (y @ x.T).clone(), torch.full((60,), -1)
    for _ in range(60):
        row, column = divmod(int(similarity.argmax()), 60)
        greedy[row] = column
        similarity[row], similarity[:, column] = -2, -2
    assert torch.equal(match, greedy)
    assert not torch.equal(nearest_matches(y, x), match)


def test_duplicate_items_count_as_one() -> None:
    x = torch.cat([items(20), items(20)])
    assert linkage(x, x, torch.arange(40)) == 1


def test_report_shows_that_fresh_noise_could_be_averaged_away() -> None:
    x = items(300, 16)
    sent = GaussianPerturbation(0.5, b"s")(x)
    report = perturbation_report(x, sent, sent, 0.5, seed=1, max_items=200)
    curve = report["averaging"]["linkage"]  # type: ignore[index]
    assert curve[-1] > curve[0] + 0.2
    for uploads, success in zip(report["averaging"]["uploads"], curve, strict=True):  # type: ignore[index]
        quieter = GaussianPerturbation(0.5 / math.sqrt(uploads), b"t")(x)  # the mean's noise falls with the root
        assert success == pytest.approx(linkage(quieter, x, torch.arange(300)), abs=0.1)
    assert 1 / 300 < report["linkage_with_replacement"] < 1  # type: ignore[operator]
    assert report["cosine_min"] <= report["cosine_mean"] <= report["cosine_max"]  # type: ignore[operator]
    assert report["attacked_items"] == 200
