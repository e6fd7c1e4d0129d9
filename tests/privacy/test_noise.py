import math

import pytest
import torch

from lightning_sfubm.privacy.noise import NoiseStream


def test_seeds_that_torch_takes_for_one_give_different_noise() -> None:
    """torch's CPU generator keeps 32 bits of a seed; a guarantee must not rest on so few."""
    low, high = 12345, 12345 + 7 * 2**32
    drawn = [torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in (low, high)]
    assert torch.equal(*drawn)  # this is why: if it fails one day, the streams may be merged again
    first, second = (NoiseStream(seed.to_bytes(16, "big"), "noise").normal((8,)) for seed in (low, high))
    assert not torch.isclose(first, second).any()


@pytest.mark.parametrize("place", [0, 31, 63, 99])
def test_every_byte_of_the_secret_counts(place: int) -> None:
    secret = bytearray(100)
    plainly = NoiseStream(bytes(secret), "noise").normal((8,))
    secret[place] = 1
    assert not torch.isclose(NoiseStream(bytes(secret), "noise").normal((8,)), plainly).any()


def test_streams_have_names_and_repeat() -> None:
    streams = [NoiseStream(b"secret", *names).normal((4, 5)) for names in (("a", 1), ("a", 1), ("a", 2), ("a1",))]
    assert torch.equal(streams[0], streams[1])
    for other in streams[2:]:
        assert not torch.isclose(streams[0], other).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_standard_normal(dtype: torch.dtype) -> None:
    drawn = NoiseStream(b"secret").normal((200, 500), dtype)
    assert drawn.dtype == dtype
    count = drawn.numel()
    assert abs(float(drawn.mean())) < 6 / math.sqrt(count)
    assert abs(float(drawn.double().square().mean()) - 1) < 6 * math.sqrt(2 / count)
    assert float((drawn.abs() < 1.959964).double().mean()) == pytest.approx(0.95, abs=0.005)
    assert NoiseStream(b"secret").normal(()).shape == ()
