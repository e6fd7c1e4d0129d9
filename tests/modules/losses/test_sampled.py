import math

import pytest
import torch
import torch.nn.functional as F

from lightning_sfubm.modules.losses.sampled import (
    binary_cross_entropy,
    bpr_max,
    draw,
    other_items,
    proposal,
    sampled_cross_entropy,
)
from lightning_sfubm.seeds import torch_generator

N = 20


def setup(rows: int = 6):
    generator = torch_generator(0, "sampled")
    states, table = torch.randn(rows, 4, generator=generator), torch.randn(N + 1, 4, generator=generator)
    return states, table, torch.randint(1, N + 1, (rows,), generator=generator), generator


def test_proposal() -> None:
    counts = torch.tensor([0, 3, 0, 8])
    torch.testing.assert_close(proposal(counts, 1.0), torch.tensor([0.0, 4 / 14, 1 / 14, 9 / 14]))
    torch.testing.assert_close(proposal(counts, 0.0), torch.tensor([0.0, 1 / 3, 1 / 3, 1 / 3]))


def test_draws_follow_the_proposal() -> None:
    q = proposal(torch.tensor([0, 3, 0, 8, 1]), 1.0)
    drawn = draw(q.double().cumsum(0), 60_000, torch_generator(0, "draws"))
    shares = torch.bincount(drawn, minlength=5) / 60_000
    torch.testing.assert_close(shares, q, atol=0.01, rtol=0)
    assert shares[0] == 0
    # nothing lies beyond the end, however the sums are rounded
    ends = draw(torch.tensor([0.0, 0.3, 0.3, 0.9]).double(), 10_000, torch_generator(0, "draws"))
    assert set(ends.tolist()) == {1, 3}


def test_log_q_correction_is_consistent() -> None:
    """With many negatives from a skewed proposal the loss approaches the full softmax, and without correction it does not."""
    states, table, targets, generator = setup()
    q = proposal(torch.arange(N + 1) ** 2, 1.0)
    negatives = torch.multinomial(q, 200_000, replacement=True, generator=generator)
    # A row's own target is masked among the negatives and stands in the positive column instead: the full softmax.
    full = F.cross_entropy(states @ table[1:].T, targets - 1)
    corrected = sampled_cross_entropy(states, table, targets, negatives, q.log()[negatives])
    uncorrected = sampled_cross_entropy(states, table, targets, negatives, torch.full((200_000,), 1 / N).log())
    torch.testing.assert_close(corrected, full, atol=0.02, rtol=0)
    assert (uncorrected - full).abs() > 0.1


def test_log_q_strength() -> None:
    """0 is the softmax over target and negatives as they are, and with a uniform proposal 1 adds a constant to them."""
    states, table, targets, generator = setup(3)
    negatives = torch.randint(1, N + 1, (7,), generator=generator)
    q = proposal(torch.arange(N + 1), 0.7).log()[negatives]
    plain = []
    for state, target in zip(states, targets, strict=True):
        others = [n for n in negatives if n != target]
        logits = torch.stack([table[i] @ state for i in [target, *others]])
        plain.append(F.cross_entropy(logits, torch.tensor(0)))
    loss = sampled_cross_entropy(states, table, targets, negatives, q, logq=0.0)
    torch.testing.assert_close(loss, torch.stack(plain).mean())
    half, whole = (sampled_cross_entropy(states, table, targets, negatives, q, logq=s) for s in (0.5, 1.0))
    assert len({float(x) for x in (loss, half, whole)}) == 3


def plain_bpr_max(states, table, targets, negatives, bpreg: float, alpha: float) -> float:
    """BPR-max item by item."""

    def score(state, item) -> float:
        r = float(state @ table[item])
        return alpha * (math.exp(r) - 1) if alpha and r < 0 else r

    losses = []
    for state, target in zip(states, targets, strict=True):
        r = [score(state, n) for n in negatives if n != target]
        share = [math.exp(x) / sum(map(math.exp, r)) for x in r]
        won = sum(s / (1 + math.exp(x - score(state, target))) for s, x in zip(share, r, strict=True))
        losses.append(-math.log(won) + bpreg * sum(s * x * x for s, x in zip(share, r, strict=True)) if r else 0.0)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("bpreg", [0.0, 1.95])
