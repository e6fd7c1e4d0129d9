"""A batch of prompts as arrays, and the negative codes that stand for soft tokens in it."""

from dataclasses import dataclass

import torch
from torch import Tensor

USER, ITEM, CANDIDATE = -1, -2, -3


@dataclass
class PromptBatch:
    """B prompts, left-padded to S tokens: a prefix and, after it, the branches that share it.

    Attributes:
        tokens: (B, S) int64 token ids; negative codes are places of soft tokens; padding holds the pad id.
        branch: (B, S) int64: -1 padding, 0 prefix, 1..C' the token's branch.
        positions: (B, S) int64: position in the token's own sequence (prefix + its branch); 0 at padding.
        items: (B, S) int64: the item a token speaks of, 0 for none.
        slots: (B, S) int64: index of the candidate a token speaks of, -1 for none.
        prefix_end: (B,) int64 column of the last prefix token.
        branch_end: (B, C') int64 column of the last token of each branch.
    """

    tokens: Tensor
    branch: Tensor
    positions: Tensor
    items: Tensor
    slots: Tensor
    prefix_end: Tensor
    branch_end: Tensor

    def to(self, device: torch.device) -> "PromptBatch":
        """The same batch on another device."""
        return PromptBatch(**{name: value.to(device) for name, value in vars(self).items()})
