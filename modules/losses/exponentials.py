"""Exponentiated logits of a few positions against all items: what the whole-catalogue losses are made of.

No softmax is formed. A block holds ``exp(logit - shift)``, one column a position; what has to be divided by a column's sum
are the thin results (H numbers a position instead of N), so that the exponential is the only pass over the block. Blocks
are items x positions, because all three products of a step are fast that way round (positions x items: 10 % slower).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_sfubm.modules.losses.precision import ROW_MULTIPLE, rows_per_chunk

LOG2_E, LOG_2 = 1.0 / math.log(2.0), math.log(2.0)
#: Logits within +- this need no shift: their exponentials, sums over millions of items and inverses are normal numbers.
SAFE_LOGIT = 60.0
SUMMED_BLOCKS = 4  #: whose products are summed in their own format before float32 takes over


def logits_are_safe(states: Tensor, table: Tensor, temperature: float = 1.0) -> bool:
    """Whether every logit lies within ``SAFE_LOGIT``, judged by the longest state and the longest item vector.

    Args:
        states: (V, H).
        table: (N + 1, H).
        temperature: divides the logits.
    """
    longest = torch.linalg.vector_norm(states, dim=1).max() * torch.linalg.vector_norm(table, dim=1).max()
    return bool(longest < SAFE_LOGIT * temperature)


def block_steps(positions: int, items: int, dtype: torch.dtype, device: torch.device) -> Iterator[slice]:
    """Cut positions into equal blocks that fit the cache, sized in multiples of 16.

    Args:
        positions: V, at least 1.
        items: N + 1.
        dtype: format of a block.
        device: where it lies.
    """
    blocks = -(-positions // rows_per_chunk(items, dtype, device))
    step = -(-positions // blocks // ROW_MULTIPLE) * ROW_MULTIPLE
    return (slice(start, min(start + step, positions)) for start in range(0, positions, step))


class BlockMemory:
    """Memory for the blocks of a step, used again for each: fresh memory costs page faults.

    Args:
        items: (N + 1, H) in the format of the blocks.
    """

    def __init__(self, items: Tensor) -> None:
        self._items = items
        self._memory: dict[int, Tensor] = {}

    def __call__(self, number: int, width: int) -> Tensor:
        """A block (N + 1, width) whose content is undefined; that of the same number shares its memory.

        Args:
            number: which of the blocks needed at a time.
            width: positions, at most those of the first block of this number.
        """
        size = len(self._items) * width
        if number not in self._memory:
            self._memory[number] = self._items.new_empty(size)
        return self._memory[number][:size].view(len(self._items), width)


class TableGradient:
    """Sum of the products of blocks (N + 1, c) with thin factors (c, H), in float32 in the end.

    A few blocks are summed by the product itself, which adds to what its memory holds: turning a product to float32 and
    adding it costs half as much again as forming it. What is rounded to the blocks' format is the sum of as many blocks.

    Args:
        items: (N + 1, H) in the format of the blocks.
    """

    def __init__(self, items: Tensor) -> None:
        self._partial = torch.empty_like(items)
        self._terms = 0
        self._sum: Tensor | None = None

    def add(self, block: Tensor, factor: Tensor) -> None:
        """Add ``block @ factor``.

        Args:
            block: (N + 1, c).
            factor: (c, H) in the same format.
        """
        if self._terms == SUMMED_BLOCKS:
            self._flush()
        if self._terms:
            self._partial.addmm_(block, factor)
        else:
            torch.mm(block, factor, out=self._partial)
        self._terms += 1

    def total(self) -> Tensor:
        """The sum (N + 1, H) float32 of one block or more; nothing may be added afterwards."""
        self._flush()
        assert self._sum is not None
        return self._sum

    def _flush(self) -> None:
        if self._sum is None:
            self._sum = self._partial.to(torch.float32, copy=True)
        elif self._terms:
            self._sum.add_(self._partial)
        self._terms = 0


def log2_logits(states: Tensor, items: Tensor, out: Tensor) -> Tensor:
    """Logits to base 2, for :func:`exponentials`; the factor goes into the states.

    Args:
        states: (c, H).
        items: (N + 1, H) in the format of the product.
        out: (N + 1, c) block that is overwritten.

    Returns:
        ``out``.
    """
    return torch.mm(items, (states * LOG2_E).to(items.dtype).T, out=out)


def leave_out(logits: Tensor, ids: Tensor, columns: Tensor) -> None:
    """Take items, and always the padding, out of a block of logits: their exponential is 0.

    Args:
        logits: (N + 1, c).
        ids: (k,) item ids.
        columns: (k,) their positions.
    """
    logits[0] = -torch.inf
    logits[ids, columns] = -torch.inf


def exponentials(logits: Tensor, safe: bool) -> tuple[Tensor, Tensor]:
    """Exponentiate a block in place.

    Args:
        logits: (N + 1, c) to base 2; -inf leaves an item out.
        safe: whether the logits can do without a shift, see :func:`logits_are_safe`.

    Returns:
        The block, now ``exp(logit - shift)``, and the natural shift (c,) float32: 0, or the largest logit.
    """
    shift = torch.zeros(logits.shape[1], dtype=torch.float32, device=logits.device)
    if not safe:
        top = logits.amax(0).clamp_min(torch.finfo(logits.dtype).min)
        logits -= top
        shift = top.float() * LOG_2
    return torch.exp2(logits, out=logits), shift


def column_sums(block: Tensor) -> Tensor:
    """Sum a block over its items.

    Args:
        block: (N + 1, c).

    Returns:
        (c,) float32. In 16 shares, because the fast sum is rounded to the block's format in the end.
    """
    return torch.stack([share.sum(0) for share in block.chunk(16)]).sum(0, dtype=torch.float32)


def times(gradient: Tensor, factor: Tensor) -> Tensor:
    """Scale a gradient by what came back for the loss. That is 1 where the loss is alone, and a pass over the table is saved.

    Args:
        gradient: any shape.
        factor: scalar.
    """
    alone = factor.device.type == "cpu" and factor.item() == 1.0  # elsewhere looking at it would wait for the device
    return gradient if alone else gradient * factor
