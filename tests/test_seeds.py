"""Named streams: what they follow from, and what they leave alone."""

from contextlib import suppress

import torch

from lightning_sfubm.seeds import derive_seed, seeded


def test_names_and_seeds_are_told_apart_where_their_letters_are_not() -> None:
    streams = [(1, "ab", "c"), (1, "a", "bc"), (1, "abc"), (1, "abc", ""), (11, "bc"), (1, "1", "bc"), (1, 1, "b", "c")]
    assert len({derive_seed(seed, *names) for seed, *names in streams}) == len(streams)
    assert derive_seed(1, "round", 3) == derive_seed(1, "round", "3")
    assert all(0 <= derive_seed(seed, "a") < 2**63 for seed in range(100))


def test_streams_are_those_of_earlier_versions() -> None:
    """Stored candidate lists and published rows were drawn from them."""
    assert derive_seed(1, "candidates", "test", 20) == 6644255428315530107


def test_a_block_with_a_stream_of_its_own_leaves_the_outer_one_where_it_was() -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    drawn = [torch.rand(2)]
    with seeded(1, "block"):
        inside = torch.rand(2)
    with suppress(ValueError), seeded(1, "block"):
        assert torch.equal(torch.rand(2), inside)
        raise ValueError("broken off")
    drawn.append(torch.rand(2))
    assert torch.equal(torch.cat(drawn), expected)
