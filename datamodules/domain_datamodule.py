"""The LightningDataModule of one domain: its settings, and the loaders of what is loaded."""

from functools import partial
from typing import Literal

import numpy as np
from torch.utils.data import DataLoader

from lightning_sfubm.contracts import PredictBatch, RankBatch, TextEncoder, TrainBatch
from lightning_sfubm.datamodules.batching import (
    BucketBatchSampler,
    ResumableLoader,
    SortedBatchSampler,
    order_seed_of,
    shard_of,
)
from lightning_sfubm.datamodules.loaded_domain import LoadedDomain
from lightning_sfubm.datamodules.preprocess import PreprocessSettings
from lightning_sfubm.datamodules.ranking import CompleteRows, FixedCandidates, RankRows, RedrawnCandidates
from lightning_sfubm.datamodules.readers.base import Reader
from lightning_sfubm.datamodules.sequences import TrainSequences, Windows
from lightning_sfubm.datamodules.splits import check_subsets
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.evaluation.candidates import CandidateLists
from lightning_sfubm.seeds import numpy_generator

Split = Literal["train1", "train2", "val", "test"]


class DomainDataModule(LoadedDomain):
    """One silo's data. Nothing here reads another domain.

    Run it under ``Trainer(use_distributed_sampler=False)``: the batch samplers shard by rank themselves.

    Args:
        name: domain name; files and folders are called by it.
        reader: where the data comes from.
        root: folder that the reader's relative paths start from.
        text_encoder: frozen encoder of the item texts; ``None`` leaves ``catalogue.text_embeddings`` empty.
        k_core: every user and item keeps at least this many interactions; 0 = off.
        max_users: seeded subset of users, drawn after the k-core.
        user_range: keep users whose source id, an integer, lies in ``[low, high)``; applied before the k-core.
        user_fold: ``(i, n)``: keep the users of fold i of n disjoint ones, by a hash of their ids; before the k-core.
        item_share: keep this share of the items, by a hash that differs between folds; before the k-core.
        train_users: seeded subset of users whose sequences train and validate; test takes all. A young shop in small.
        max_length: L, longest history.
        windows: ``"last"`` trains on the latest L + 1 items of a user, ``"all"`` on consecutive windows over all.
        batch_size: training sequences a batch.
        even_batches: a batch of long sequences holds fewer of them, so that batches have about equally many positions and
            ``batch_size`` sequences on average; otherwise each has as many sequences, and its loss, a mean over positions,
            weighs a position of a long sequence less than one of a short one. [choice: figures in docs/results.md]
        eval_batch_size: users a validation or test batch.
        num_candidates: C of validation and test.
        stage2_users: users whose last train positions are kept for stage 2; ``None`` = all with enough items.
        stage2_positions: positions held out per such user, 0 to 3; 0 = no hold-out.
        max_eval_users: seeded subset of users for validation; test always takes all.
        num_workers: worker processes of each loader; batches do not depend on it.
        seed: of subset, split and candidates; and of the order of batches where the trainer's run has no seed.

    Raises:
        ConfigError: a size is out of range.
    """

    def __init__(
        self,
        name: str,
        reader: Reader,
        root: str | None = None,
        text_encoder: TextEncoder | None = None,
        k_core: int = 5,
        max_users: int | None = None,
        user_range: tuple[int, int] | None = None,
        user_fold: tuple[int, int] | None = None,
        item_share: float = 1.0,
        train_users: int | None = None,
        max_length: int = 50,
        windows: Windows = "last",
        batch_size: int = 128,
        even_batches: bool = True,
        eval_batch_size: int = 512,
        num_candidates: int = 20,
        stage2_users: int | None = None,
        stage2_positions: int = 0,
        max_eval_users: int | None = None,
        num_workers: int = 0,
        seed: int = 1,
    ) -> None:
        super().__init__(
            name,
            reader,
            root,
            text_encoder,
            # Without a subset the seed does not touch the prepared domain: all seeds share one cache entry.
            PreprocessSettings(
                k_core, user_range, max_users, seed if max_users is not None else 0, user_fold, item_share
            ),
            train_users=train_users,
            num_candidates=num_candidates,
            stage2_users=stage2_users,
            stage2_positions=stage2_positions,
            seed=seed,
        )
        check_subsets(max_eval_users=max_eval_users)
        self.max_length = max_length
        self.windows: Windows = windows
        self.batch_size = batch_size
        self.even_batches = even_batches
        self.eval_batch_size = eval_batch_size
        self.max_eval_users = max_eval_users
        self.num_workers = num_workers

    @property
    def longest_history(self) -> int:
        """Items of the longest history that a model is given: a whole sequence, where recommendations are made."""
        return min(self.max_length, int(np.diff(self.domain.offsets).max()))

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """Batches of training sequences, bucketed by length; their order follows the run's seed and the epoch."""
        rows = TrainSequences(self.domain, self.splits, self.max_length, self.windows)
        rank, world_size = shard_of(self)
        sampler = BucketBatchSampler(
            rows.lengths,
            self.batch_size,
            seed=order_seed_of(self),
            name=self.name,
            rank=rank,
            world_size=world_size,
            even=self.even_batches,
        )
        return ResumableLoader(rows, sampler, self.num_workers)

    def val_dataloader(self) -> DataLoader[RankBatch]:
        """Validation targets of (a seeded subset of) the users."""
        return self._evaluation("val", self.max_eval_users)

    def test_dataloader(self) -> DataLoader[RankBatch]:
        """Test targets of all users."""
        return self._evaluation("test", None)

    def predict_dataloader(self) -> DataLoader[PredictBatch]:
        """Complete sequences of all users, for what to recommend now: the test item is known by then."""
        rows = CompleteRows(self.domain.items, self.domain.offsets, self.max_length)
        rank, world_size = shard_of(self)
        sampler = SortedBatchSampler(
            rows.lengths, self.eval_batch_size, rank=rank, world_size=world_size, seen_lengths=rows.seen_lengths
        )
        return DataLoader(rows, sampler=sampler, batch_size=None, num_workers=self.num_workers)

    def rank_rows(
        self,
        split: Split,
        num_candidates: int | None = None,
        max_users: int | None = None,
        seed: int | None = None,
        with_seen: bool = False,
        draws_seed: int | None = None,
        max_rows: int | None = None,
    ) -> RankRows:
        """Rows of a split as a data set.

        Args:
            split: ``train1`` (every position that trains stage 1 and has a history) or ``train2`` (held-out train positions),
                both with negatives outside the train history, drawn anew each epoch; ``val`` or ``test`` (stored lists).
            num_candidates: C; ``None`` = the data module's.
            max_users: seeded subset of users; a larger one contains a smaller one. Stored lists of a user do not depend
                on it. Those of ``train1`` and ``train2`` do: the rows of a subset are drawn for together, from one stream.
            seed: of the subset; ``None`` = the data module's.
            with_seen: whether batches carry the complete known history.
            draws_seed: of what is drawn anew each epoch: the candidates of ``train1`` and ``train2``; ``None`` = ``seed``.
            max_rows: seeded subset of the rows; a larger one contains a smaller one.

        Raises:
            ConfigError: there is no such split, or ``max_users`` or ``max_rows`` is below 1.
        """
        check_subsets(max_users=max_users, max_rows=max_rows)
        domain, splits = self.domain, self.splits
        count = self.num_candidates if num_candidates is None else num_candidates
        seed = self.seed if seed is None else seed
        if split == "train1":
            positions, users = splits.stage1_targets()
        elif split == "train2":
            positions, users = splits.stage2, splits.stage2_users
        elif split in ("val", "test"):
            positions, users = getattr(splits, split), splits.eval_users
        else:
            raise ConfigError(f"split must be 'train1', 'train2', 'val' or 'test', not {split!r}")
        rows = np.arange(len(users)) if split == "test" else np.flatnonzero(splits.trained[users])
        if max_users is not None:
            distinct = np.unique(users[rows])
            chosen = numpy_generator(seed, "rank users", domain.fingerprint).permutation(distinct)[:max_users]
            rows = rows[np.isin(users[rows], chosen)]
        if max_rows is not None:
            rows = np.sort(numpy_generator(seed, "rank rows", domain.fingerprint).permutation(rows)[:max_rows])
        positions, users = positions[rows], users[rows]

        candidates: FixedCandidates | RedrawnCandidates
        if split in ("train1", "train2"):
            sampler = self._sampler(domain, positions, domain.offsets[users], splits.stage2_end[users])
            name = domain.fingerprint if split == "train2" else f"{domain.fingerprint} {split}"
            candidates = RedrawnCandidates(sampler, count, seed if draws_seed is None else draws_seed, name)
        else:
            lists = self._stored(split, count, domain)
            candidates = FixedCandidates(CandidateLists(lists.candidates[rows], lists.target_index[rows]))
        starts = domain.offsets[users]
        return RankRows(domain.items, starts, positions, users, candidates, self.max_length, with_seen)

    def rank_dataloader(
        self,
        split: Split,
        batch_size: int,
        num_candidates: int | None = None,
        max_users: int | None = None,
        seed: int | None = None,
        shuffle: bool = False,
        with_seen: bool = False,
        rank: int = 0,
        world_size: int = 1,
        draws_seed: int | None = None,
        max_rows: int | None = None,
    ) -> DataLoader[RankBatch]:
        """Batches of :meth:`rank_rows`: sorted by history length, or shuffled in length buckets by ``draws_seed``."""
        rows = self.rank_rows(split, num_candidates, max_users, seed, with_seen, draws_seed, max_rows)
        if shuffle:
            order = next(given for given in (draws_seed, seed, self.seed) if given is not None)
            bucketed = partial(BucketBatchSampler, seed=order, name=f"{self.name} {split}", bucket_batches=20)
            return ResumableLoader(
                rows, bucketed(rows.lengths, batch_size, rank=rank, world_size=world_size), self.num_workers
            )
        sampler = SortedBatchSampler(
            rows.lengths, batch_size, rank=rank, world_size=world_size, seen_lengths=rows.seen_lengths
        )
        return DataLoader(rows, sampler=sampler, batch_size=None, num_workers=self.num_workers)

    def _evaluation(self, split: Split, max_users: int | None) -> DataLoader[RankBatch]:
        rank, world_size = shard_of(self)
        return self.rank_dataloader(
            split, self.eval_batch_size, max_users=max_users, with_seen=True, rank=rank, world_size=world_size
        )
