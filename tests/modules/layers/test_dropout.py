import pytest
import torch

from lightning_sfubm.modules.layers.dropout import Dropout, dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("probability", [0.1, 0.2, 0.5])
def test_drops_the_share_and_keeps_the_expectation(probability: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(301, 333, dtype=dtype)  # a number of entries that fills no whole random word
    out = dropout(x, probability, True)
    kept = out != 0
    assert abs(kept.float().mean() - (1 - probability)) < 0.008  # five standard deviations of 100,233 draws
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - probability)))


def test_a_value_of_half_precision_is_dropped_alike_with_and_without_a_gradient() -> None:
    x, outs = torch.randn(40, 7).bfloat16(), []
    for needs_gradient in (False, True):
        torch.manual_seed(0)
        outs.append(dropout(x.clone().requires_grad_(needs_gradient), 0.3, True).detach())
    torch.testing.assert_close(*outs)
    assert torch.equal(outs[0] == 0, outs[1] == 0)


def test_neighbouring_entries_are_independent() -> None:
    """Four entries share a random word; each pair of places must agree as often as chance says."""
    torch.manual_seed(0)
    kept = (dropout(torch.ones(50_000, 4), 0.2, True) != 0).float()
    covariance = torch.cov(kept.T)
    assert (covariance - 0.16 * torch.eye(4)).abs().max() < 0.005


def test_the_gradient_passes_where_the_value_did() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 7, requires_grad=True)
    out = dropout(x, 0.3, True)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (out != 0) / 0.7)


def test_same_seed_same_mask() -> None:
    layer, x, masks = Dropout(0.4), torch.ones(9, 5), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(layer(x))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(
    ("probability", "training", "expected"), [(0.4, False, 1.0), (0.0, True, 1.0), (1.0, True, 0.0)]
)
def test_nothing_is_drawn_where_nothing_is_left_to_chance(probability: float, training: bool, expected: float) -> None:
    assert torch.equal(dropout(torch.ones(5, 3), probability, training), torch.full((5, 3), expected))


def test_rows_are_dropped_apart_when_vectorised() -> None:
    torch.manual_seed(0)
    rows = torch.func.vmap(lambda x: dropout(x, 0.5, True), randomness="different")(torch.ones(20, 30))
    assert len({tuple(row.tolist()) for row in rows}) == 20
