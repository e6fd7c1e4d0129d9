"""The LightningDataModule of one domain: source -> rules -> splits -> candidate lists -> loaders."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from lightning_sfubm.assets import cache_dir
from lightning_sfubm.contracts import Catalogue, PredictBatch, RankBatch, TextEncoder, TrainBatch, TrainHistories
from lightning_sfubm.datamodules.batching import BucketBatchSampler, SortedBatchSampler, order_seed_of, shard_of
from lightning_sfubm.datamodules.card import DataCard, dropped
from lightning_sfubm.datamodules.domain import Domain
from lightning_sfubm.datamodules.preprocess import PreprocessSettings
from lightning_sfubm.datamodules.ranking import CompleteRows, FixedCandidates, RankRows, RedrawnCandidates
from lightning_sfubm.datamodules.readers.base import Reader
from lightning_sfubm.datamodules.sequences import TrainSequences, Windows
from lightning_sfubm.datamodules.splits import Splits, check_subsets, leave_one_out, retrained, train_counts
from lightning_sfubm.datamodules.storage import prepared_domain
from lightning_sfubm.errors import CheckpointError, ConfigError, DataError
from lightning_sfubm.evaluation.candidates import CandidateLists, CandidateSampler, stored_candidates, title_groups
from lightning_sfubm.names import path_part
from lightning_sfubm.seeds import numpy_generator

Split = Literal["train1", "train2", "val", "test"]


class DomainDataModule(L.LightningDataModule):
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
        super().__init__()
        check_subsets(train_users=train_users, stage2_users=stage2_users, max_eval_users=max_eval_users)
        self.name: str = path_part(name, "a domain (init_args.name)")
        self.reader = reader
        self.root = root
        self.text_encoder = text_encoder
        self.train_users = train_users
        self.max_length = max_length
        self.windows: Windows = windows
        self.batch_size = batch_size
        self.even_batches = even_batches
        self.eval_batch_size = eval_batch_size
        self.num_candidates = num_candidates
        self.stage2_users = stage2_users
        self.stage2_positions = stage2_positions
        self.max_eval_users = max_eval_users
        self.num_workers = num_workers
        self.seed = seed
        # Without a subset the seed does not touch the prepared domain: all seeds share one cache entry.
        subset_seed = seed if max_users is not None else 0
        self.settings = PreprocessSettings(k_core, user_range, max_users, subset_seed, user_fold, item_share)
        self._domain: Domain | None = None
        self._candidates: dict[tuple[str, int], CandidateLists] = {}
        self._goes_on_elsewhere = False  # whether weights were loaded that other or unknown positions have trained

    @property
    def drawn_by(self) -> tuple[str, ...]:
        """Settings that draw some users out of all of them: with one user more, quite other ones may be drawn."""
        drawn = {
            "max_users": self.settings.max_users,
            "train_users": self.train_users,
            "stage2_users": self.stage2_users if self.stage2_positions else None,
        }
        return tuple(name for name, count in drawn.items() if count is not None)

    def prepare_data(self) -> None:
        """Fill the caches (prepared domain, text vectors) in one process, before the others start."""
        domain = prepared_domain(self.reader, self._root(), self.name, self.settings)
        self._text_embeddings(domain)

    def setup(self, stage: str | None = None) -> None:
        """Map the prepared domain, split it, and draw or read the candidate lists. A second call does nothing."""
        if self._domain is not None:
            return
        domain = prepared_domain(self.reader, self._root(), self.name, self.settings)
        self._splits = leave_one_out(
            domain.offsets,
            self.stage2_positions,
            self.stage2_users,
            self.seed,
            domain.fingerprint,
            self.train_users,
        )
        if not len(self._splits.eval_users):
            raise DataError(
                f"domain '{self.name}': none of its {domain.num_users} users has the three interactions of which training, "
                "validation and test take one each"
            )
        self._groups = title_groups(domain.titles)
        self._catalogue = Catalogue(
            name=self.name,
            num_items=domain.num_items,
            titles=domain.titles,
            text_embeddings=self._text_embeddings(domain),
            train_counts=torch.from_numpy(train_counts(domain, self._splits)),
            histories=_histories(domain, self._splits),
            origin=_origin(domain, self._splits),
        )
        for split in ("val", "test"):
            self._stored(split, self.num_candidates, domain)
        self._domain = domain  # last: after an error the next call begins anew

    def source_fingerprint(self) -> str:
        """Hash of the content this domain is read from, before any filtering."""
        return self.reader.fingerprint(self._root())

    def unloaded(self) -> "DomainDataModule":
        """The same domain not yet set up, for another process, which then maps the prepared files."""
        twin = copy.copy(self)
        twin.trainer = None
        twin._domain = None
        twin._candidates = {}
        for name in ("_splits", "_groups", "_catalogue"):
            vars(twin).pop(name, None)
        return twin

    def without_holdout(self) -> "DomainDataModule":
        """The same domain with no positions held out for stage 2, for methods that have no second stage."""
        twin = copy.copy(self)
        twin.trainer = None
        twin.stage2_positions = 0
        twin._domain = None
        twin._goes_on_elsewhere = False
        return twin

    def trained_by(self, users: np.ndarray) -> "DomainDataModule":
        """The same domain with other users to train on, for shadow models of an audit.

        Args:
            users: (U,) bool.
        """
        twin = copy.copy(self)
        twin.trainer = None
        twin._splits = retrained(self.splits, users, self.stage2_positions)
        counts = torch.from_numpy(train_counts(self.domain, twin._splits))
        twin._catalogue = replace(
            self.catalogue,
            train_counts=counts,
            histories=_histories(self.domain, twin._splits),
            origin=_origin(self.domain, twin._splits),
        )
        twin._goes_on_elsewhere = False
        return twin

    @property
    def domain(self) -> Domain:
        """The prepared domain."""
        if self._domain is None:
            raise ConfigError(f"domain '{self.name}' is not loaded yet: call setup() first")
        return self._domain

    @property
    def splits(self) -> Splits:
        """Bounds of train, stage 2, validation and test."""
        _ = self.domain
        return self._splits

    @property
    def catalogue(self) -> Catalogue:
        """What a model may know of the items."""
        _ = self.domain
        return self._catalogue

    @property
    def data_card(self) -> DataCard:
        """Counts and statistics."""
        return self.domain.card

    @property
    def num_items(self) -> int:
        """N."""
        return self.domain.num_items

    @property
    def candidate_hash(self) -> dict[str, str]:
        """sha256 of the candidate lists of ``val`` and ``test``."""
        return {split: self._stored(split, self.num_candidates, self.domain).sha256 for split in ("val", "test")}

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
        return DataLoader(rows, sampler=sampler, batch_size=None, num_workers=self.num_workers)

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
        sampler: BucketBatchSampler | SortedBatchSampler
        if shuffle:
            order = next(given for given in (draws_seed, seed, self.seed) if given is not None)
            bucketed = partial(BucketBatchSampler, seed=order, name=f"{self.name} {split}", bucket_batches=20)
            sampler = bucketed(rows.lengths, batch_size, rank=rank, world_size=world_size)
        else:
            sampler = SortedBatchSampler(
                rows.lengths, batch_size, rank=rank, world_size=world_size, seen_lengths=rows.seen_lengths
            )
        return DataLoader(rows, sampler=sampler, batch_size=None, num_workers=self.num_workers)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must agree with: hashes of the data and, for an LLM that is to read it, of the training positions.

        Once weights of other positions, or of a file that names none, have been loaded, the second is left out: what is
        trained further on these positions has still seen those.
        """
        state = _origin(self.domain, self.splits)
        if self._goes_on_elsewhere:
            del state["train_positions"]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare a checkpoint's data with the data that is loaded. Training positions may differ, or be unknown.

        Raises:
            CheckpointError: item and user numbers of the checkpoint belong to other data.
        """
        if state_dict["fingerprint"] != self.domain.fingerprint:
            raise CheckpointError(
                f"the checkpoint was made on other data than domain '{self.name}' holds now (fingerprint "
                f"{state_dict['fingerprint'][:12]} there, {self.domain.fingerprint[:12]} here); use the data settings "
                "it was trained with"
            )
        self._goes_on_elsewhere = state_dict.get("train_positions") != self.splits.train_hash

    def _evaluation(self, split: Split, max_users: int | None) -> DataLoader[RankBatch]:
        rank, world_size = shard_of(self)
        return self.rank_dataloader(
            split, self.eval_batch_size, max_users=max_users, with_seen=True, rank=rank, world_size=world_size
        )

    def _sampler(self, domain: Domain, positions: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> CandidateSampler:
        lost = dropped(domain.card.rules)
        return CandidateSampler(self.name, domain.items[positions], domain.items, starts, ends, self._groups, lost)

    def _stored(self, split: str, num_candidates: int, domain: Domain) -> CandidateLists:
        """Lists of all users of a split; negatives lie outside the *complete* history, later items included."""
        if (split, num_candidates) not in self._candidates:
            splits = self._splits
            users = splits.eval_users
            positions = splits.val if split == "val" else splits.test
            self._candidates[split, num_candidates] = stored_candidates(
                cache_dir() / "candidates",
                partial(self._sampler, domain, positions, domain.offsets[users], domain.offsets[users + 1]),
                rows=len(users),
                fingerprint=domain.fingerprint,
                split=split,
                seed=self.seed,
                num_candidates=num_candidates,
            )
        return self._candidates[split, num_candidates]

    def _text_embeddings(self, domain: Domain) -> torch.Tensor | None:
        """(N + 1, D) unit vectors, row 0 zero."""
        if self.text_encoder is None:
            return None
        from lightning_sfubm.datamodules.text import encode_cached

        vectors = encode_cached(self.text_encoder, domain.texts[1:])
        return torch.cat([vectors.new_zeros(1, vectors.shape[1]), vectors])

    def _root(self) -> Path | None:
        return Path(self.root) if self.root is not None else None


def _histories(domain: Domain, splits: Splits) -> TrainHistories:
    return TrainHistories(domain.items, splits.train_start, splits.train_end)


def _origin(domain: Domain, splits: Splits) -> dict[str, str]:
    return {"fingerprint": domain.fingerprint, "train_positions": splits.train_hash}
