"""What a domain's data module has loaded: source -> rules -> splits -> candidate lists."""

import copy
import hashlib
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from lightning_sfubm.assets import cache_dir
from lightning_sfubm.contracts import Catalogue, TextEncoder, TrainBatch, TrainHistories
from lightning_sfubm.datamodules.card import DataCard, dropped
from lightning_sfubm.datamodules.domain import Domain
from lightning_sfubm.datamodules.preprocess import PreprocessSettings
from lightning_sfubm.datamodules.readers.base import Reader
from lightning_sfubm.datamodules.splits import Splits, check_subsets, leave_one_out, retrained, train_counts
from lightning_sfubm.datamodules.storage import prepared_domain
from lightning_sfubm.errors import CheckpointError, ConfigError, DataError
from lightning_sfubm.evaluation.candidates import CandidateLists, CandidateSampler, stored_candidates, title_groups
from lightning_sfubm.names import path_part

T = TypeVar("T", bound="LoadedDomain")


class LoadedDomain(L.LightningDataModule, ABC):
    """One silo's data, to be prepared, split and given candidate lists. Nothing here reads another domain.

    Args:
        name: domain name.
        reader: where the data comes from.
        root: folder that the reader's relative paths start from.
        text_encoder: frozen encoder of the item texts, or ``None``.
        settings: rules of preparation.
        train_users: seeded subset of users whose sequences train and validate.
        num_candidates: C of validation and test.
        stage2_users: users whose last train positions are kept for stage 2.
        stage2_positions: positions held out per such user.
        seed: of split and candidates.

    Raises:
        ConfigError: a size is out of range.
    """

    def __init__(
        self,
        name: str,
        reader: Reader,
        root: str | None,
        text_encoder: TextEncoder | None,
        settings: PreprocessSettings,
        *,
        train_users: int | None,
        num_candidates: int,
        stage2_users: int | None,
        stage2_positions: int,
        seed: int,
    ) -> None:
        super().__init__()
        check_subsets(train_users=train_users, stage2_users=stage2_users)
        self.name: str = path_part(name, "a domain (init_args.name)")
        self.reader = reader
        self.root = root
        self.text_encoder = text_encoder
        self.settings = settings
        self.train_users = train_users
        self.num_candidates = num_candidates
        self.stage2_users = stage2_users
        self.stage2_positions = stage2_positions
        self.seed = seed
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

    def unloaded(self: T) -> T:
        """The same domain not yet set up, for another process, which then maps the prepared files."""
        twin = copy.copy(self)
        twin.trainer = None
        twin._domain = None
        twin._candidates = {}
        for name in ("_splits", "_groups", "_catalogue"):
            vars(twin).pop(name, None)
        return twin

    def without_holdout(self: T) -> T:
        """The same domain with no positions held out for stage 2, for methods that have no second stage."""
        twin = copy.copy(self)
        twin.trainer = None
        twin.stage2_positions = 0
        twin._domain = None
        twin._goes_on_elsewhere = False
        return twin

    def trained_by(self: T, users: np.ndarray) -> T:
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
    def text_names(self) -> list[bytes] | None:
        """By item a hash of its text and of what encodes it, whatever the last bits of its vector; ``None`` without text."""
        if self.text_encoder is None:
            return None
        encoder = getattr(self.text_encoder, "identity", self.text_encoder.fingerprint).encode()
        texts = (text.encode("utf-8", "surrogatepass") for text in self.domain.texts[1:])
        return [hashlib.blake2b(text, key=encoder[:64], digest_size=16).digest() for text in texts]

    @property
    def num_items(self) -> int:
        """N."""
        return self.domain.num_items

    @property
    def candidate_hash(self) -> dict[str, str]:
        """sha256 of the candidate lists of ``val`` and ``test``."""
        return {split: self._stored(split, self.num_candidates, self.domain).sha256 for split in ("val", "test")}

    @abstractmethod
    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """Batches of training sequences."""

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
