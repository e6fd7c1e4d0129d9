"""Whom membership inference asks about, and what a teacher makes of their sequences."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.sequences import TrainSequences, left_padded
from lightning_sfubm.datamodules.splits import retrained
from lightning_sfubm.errors import DataError
from lightning_sfubm.modules.semantic import SemanticTeacher
from lightning_sfubm.seeds import numpy_generator

_BLOCK = 64


@dataclass(frozen=True)
class Subjects:
    """Users of one domain: those that trained, and as many held out (``train_users``) as there are, up to a limit.

    Of both, the part of the sequence is taken that trains, or would have: never a validation or test item.

    Attributes:
        users: (U,) int64 rows of the domain.
        history: (U, L) int64, left-padded.
        targets: (U, L) int64, 0 where nothing is to be predicted.
        member: (U,) bool, whether the user trained.
    """

    users: np.ndarray
    history: Tensor
    targets: Tensor
    member: Tensor


def subjects(data: DomainDataModule, limit: int, seed: int) -> Subjects:
    """Draw at most ``limit`` users, half of them members.

    Raises:
        DataError: all users trained, or none did, so that there is nobody to compare with.
    """
    splits, domain = data.splits, data.domain
    everyone = retrained(splits, np.ones(domain.num_users, dtype=bool), data.stage2_positions)
    starts = np.maximum(everyone.train_start, everyone.train_end - data.max_length - 1)
    usable = everyone.train_end - starts >= 2
    groups = [np.flatnonzero(usable & splits.trained), np.flatnonzero(usable & ~splits.trained)]
    if not len(groups[0]) or not len(groups[1]):
        raise DataError(
            f"domain '{data.name}' has {len(groups[0])} users that trained and {len(groups[1])} that did not; membership "
            "inference compares the two: hold users out by setting train_users below the number of users"
        )
    draw = numpy_generator(seed, "audited users", domain.fingerprint)
    users = np.concatenate([np.sort(draw.permutation(group)[: max(1, limit // 2)]) for group in groups])
    both = left_padded(domain.items, starts[users], everyone.train_end[users])
    targets = np.where(both[:, :-1] > 0, both[:, 1:], 0)
    history = torch.from_numpy(np.ascontiguousarray(both[:, :-1]))
    return Subjects(users, history, torch.from_numpy(targets), torch.from_numpy(splits.trained[users].copy()))


def trained_items(data: DomainDataModule) -> Tensor:
    """Which items stand in some training row, (N,) bool."""
    rows = TrainSequences(data.domain, data.splits, data.max_length, data.windows)
    present = torch.zeros(data.num_items + 1, dtype=torch.bool)
    for start, end in zip(rows.starts, rows.ends, strict=True):
        present[torch.from_numpy(rows.items[start:end].astype(np.int64))] = True
    return present[1:]


@torch.no_grad()
def sequence_losses(teacher: SemanticTeacher, who: Subjects) -> Tensor:
    """Mean cross-entropy of the next item over each user's positions, (U,) float32, in evaluation mode."""
    training = teacher.training
    teacher.eval()
    table = teacher.frozen_table()
    losses = []
    for start in range(0, len(who.users), _BLOCK):
        history, targets = who.history[start : start + _BLOCK], who.targets[start : start + _BLOCK]
        predicting = targets != 0
        states, items = teacher.scaled(teacher.states(history, table)[predicting], table)
        terms = torch.zeros(targets.shape)
        terms[predicting] = F.cross_entropy(
            states.float() @ items[1:].float().T, targets[predicting] - 1, reduction="none"
        )
        losses.append(terms.sum(dim=1) / predicting.sum(dim=1))
    teacher.train(training)
    return torch.cat(losses)
