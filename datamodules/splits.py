"""Leave-one-out by position, and the positions stage 2 learns from, held out from stage 1.

Everything is an index into the domain's flat item array: a split copies no data, and what a part may see is a pair of
bounds that a test can check.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from lightning_sfubm.datamodules.domain import Domain
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.seeds import numpy_generator

MAX_STAGE2_POSITIONS = 3
#: Stage-1 items a user keeps at least: one to read and one to predict.
MIN_TRAIN_ITEMS = 2


@dataclass(frozen=True)
class Splits:
    """Bounds of the parts of every user's sequence ``[offsets[u], offsets[u + 1])``.

    Attributes:
        train_start: (U,) int64, first position.
        train_end: (U,) int64, one past the last stage-1 training position.
        stage2_end: (U,) int64, one past the last training position of either stage.
        val: (E,) int64 positions of validation targets, one for each user with at least 3 interactions.
        test: (E,) int64 positions of test targets, of the same users in the same order.
        eval_users: (E,) int64 their rows.
        stage2: (T,) int64 positions of stage-2 training targets.
        stage2_users: (T,) int64 their users' rows.
        trained: (U,) bool, users whose sequences may train; the others are only tested.
    """

    train_start: np.ndarray
    train_end: np.ndarray
    stage2_end: np.ndarray
    val: np.ndarray
    test: np.ndarray
    eval_users: np.ndarray
    stage2: np.ndarray
    stage2_users: np.ndarray
    trained: np.ndarray

    @property
    def train_hash(self) -> str:
        """sha256 of the positions that train stage 1: other bounds, other users or another hold-out give another one."""
        bounds = np.stack([self.train_start, self.train_end])
        return hashlib.sha256(np.ascontiguousarray(bounds, dtype="<i8").tobytes()).hexdigest()

    def stage1_targets(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions (T,) that train stage 1 as targets, those with a history, and the rows (T,) of their users."""
        count = np.maximum(self.train_end - self.train_start - 1, 0)
        users = np.repeat(np.arange(len(count)), count)
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return self.train_start[users] + 1 + within, users


def check_subsets(**sizes: int | None) -> None:
    """Refuse a subset of nobody: as an index, a size below 1 would pick other users or none in silence.

    Args:
        sizes: number of users by setting; ``None`` = all.

    Raises:
        ConfigError: naming the setting.
    """
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"{name} must be at least 1, or none for all users, not {size}")


def leave_one_out(
    offsets: np.ndarray,
    stage2_positions: int = 0,
    stage2_users: int | None = None,
    seed: int = 1,
    name: str = "",
    train_users: int | None = None,
) -> Splits:
    """Split every user's sequence: last item = test, the one before = validation, the rest = train.

    Users with fewer than 3 interactions train only. The last ``stage2_positions`` train positions of the chosen users
    are stage-2 targets; stage 1 sees them neither as target nor as history. At least 2 train items stay in stage 1.

    Args:
        offsets: (U + 1,) bounds of the users' sequences.
        stage2_positions: positions held out per chosen user, 0 to 3.
        stage2_users: number of chosen users; ``None`` = all that have enough train items.
        seed: of the choice.
        name: names the random stream, usually the domain's fingerprint.
        train_users: size of a seeded subset of users that train; a larger one contains a smaller one. ``None`` = all.

    Raises:
        ConfigError: ``stage2_positions``, ``stage2_users`` or ``train_users`` is out of range.
    """
    if not 0 <= stage2_positions <= MAX_STAGE2_POSITIONS:
        raise ConfigError(f"stage2_positions must lie in 0..{MAX_STAGE2_POSITIONS}, not {stage2_positions}")
    check_subsets(stage2_users=stage2_users, train_users=train_users)
    starts, ends = offsets[:-1], offsets[1:]
    trained = np.ones(len(starts), dtype=bool)
    if train_users is not None:
        trained[:] = False
        trained[numpy_generator(seed, "train users", name).permutation(len(starts))[:train_users]] = True
    evaluated = ends - starts >= 3
    eval_users = np.flatnonzero(evaluated)
    stage2_end = ends - 2 * evaluated

    held = np.zeros(len(starts), dtype=np.int64)
    if stage2_positions:
        room = np.clip(stage2_end - starts - MIN_TRAIN_ITEMS, 0, stage2_positions)
        # Users without validation and test items stay whole: nothing of theirs is evaluated.
        eligible = np.flatnonzero((room > 0) & evaluated & trained)
        if stage2_users is not None:
            eligible = numpy_generator(seed, "stage2 users", name).permutation(eligible)[:stage2_users]
        held[eligible] = room[eligible]
    stage2_rows = np.repeat(np.arange(len(starts)), held)
    within = np.arange(held.sum()) - np.repeat(np.cumsum(held) - held, held)
    train_end = np.where(trained, stage2_end - held, starts)
    return Splits(
        train_start=starts,
        train_end=train_end,
        stage2_end=stage2_end,
        val=ends[eval_users] - 2,
        test=ends[eval_users] - 1,
        eval_users=eval_users,
        stage2=train_end[stage2_rows] + within,
        stage2_users=stage2_rows,
        trained=trained,
    )


def retrained(splits: Splits, users: np.ndarray, stage2_positions: int = 0) -> Splits:
    """The same split with other users to train on, for shadow models of an audit. Nothing is held out for stage 2 but
    positions that would be were every user a member, so that members and others are treated alike.

    Args:
        splits: of the domain.
        users: (U,) bool, users that train.
        stage2_positions: positions held out per user, as given to :func:`leave_one_out`.
    """
    evaluated = np.zeros(len(users), dtype=bool)
    evaluated[splits.eval_users] = True
    room = np.clip(splits.stage2_end - splits.train_start - MIN_TRAIN_ITEMS, 0, stage2_positions)
    ends = splits.stage2_end - room * evaluated
    return replace(
        splits,
        train_end=np.where(users, ends, splits.train_start),
        stage2=splits.stage2[:0],
        stage2_users=splits.stage2_users[:0],
        trained=users,
    )


def train_counts(domain: Domain, splits: Splits) -> np.ndarray:
    """(N + 1,) int64 stage-1 training interactions per item: held-out positions of any kind are not counted."""
    bounds = np.zeros(domain.num_interactions + 1, dtype=np.int64)
    np.add.at(bounds, splits.train_start, 1)
    np.add.at(bounds, splits.train_end, -1)
    in_train = np.cumsum(bounds[:-1]) > 0
    return np.bincount(domain.items[in_train], minlength=domain.num_items + 1).astype(np.int64)