@pytest.mark.parametrize("elu_param", [0.0, 0.5, 1.0])
def test_bpr_max_equals_the_plain_version(bpreg: float, elu_param: float) -> None:
    states, table, targets, generator = setup()
    negatives = torch.cat([targets[:3], torch.randint(1, N + 1, (12,), generator=generator)])
    loss = bpr_max(states, table, targets, negatives, bpreg, elu_param)
    assert float(loss) == pytest.approx(plain_bpr_max(states, table, targets, negatives, bpreg, elu_param), rel=1e-5)


def test_bpr_max_is_stable_and_skips_rows_without_negatives() -> None:
    """Scores in the hundreds give finite gradients; a row whose only negative is its target has loss and gradient 0."""
    states, table, targets, _ = setup(2)
    states, table = (300 * states).requires_grad_(), table.requires_grad_()
    targets = torch.tensor([4, 7])
    loss = bpr_max(states, table, targets, torch.tensor([7, 7]), bpreg=0.5)
    loss.backward()
    assert loss.isfinite()
    assert states.grad is not None
    assert table.grad is not None
    assert states.grad.isfinite().all()
    assert table.grad.isfinite().all()
    assert states.grad[1].abs().max() == 0
    assert states.grad[0].abs().max() > 0
    alone = bpr_max(states[1:], table, targets[1:], torch.tensor([7]))
    assert alone.item() == 0.0
    assert plain_bpr_max(states[1:].detach(), table.detach(), targets[1:], torch.tensor([7]), 1.0, 0.5) == 0.0


def test_bpr_max_learns_what_it_should() -> None:
    """One step against the gradient raises the target's margin over the hardest negative."""
    states, table, targets, generator = setup(4)
    negatives = torch.randint(1, N + 1, (30,), generator=generator)
    states.requires_grad_()
    before = bpr_max(states, table, targets, negatives, bpreg=0.0)
    (grad,) = torch.autograd.grad(before, states)
    assert bpr_max(states - 0.1 * grad, table, targets, negatives, bpreg=0.0) < before


def test_targets_among_the_negatives_do_not_count() -> None:
    states, table, targets, _ = setup(1)
    q = proposal(torch.zeros(N + 1), 0.0).log()[targets.repeat(5)]
    loss = sampled_cross_entropy(states, table, targets, targets.repeat(5), q)
    torch.testing.assert_close(loss, torch.tensor(0.0))


def test_binary_cross_entropy_literal() -> None:
    states, table = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0], [-3.0, 0.0]])
    loss = binary_cross_entropy(states, table, torch.tensor([1]), torch.tensor([2]))
    expected = F.binary_cross_entropy_with_logits(torch.tensor([2.0, -3.0]), torch.tensor([1.0, 0.0]), reduction="sum")
    torch.testing.assert_close(loss, expected)


def test_other_items_are_uniform_over_all_but_the_target() -> None:
    targets = torch.full((20_000,), 3)
    drawn = other_items(targets, 5, torch_generator(0, "other"))
    counts = torch.bincount(drawn, minlength=6)
    assert counts[3] == 0
    assert counts[0] == 0
    assert counts[[1, 2, 4, 5]].min() > 4_700  # expectation 5,000, standard deviation 61


def test_empty_batches() -> None:
    states, table, targets, _ = setup(0)
    assert sampled_cross_entropy(states, table, targets, torch.tensor([1]), torch.zeros(1)) == 0
    assert bpr_max(states, table, targets, torch.tensor([1])) == 0
    assert binary_cross_entropy(states, table, targets, targets) == 0
