"""Batch samplers: rows of similar length together, the same number of batches on every rank, seeded by epoch."""

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Sampler

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.seeds import numpy_generator

#: Item ids that the complete histories of a batch may take with their padding: 64 MB.
SEEN_IDS = 2**23


B = TypeVar("B")


class BatchIndex(NamedTuple):
    """What a sampler hands a dataset: which rows, and in which epoch (for draws that differ by epoch)."""

    epoch: int
    rows: np.ndarray


class BucketBatchSampler(Sampler[BatchIndex]):
    """Shuffled batches of rows of similar length; use as ``DataLoader(data, sampler=this, batch_size=None)``.

    An epoch's rows are permuted, cut into buckets of ``bucket_batches`` batches, sorted by length within a bucket and
    cut into batches, whose order is shuffled. With several ranks a *global* batch of ``batch_size * world_size`` rows
    is cut this way and every rank takes each ``world_size``-th row of it: two ranks see, step by step, what one process
    with the double batch size sees. Only the last global batch may be short: ranks may get a row less of it, so losses
    are weighed by what a rank has. Where it has fewer rows than there are ranks, each of its rows is dealt out the same
    number of times, so that every rank has one or two and the mean over all ranks is the mean over its rows.

    Lightning calls :meth:`set_epoch` before each epoch. The trainer must run with ``use_distributed_sampler=False``.

    Args:
        lengths: (n,) length of each row.
        batch_size: rows per rank.
        seed: root seed.
        name: names the random stream.
        rank: of this process.
        world_size: number of processes.
        bucket_batches: batches a bucket; more = less padding, less mixing.
        even: cut a bucket into batches of about equal total length, of fewer rows where these are long; ``batch_size`` is
            then the mean. For losses that are means over the positions of a batch: with as many rows in each, a position
            of a short row would weigh more than one of a long row, as their batches have fewer. Every rank gets a row of each,
            for which cuts may move where batches have hardly more rows than there are ranks.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        *,
        seed: int,
        name: str = "train",
        rank: int = 0,
        world_size: int = 1,
        bucket_batches: int = 50,
        even: bool = False,
    ) -> None:
        _check(batch_size, rank, world_size)
        self.even = even
        self.lengths = np.asarray(lengths)
        self.sort_keys = self.lengths
        self.batch_size = batch_size
        self.seed = seed
        self.name = name
        self.rank = rank
        self.world_size = world_size
        self.bucket_batches = bucket_batches
        self.epoch = 0
        self.skipped = 0  #: batches that the next iteration, and no later one, leaves out at its start

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[BatchIndex]:
        generator = numpy_generator(self.seed, "batches", self.name, self.epoch)
        total = len(self.lengths)
        rows = generator.permutation(total)
        step = self.batch_size * self.world_size
        bucket = np.arange(total) // (step * self.bucket_batches)
        rows = rows[np.lexsort((self.sort_keys[rows], bucket))]
        bounds = np.append(np.arange(0, total, step), total)
        if self.even:
            for start in range(0, total, step * self.bucket_batches):
                part = self.lengths[rows[start : start + step * self.bucket_batches]]
                inner = np.flatnonzero((bounds > start) & (bounds < start + len(part)))
                bounds[inner] = start + _even_cuts(part, len(inner) + 1, self.world_size)
        skipped, self.skipped = self.skipped, 0
        for number in generator.permutation(len(self))[skipped:]:
            batch = rows[bounds[number] : bounds[number + 1]]
            times = -(-self.world_size // len(batch))  # more than once only where a rank would have nothing
            yield BatchIndex(self.epoch, np.tile(batch, times)[self.rank :: self.world_size])


class ResumableLoader(DataLoader[B]):
    """Batches of a :class:`BucketBatchSampler`; goes on within an epoch where a checkpoint was written there.

    Lightning keeps :meth:`state_dict` in checkpoints and gives it back before the epoch goes on. Without it the epoch would
    begin with its first batches again and end before its last ones. A batch that an exception left half done is not repeated.

    Args:
        rows: the data set.
        sampler: says which rows a batch has.
        num_workers: processes that make batches.
    """

    def __init__(self, rows: Any, sampler: BucketBatchSampler, num_workers: int = 0) -> None:
        super().__init__(rows, sampler=sampler, batch_size=None, num_workers=num_workers)
        self._order = sampler
        self._given = {"epoch": -1, "batches": 0}
        self._resumed: dict[str, int] | None = None

    def __iter__(self) -> Iterator[B]:  # type: ignore[override]
        # At the first batch, not before: only then has Lightning set the epoch.
        resumed, self._resumed = self._resumed, None
        epoch = self._order.epoch
        first = resumed["batches"] if resumed is not None and resumed["epoch"] == epoch else 0
        self._order.skipped = first
        for number, batch in enumerate(super().__iter__(), first + 1):
            self._given = {"epoch": epoch, "batches": number}
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were given out."""
        return dict(self._given)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Leave out the batches that were given out before, where the epoch that comes next is the same one."""
        self._resumed = dict(state)


class SortedBatchSampler(Sampler[BatchIndex]):
    """Every row exactly once over all ranks, sorted by length, in equally many batches on every rank.

    Batches are evenly sized (they differ by one row at most), so that no rank runs out of batches and no row is
    repeated: sums over ranks are exact. A batch is empty only where there are fewer rows than ranks.

    A row may carry a complete history beside the one it is sorted by. Where one user's is so long that it would pad those
    of a batch beyond ``seen_ids``, rows of equal length are sorted by it, so that such users share batches, and batches are
    cut until they fit or hold one row a rank. Otherwise order and batches are as without it.

    Args:
        lengths: (n,) length of each row.
        batch_size: largest number of rows per rank and batch (with 1 and several ranks, a batch may hold 2).
        rank: of this process.
        world_size: number of processes.
        seen_lengths: (n,) length of each row's complete history; ``None`` where batches carry none.
        seen_ids: ids of complete histories a rank and batch, padding included.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seen_lengths: np.ndarray | None = None,
        seen_ids: int = SEEN_IDS,
    ) -> None:
        _check(batch_size, rank, world_size)
        order = np.argsort(lengths, kind="stable")
        count = min(-(-len(order) // (batch_size * world_size)), max(1, len(order) // world_size))
        parts = np.array_split(order, count) if count else []
        if seen_lengths is not None:
            seen = seen_lengths

            def pieces(part: np.ndarray) -> int:
                fitting = max(1, seen_ids // max(1, int(seen[part].max())))
                return max(1, min(-(-len(part) // (fitting * world_size)), len(part) // world_size))

            if any(pieces(part) > 1 for part in parts):
                parts = np.array_split(np.lexsort((seen, lengths)), count)
                parts = [piece for part in parts for piece in np.array_split(part, pieces(part))]
        self.batches = [part[rank::world_size] for part in parts]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[BatchIndex]:
        return (BatchIndex(0, rows) for rows in self.batches)


def _even_cuts(lengths: np.ndarray, count: int, least: int) -> np.ndarray:
    """Where to cut rows (n,) into ``count`` <= n pieces of about equal total length, of ``least`` rows if there are."""
    pieces = np.arange(1, count)
    least = min(least, len(lengths) // count)
    reached = np.cumsum(lengths)
    cuts = np.searchsorted(reached, reached[-1] * pieces / count) + 1
    cuts = np.maximum.accumulate(cuts - least * pieces) + least * pieces
    return np.minimum(cuts, len(lengths) - least * (count - pieces))


def _check(batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} does not lie in a world of {world_size}")


def shard_of(datamodule: L.LightningDataModule) -> tuple[int, int]:
    """(rank, world size) of the trainer a data module is attached to; (0, 1) without one.

    Raises:
        ConfigError: Lightning would replace the batch samplers, which know what a batch is, or shard what they have sharded
            already, and leave out all but one row of as many as there are ranks.
    """
    trainer = datamodule.trainer
    if trainer is None:
        return 0, 1
    if getattr(trainer, "overfit_batches", 0):
        raise ConfigError(
            "trainer.overfit_batches replaces the sampler that makes the batches: set trainer.limit_train_batches instead"
        )
    again = getattr(getattr(trainer, "_accelerator_connector", None), "use_distributed_sampler", False)
    if trainer.world_size > 1 and again:
        raise ConfigError(
            f"{type(datamodule).__name__} deals its rows out to the {trainer.world_size} processes itself: set "
            "trainer.use_distributed_sampler to false"
        )
    return trainer.global_rank, trainer.world_size


def order_seed_of(datamodule: Any) -> int:
    """Seed of the run whose trainer a data module is attached to, so that other seeds see other batches of the same data."""
    seed = getattr(datamodule.trainer, "run_seed", None)
    return int(datamodule.seed if seed is None else seed)
