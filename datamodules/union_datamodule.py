"""All domains in one training set: for the upper bound that breaks privacy, never for a federation."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_sfubm.contracts import Catalogue, RankBatch, TrainBatch
from lightning_sfubm.datamodules.batching import BatchIndex, BucketBatchSampler, ResumableLoader, SortedBatchSampler
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule, shard_of
from lightning_sfubm.datamodules.ranking import RankRows
from lightning_sfubm.datamodules.sequences import TrainSequences
from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.seeds import numpy_generator

ITEM_KEYS = ("history", "target", "candidates", "seen")


class UnionBatch(TrainBatch):
    """Training sequences of several domains; item ids and user rows count through the domains in order."""

    domain: Tensor  #: (B,) int64 number of the row's domain


class UnionDataModule(L.LightningDataModule):
    """Domains as if one organisation held them all: one catalogue, and batches that mix their users.

    This is what a federation must avoid: sequences of all domains lie side by side. It serves methods that pre-train on the
    union, as a bound on what sharing could give. Domains are numbered in the order of their names; item i of a domain is
    item ``i + offset`` of the union. There are training and validation batches, and no test batches: a method is tested
    on each domain by the domain's own data module. Batches are even, as ``even_batches`` of a domain says, where those of all
    domains are.

    Run it under ``Trainer(use_distributed_sampler=False)``: the batch samplers shard by rank themselves.

    Args:
        domains: data module by domain name, all with the same text encoder.
        batch_size: training sequences a batch.
        word_drop: chance that a word is missing from the text behind :attr:`masked_text`; 0 = no such vectors.
        num_workers: worker processes of each loader; batches do not depend on it.
        seed: of order and dropped words.

    Raises:
        ConfigError: if there is no domain, a name differs from its key, a domain has no text encoder or another one, or
            ``word_drop`` lies outside [0, 1).
    """

    def __init__(
        self,
        domains: dict[str, DomainDataModule],
        batch_size: int = 256,
        word_drop: float = 0.15,
        num_workers: int = 0,
        seed: int = 1,
    ) -> None:
        super().__init__()
        if not domains:
            raise ConfigError("a union needs at least one domain")
        if not 0 <= word_drop < 1:
            raise ConfigError(f"word_drop must lie in [0, 1), not {word_drop}")
        self.domains = {name: domains[name] for name in sorted(domains)}
        for name, domain in self.domains.items():
            if domain.name != name:
                raise ConfigError(f"domain '{domain.name}' stands under the name '{name}'; give both the same name")
            if domain.text_encoder is None:
                raise ConfigError(f"domain '{name}' has no text encoder, and only text means the same in all domains")
        encoders = {domain.text_encoder.fingerprint for domain in self.domains.values() if domain.text_encoder}
        if len(encoders) > 1:
            raise ConfigError(f"the domains {', '.join(self.domains)} must have the same text encoder")
        self.batch_size = batch_size
        self.word_drop = word_drop
        self.num_workers = num_workers
        self.seed = seed
        self._catalogue: Catalogue | None = None
        self._masked_text: Tensor | None = None

    def prepare_data(self) -> None:
        """Fill the caches of every domain and of the texts with dropped words, in one process."""
        for domain in self.domains.values():
            domain.prepare_data()
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Set up every domain and join the catalogues. A second call does nothing."""
        if self._catalogue is not None:
            return
        parts = []
        for domain in self.domains.values():
            domain.setup(stage)
            parts.append(domain.catalogue)
        self.item_offsets = _offsets([part.num_items for part in parts])
        self.user_offsets = _offsets([domain.domain.num_users for domain in self.domains.values()])
        if self.word_drop:
            self._masked_text = _join([self._encode_masked(domain) for domain in self.domains.values()])
        self._catalogue = Catalogue(
            name="+".join(self.domains),
            num_items=sum(part.num_items for part in parts),
            titles=["", *(title for part in parts for title in part.titles[1:])],
            text_embeddings=_join([part.text_embeddings[1:] for part in parts if part.text_embeddings is not None]),
            train_counts=_join([part.train_counts[1:] for part in parts]),
        )

    @property
    def catalogue(self) -> Catalogue:
        """The items of all domains."""
        if self._catalogue is None:
            raise ConfigError("the union of the domains is not loaded yet: call setup() first")
        return self._catalogue

    @property
    def masked_text(self) -> Tensor | None:
        """(N + 1, D) unit vectors of the item texts with words dropped, drawn once; ``None`` where nothing is dropped."""
        _ = self.catalogue
        return self._masked_text

    def train_dataloader(self) -> DataLoader[TrainBatch]:
        """Batches (:class:`UnionBatch`) in which every domain has its share, bucketed by length, order seeded by epoch."""
        _ = self.catalogue
        parts = [TrainSequences(d.domain, d.splits, d.max_length, d.windows) for d in self.domains.values()]
        rows = UnionSequences(parts, self.item_offsets, self.user_offsets)
        rank, world_size = shard_of(self)
        sampler = UnionBatchSampler(
            rows.lengths,
            rows.domains,
            self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            even=all(domain.even_batches for domain in self.domains.values()),
        )
        return ResumableLoader(rows, sampler, self.num_workers)

    def val_dataloader(self) -> DataLoader[RankBatch]:
        """The stored validation lists of every domain, one domain after the other."""
        _ = self.catalogue
        rank, world_size = shard_of(self)
        parts = [d.rank_rows("val", max_users=d.max_eval_users, with_seen=True) for d in self.domains.values()]
        samplers = [
            SortedBatchSampler(
                part.lengths,
                domain.eval_batch_size,
                rank=rank,
                world_size=world_size,
                seen_lengths=part.seen_lengths,
            )
            for part, domain in zip(parts, self.domains.values(), strict=True)
        ]
        rows = _UnionRankRows(parts, self.item_offsets, self.user_offsets)
        return DataLoader(rows, sampler=_InTurn(samplers), batch_size=None, num_workers=self.num_workers)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must agree with: the fingerprint of every domain."""
        return {name: domain.state_dict() for name, domain in self.domains.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare a checkpoint's data with the data that is loaded.

        Raises:
            CheckpointError: the checkpoint was made on other domains or other data.
        """
        if state_dict.keys() != self.domains.keys():
            raise CheckpointError(
                f"the checkpoint was made on the union of {sorted(state_dict)}, this is the union of {list(self.domains)}"
            )
        for name, domain in self.domains.items():
            domain.load_state_dict(state_dict[name])

    def _encode_masked(self, domain: DomainDataModule) -> Tensor:
        """(N, D) vectors of a domain's texts with words dropped."""
        from lightning_sfubm.datamodules.text import encode_cached

        assert domain.text_encoder is not None
        generator = numpy_generator(self.seed, "word drop", domain.domain.fingerprint)
        return encode_cached(domain.text_encoder, drop_words(domain.domain.texts[1:], self.word_drop, generator))


