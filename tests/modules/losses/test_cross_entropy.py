import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.losses import exponentials
from lightning_sfubm.modules.losses.cross_entropy import cosine_inputs, full_cross_entropy
from lightning_sfubm.modules.losses.precision import matmul_dtype


def plain(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(states @ table[1:].T, targets - 1)


def inputs(rows: int, items: int, scale: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, 8, generator=generator) * scale
    table = torch.randn(items + 1, 8, generator=generator)
    targets = torch.randint(1, items + 1, (rows,), generator=generator)
    return states.requires_grad_(), table.requires_grad_(), targets


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 40),
    items=st.integers(2, 50),
    scale=st.floats(0.01, 5),
    seed=st.integers(0, 99),
    step=st.integers(1, 50),
    shifted=st.booleans(),
)
def test_chunked_equals_plain(rows: int, items: int, scale: float, seed: int, step: int, shifted: bool) -> None:
    states, table, targets = inputs(rows, items, scale, seed)
    expected = plain(states, table, targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exponentials, "rows_per_chunk", lambda *_: step)
        patch.setattr(exponentials, "ROW_MULTIPLE", 1)
        if shifted:  # as if every logit could overflow
            patch.setattr(exponentials, "SAFE_LOGIT", 0.0)
        actual = full_cross_entropy(states, table, targets, "fp32")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(3 * x, (states, table)) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-6)


def test_bf16_is_close() -> None:
    states, table, targets = inputs(200, 300, 1.0, 0)
    actual, expected = full_cross_entropy(states, table, targets, "bf16"), plain(states, table, targets)
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-3)
    for a, b in zip(*(torch.autograd.grad(x, (states, table)) for x in (actual, expected)), strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.9999
        assert (a - b).abs().max() < 0.02 * b.abs().max()


def test_autocast_changes_nothing() -> None:
    """Products in float32 are asked for and given, under a trainer of whatever precision."""
    states, table, targets = inputs(200, 300, 1.0, 0)
    plainly = full_cross_entropy(states, table, targets, "fp32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = full_cross_entropy(states, table, targets, "fp32")
    assert torch.equal(cast, plainly)
    for a, b in zip(*(torch.autograd.grad(x, (states, table)) for x in (cast, plainly)), strict=True):
        assert torch.equal(a, b)


def test_padding_row_takes_no_probability_and_no_gradient() -> None:
    states, table, targets = inputs(5, 4, 1.0, 0)
    with torch.no_grad():
        table[0] = 100.0 * states[0]
    loss = full_cross_entropy(states, table, targets, "fp32")
    torch.testing.assert_close(loss, plain(states, table, targets))
    assert torch.autograd.grad(loss, table)[0][0].abs().max() == 0


def test_an_impossible_target_has_a_finite_exact_loss() -> None:
    """Its probability underflows float32, so the denominator cannot be read off its column."""
    states = torch.tensor([[200.0]], requires_grad=True)
    table = torch.tensor([[0.0], [1.0], [-1.0]])
    loss = full_cross_entropy(states, table, torch.tensor([2]), "fp32")
    torch.testing.assert_close(loss, torch.tensor(400.0))
    torch.testing.assert_close(torch.autograd.grad(loss, states)[0], torch.tensor([[2.0]]))


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    states, table, targets = inputs(5, 4, 1.0, 0)
    loss = full_cross_entropy(states, table.detach(), targets, "fp32")
    loss.backward()
    assert states.grad is not None
    assert table.grad is None


def test_gradients_add_up_over_passes_and_factors() -> None:
    """A loss that stands alone hands its gradients on as they are: they must not be added to where they are kept."""
    states, table, targets = inputs(5, 4, 1.0, 0)
    loss = full_cross_entropy(states, table, targets, "fp32")
    once = [gradient.clone() for gradient in torch.autograd.grad(loss, (states, table), retain_graph=True)]
    for factor, total in ((1.0, 1.0), (1.0, 2.0), (0.5, 2.5), (1.0, 3.5)):
        (factor * loss).backward(retain_graph=True)
        for tensor, gradient in zip((states, table), once, strict=True):
            torch.testing.assert_close(tensor.grad, total * gradient)
    loss.backward()
    table.sum().backward()
    torch.testing.assert_close(table.grad, 4.5 * once[1] + 1)


def test_empty_batch_is_zero() -> None:
    states, table, targets = inputs(0, 4, 1.0, 0)
    loss = full_cross_entropy(states, table, targets)
    loss.backward()
    assert loss == 0
    assert table.grad is not None
    assert table.grad.abs().max() == 0


def test_cosine_inputs() -> None:
    states, table, _ = inputs(5, 4, 7.0, 0)
    a, b = cosine_inputs(states, table, 0.1)
    torch.testing.assert_close(a @ b.T, F.cosine_similarity(states[:, None], table[None], dim=-1) / 0.1)


def test_a_zero_row_has_a_bounded_gradient_and_the_others_are_normalised_as_ever() -> None:
    """Value and gradient of the others are those of a plain normalisation, bit for bit."""
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-2], [1], [1], [9], [1], [0]]
    )
    weights, results = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), []
    for normalised in (lambda x: cosine_inputs(x, x, 1.0)[1], lambda x: F.normalize(x, dim=-1)):
        x = rows.clone().requires_grad_()
        y = normalised(x)
        (y * weights).sum().backward()
        assert x.grad is not None
        results.append((y.detach(), x.grad))
    (ours, grad), (plain, plain_grad) = results
    assert torch.equal(ours, plain)
    assert torch.equal(grad[:5], plain_grad[:5])
    torch.testing.assert_close(grad[5], 100 * weights[5])


def test_precision() -> None:
    cpu = torch.device("cpu")
    assert matmul_dtype("fp32", cpu) is torch.float32
    assert matmul_dtype("bf16", cpu) is torch.bfloat16
    assert matmul_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    with pytest.raises(ConfigError, match="logits_precision='fp8'"):
        matmul_dtype("fp8", cpu)  # type: ignore[arg-type]
