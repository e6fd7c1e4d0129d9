import pytest
import torch

from lightning_sfubm.modules.losses import exponentials
from lightning_sfubm.modules.losses.exponentials import (
    LOG_2,
    SUMMED_BLOCKS,
    TableGradient,
    block_steps,
    column_sums,
    leave_out,
    log2_logits,
    logits_are_safe,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("safe", [True, False])
def test_exponentials_and_shift_give_the_log_sum(dtype: torch.dtype, safe: bool) -> None:
    torch.manual_seed(0)
    states, items = torch.randn(16, 8), torch.randn(51, 8).to(dtype)
    logits = log2_logits(states, items, torch.empty(51, 16, dtype=dtype))
    leave_out(logits, torch.tensor([3, 7]), torch.tensor([0, 5]))
    block, shift = exponentials.exponentials(logits, safe)
    expected = items.float() @ states.T
    expected[0] = expected[3, 0] = expected[7, 5] = -torch.inf
    tolerance = 1e-5 if dtype is torch.float32 else 5e-2  # logits of up to 12, rounded to 2^-9
    torch.testing.assert_close(shift + column_sums(block).log(), expected.logsumexp(0), rtol=0, atol=tolerance)
    assert (block == 0).sum() == 18  # padding in 16 columns, and the two left out
    assert torch.equal(shift, torch.zeros(16)) == safe
    if not safe:
        torch.testing.assert_close(shift, expected.amax(0), rtol=tolerance, atol=tolerance)
        assert block.max() == 1


def test_a_position_with_nothing_left_has_no_nan() -> None:
    block, shift = exponentials.exponentials(torch.full((4, 2), -torch.inf), False)
    assert block.abs().max() == 0
    assert shift.isfinite().all()


def test_safety_is_judged_by_the_longest_vectors() -> None:
    states, table = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 11.0]])
    assert logits_are_safe(states, table)  # 5 * 11 < 60
    assert not logits_are_safe(2 * states, table)
    assert logits_are_safe(2 * states, table, temperature=2.0)
    assert not logits_are_safe(3 * states, table, temperature=2.0)  # 3 * 55 / 2
    assert not logits_are_safe(states * torch.nan, table)


@pytest.mark.parametrize("positions", [1, 16, 336, 352, 800, 6400])
def test_blocks_are_equal_shares_of_all_positions(positions: int) -> None:
    blocks = list(block_steps(positions, 12_000, torch.bfloat16, torch.device("cpu")))
    assert [b.start for b in blocks[1:]] == [b.stop for b in blocks[:-1]]
    assert (blocks[0].start, blocks[-1].stop) == (0, positions)
    widths = [b.stop - b.start for b in blocks]
    assert max(widths) * 12_000 * 2 <= 8 << 20
    assert len(set(widths[:-1])) <= 1
    assert len(blocks) == -(-positions // 336)


def test_sums_of_a_rounded_block_are_not_rounded_like_it() -> None:
    torch.manual_seed(0)
    block = torch.rand(12_000, 5).bfloat16()
    torch.testing.assert_close(column_sums(block), block.float().sum(0), rtol=2e-3, atol=0)
    assert pytest.approx(1.0) == LOG_2 * exponentials.LOG2_E


@pytest.mark.parametrize("number", [1, SUMMED_BLOCKS, SUMMED_BLOCKS + 1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_table_is_the_sum_over_blocks_rounded_a_few_at_a_time(
    dtype: torch.dtype, number: int
) -> None:
    torch.manual_seed(0)
    blocks = [(torch.rand(50, 16).to(dtype), torch.rand(16, 8).to(dtype)) for _ in range(number)]
    gradient = TableGradient(torch.zeros(50, 8, dtype=dtype))
    for block, factor in blocks:
        gradient.add(block, factor)
    expected = sum(block.double() @ factor.double() for block, factor in blocks)
    total = gradient.total()
    assert total.dtype is torch.float32
    # Forty blocks summed in bfloat16 alone are off by .0067 of the length.
    error = (total.double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype is torch.float32 else 3e-3)