def drop_words(texts: list[str], probability: float, generator: np.random.Generator) -> list[str]:
    """Leave out each word of each text with a probability; a text that would lose all its words stays whole."""
    masked = []
    for text in texts:
        words = text.split()
        kept = [word for word, draw in zip(words, generator.random(len(words)), strict=True) if draw >= probability]
        masked.append(" ".join(kept) if kept else text)
    return masked


class UnionSequences(TrainSequences):
    """The training rows of several domains in one numbering.

    Args:
        parts: rows of each domain.
        item_offsets: (K,) what is added to a domain's item ids.
        user_offsets: (K,) what is added to a domain's user rows.

    Attributes:
        domains: (R,) int64 number of each row's domain; the others as in :class:`TrainSequences`.
    """

    def __init__(self, parts: list[TrainSequences], item_offsets: np.ndarray, user_offsets: np.ndarray) -> None:
        shifts = _offsets([len(part.items) for part in parts])
        self.items = np.concatenate([part.items + by for part, by in zip(parts, item_offsets, strict=True)])
        self.users = np.concatenate([part.users + by for part, by in zip(parts, user_offsets, strict=True)])
        self.starts = np.concatenate([part.starts + by for part, by in zip(parts, shifts, strict=True)])
        self.ends = np.concatenate([part.ends + by for part, by in zip(parts, shifts, strict=True)])
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.domains = np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    def batch(self, rows: np.ndarray) -> UnionBatch:
        """The padded batch of some rows."""
        return {**super().batch(rows), "domain": torch.from_numpy(self.domains[rows])}


