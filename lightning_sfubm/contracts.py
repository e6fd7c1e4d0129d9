"""The contracts between the parts: read this file first.

Letters of shapes, used in every docstring:

    B  users (or samples) in a batch        L  history length, left-padded        N  items of a domain
    D  text-embedding dim                   H  encoder hidden dim                 C  candidates
    K  domains (clients)                    R  federated rounds                   d  hidden dim of the LLM
    F  affinity features of a candidate     S  length of a complete history       V  valid (unpadded) positions

Item ids of a domain are ``1..N``; ``0`` is padding. Item tables have ``N + 1`` rows, row 0 is the padding row.
"""

from dataclasses import dataclass, field
from typing import Protocol, TypedDict, runtime_checkable

import numpy as np
from torch import Tensor
from typing_extensions import NotRequired


class TrainBatch(TypedDict):
    """Next-item training on whole sequences (stage 1). Batches are length-bucketed: L is the longest row, not the cap."""

    history: Tensor  #: (B, L) int64 item ids, left-padded with 0
    targets: Tensor  #: (B, L) int64, the item that followed each position; 0 where nothing is to be predicted
    user: Tensor  #: (B,) int64 row of the user in the domain


class RankBatch(TypedDict):
    """One prediction per row, among candidates: validation, test, and training samples of stage 2."""

    history: Tensor  #: (B, L) int64, left-padded with 0, newest item last
    target: Tensor  #: (B,) int64, the item that followed
    candidates: Tensor  #: (B, C) int64, pairwise distinct, the target among them
    target_index: Tensor  #: (B,) int64 position of the target in ``candidates``
    user: Tensor  #: (B,) int64 row of the user in the domain
    seen: NotRequired[Tensor]  #: (B, S) int64, padded with 0: complete known history, to be masked in full rankings


class PredictBatch(TypedDict):
    """What users have done up to now, for recommendations; what follows is not known."""

    history: Tensor  #: (B, L) int64, left-padded with 0, newest item last
    user: Tensor  #: (B,) int64 row of the user in the domain
    seen: Tensor  #: (B, S) int64, padded with 0: all items of the user, not to be recommended


@dataclass(frozen=True)
class TrainHistories:
    """The training part of every user's sequence: of user u the positions ``starts[u]`` to ``ends[u] - 1``.

    Attributes:
        items: (M,) integer ids of all sequences, one after the other; what lies outside the bounds is not for training.
        starts: (U,) int64.
        ends: (U,) int64.
    """

    items: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class Catalogue:
    """What a model may know of a domain's items. Built from training data only.

    Attributes:
        name: domain name.
        num_items: N.
        titles: N + 1 strings, ``titles[0] == ""``.
        text_embeddings: (N + 1, D) float32, unit rows, row 0 zero; ``None`` where no text encoder is configured.
        train_counts: (N + 1,) int64 training interactions per item.
        histories: training sequences, where they are of one domain; they stay in the process that trains.
        origin: what a checkpoint that was trained on these data says of them (``DomainDataModule.state_dict``): hashes of
            the data and of the positions that train stage 1. ``None`` where nobody says.
    """

    name: str
    num_items: int
    titles: list[str] = field(repr=False)
    text_embeddings: Tensor | None = field(repr=False)
    train_counts: Tensor = field(repr=False)
    histories: TrainHistories | None = field(default=None, repr=False)
    origin: dict[str, str] | None = field(default=None, repr=False)


@runtime_checkable
class Encoder(Protocol):
    """A sequence encoder: any ``nn.Module`` with this forward is a plug-in.

    Contract (tested for every encoder by one suite): causal, later items never change earlier states; adding left
    padding never changes the states of real positions; the states of padded positions are finite.

    Example:
        >>> states = encoder(item_embeddings, mask)        # (B, L, H)
        >>> user_state = states[:, -1]                     # left padding: the last position is the newest item
    """

    hidden_dim: int

    def __call__(self, item_embeddings: Tensor, mask: Tensor) -> Tensor:
        """Map item embeddings (B, L, H) and a boolean mask (B, L), True = real item, to states (B, L, H)."""
        ...


@runtime_checkable
class Ranker(Protocol):
    """Anything that scores candidates; the evaluation runs every method through this one method."""

    def rank(self, batch: RankBatch) -> Tensor:
        """Scores (B, C), higher is better."""
        ...


@runtime_checkable
class CatalogueRanker(Ranker, Protocol):
    """A ranker that can also score the whole catalogue."""

    def score_all(self, batch: RankBatch) -> Tensor:
        """Scores (B, N + 1); column 0 (padding) is ignored."""
        ...


class Stage1(Protocol):
    """What stage 2 reads from a trained, frozen stage-1 module.

    Affinity features are raw scores of each candidate (the encoder's logit, text similarities ...), one column each,
    named by ``affinity_names``; stage 2 standardises them within a row.
    """

    hidden_dim: int

    @property
    def affinity_names(self) -> tuple[str, ...]:
        """Names of the columns of :meth:`affinities`."""
        ...

    def user_states(self, batch: RankBatch) -> Tensor:
        """(B, H) state after the newest item."""
        ...

    def item_tables(self) -> tuple[Tensor, Tensor]:
        """ID embeddings e (N + 1, H) and domain-agnostic semantic embeddings z (N + 1, H)."""
        ...

    def affinities(self, batch: RankBatch) -> Tensor:
        """(B, C, F) raw affinity features, first column the stage-1 score itself."""
        ...


@runtime_checkable
class FederatedModule(Protocol):
    """What the federated loop needs of a client's LightningModule. ID tables and ID encoders never pass through here.

    An attribute ``semantics_of_texts = True`` says that :meth:`semantics` holds nothing that was trained. Without it the
    privacy report takes item vectors sent after training began for users' data.
    """

    def semantics(self) -> Tensor:
        """(N, D) unit text vectors of this domain's items, unperturbed; a callback perturbs them before upload."""
        ...

    def receive_semantics(self, vectors: Tensor) -> None:
        """Take the aggregated vectors (N, D), rows in the order of :meth:`semantics`."""
        ...

    def shared_state(self) -> dict[str, Tensor]:
        """Detached copies of the parameters that may be federated (the semantic teacher)."""
        ...

    def load_shared_state(self, state: dict[str, Tensor]) -> None:
        """Replace the federated parameters; keys and shapes must match."""
        ...

    def set_phase(self, phase: str) -> None:
        """Choose what the next local epochs train; the names are the module's own (see ``local_phases``)."""
        ...

    @property
    def local_phases(self) -> tuple[str, ...]:
        """Phases after the rounds, each trained to early stopping on validation, in order."""
        ...

    @property
    def round_phase(self) -> str:
        """The phase trained during the federated rounds."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """Frozen text encoder: unit vectors for texts."""

    dim: int
    fingerprint: str  #: changes whenever the vectors would (model, pooling, precision, length limit)

    def encode(self, texts: list[str]) -> Tensor:
        """(len(texts), D) float32 unit rows."""
        ...
