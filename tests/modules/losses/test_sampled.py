import torch
import torch.nn.functional as F

from lightning_sfubm.modules.losses.sampled import (
    binary_cross_entropy,
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


def test_log_q_correction_is_consistent() -> None:
    """With many negatives from a skewed proposal the loss approaches the full softmax, and without correction it does not."""
    states, table, targets, generator = setup()
    q = proposal(torch.arange(N + 1) ** 2, 1.0)
    negatives = torch.multinomial(q, 200_000, replacement=True, generator=generator)
    # A row's own target is masked among the negatives and stands in the positive column instead: the full softmax.
    full = F.cross_entropy(states @ table[1:].T, targets - 1)
    corrected = sampled_cross_entropy(states, table, targets, negatives, q.log())
    uncorrected = sampled_cross_entropy(states, table, targets, negatives, torch.full((N + 1,), 1 / N).log())
    torch.testing.assert_close(corrected, full, atol=0.02, rtol=0)
    assert (uncorrected - full).abs() > 0.1


def test_targets_among_the_negatives_do_not_count() -> None:
    states, table, targets, _ = setup(1)
    q = proposal(torch.zeros(N + 1), 0.0).log()
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
    assert sampled_cross_entropy(states, table, targets, torch.tensor([1]), torch.zeros(N + 1)) == 0
    assert binary_cross_entropy(states, table, targets, targets) == 0