class UnionBatchSampler(BucketBatchSampler):
    """Batches that hold the domains in the proportion of their sizes, whatever the lengths of their sequences.

    Sorted by length alone, the rows of a domain with longer sequences would end up in batches of their own and meet no
    negatives of the other domains. So rows are sorted by the quantile of their length within their own domain: rows of
    about equal length where the domains are alike, at the price of padding where they are not.

    Args:
        lengths: (n,) length of each row.
        domains: (n,) domain of each row.
        batch_size: rows per rank.
        seed: root seed.
        rank: of this process.
        world_size: number of processes.
        bucket_batches: batches a bucket.
        even: batches of about equal total length, as in :class:`BucketBatchSampler`.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        domains: np.ndarray,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        bucket_batches: int = 50,
        even: bool = False,
    ) -> None:
        super().__init__(
            lengths,
            batch_size,
            seed=seed,
            name="union",
            rank=rank,
            world_size=world_size,
            bucket_batches=bucket_batches,
            even=even,
        )
        self._domains = np.asarray(domains)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; rows of equal length take new places among each other."""
        super().set_epoch(epoch)
        ties = numpy_generator(self.seed, "union ties", epoch).random(len(self.lengths))
        order = np.lexsort((ties, self.lengths, self._domains))
        sizes = np.bincount(self._domains)
        places = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        self.sort_keys = np.empty(len(order))
        self.sort_keys[order] = (places + 0.5) / np.repeat(sizes, sizes)


class _UnionIndex(NamedTuple):
    """Rows of one domain."""

    domain: int
    batch: BatchIndex


class _InTurn(Sampler[_UnionIndex]):
    """The batches of one sampler after those of the other."""

    def __init__(self, samplers: list[SortedBatchSampler]) -> None:
        self.samplers = samplers

    def __len__(self) -> int:
        return sum(map(len, self.samplers))

    def __iter__(self) -> Iterator[_UnionIndex]:
        return (_UnionIndex(number, index) for number, sampler in enumerate(self.samplers) for index in sampler)


class _UnionRankRows(Dataset[RankBatch]):
    """Ranking rows of several domains in the union's numbering."""

    def __init__(self, parts: list[RankRows], item_offsets: np.ndarray, user_offsets: np.ndarray) -> None:
        self.parts, self.item_offsets, self.user_offsets = parts, item_offsets, user_offsets

    def __getitem__(self, index: _UnionIndex) -> RankBatch:
        batch: dict[str, Tensor] = dict(self.parts[index.domain][index.batch])  # type: ignore[arg-type]
        by = int(self.item_offsets[index.domain])
        moved = {key: torch.where(batch[key] > 0, batch[key] + by, 0) for key in ITEM_KEYS}
        user = batch["user"] + int(self.user_offsets[index.domain])
        return {**batch, **moved, "user": user}  # type: ignore[typeddict-item]


def _offsets(sizes: list[int]) -> np.ndarray:
    """Where each part starts in the concatenation."""
    return np.cumsum([0, *sizes[:-1]])


def _join(parts: list[Tensor]) -> Tensor:
    """Rows of all parts behind one zero row."""
    return torch.cat([parts[0].new_zeros(1, *parts[0].shape[1:]), *parts])
