"""The server: a state, and a function from messages to answers. It sees messages and nothing else."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_sfubm.errors import CheckpointError, MessageError
from lightning_sfubm.federated.aggregation import SemanticAggregator
from lightning_sfubm.federated.messages import (
    MAX_ITEMS,
    Message,
    MessageSchema,
    ReplayGuard,
    pack,
    semantics_schema,
    teacher_schema,
    unpack,
)
from lightning_sfubm.federated.weights import ClientUpdate, WeightAggregator

SERVER = "server"


class Server:
    """Aggregates item semantics and teacher weights.

    Args:
        aggregator: of item semantics.
        dim: D, the text-embedding dimension all clients agreed on.
        teacher: the shared parameters that all clients start from; ``None`` where the teacher is not exchanged.
        weights: aggregator of the shared parameters.
        weighting: ``"uniform"``, or ``"examples"``, which needs every client to disclose its number of examples.
        max_items: bound on the items a client may send vectors of.
    """

    def __init__(
        self,
        aggregator: SemanticAggregator,
        dim: int,
        teacher: Mapping[str, Tensor] | None,
        weights: WeightAggregator,
        weighting: str = "uniform",
        max_items: int = MAX_ITEMS,
    ) -> None:
        self.aggregator, self.weights = aggregator, weights
        self.semantics = semantics_schema(dim, max_items)
        self.teacher: MessageSchema | None = None
        self.broadcast_schema: MessageSchema | None = None
        if teacher is not None:
            self.teacher = teacher_schema(teacher, with_weight=weighting == "examples")
            self.broadcast_schema = teacher_schema(teacher, with_weight=False)
        self.global_teacher: dict[str, Tensor] = {k: v.detach().clone() for k, v in (teacher or {}).items()}
        self.version = 0  #: round whose updates the global teacher holds; 0 = none, it is what all clients start from
        self.guard = ReplayGuard()

    def aggregate_semantics(self, round: int, payloads: Mapping[str, bytes]) -> dict[str, Message]:
        """Answers by client; a client without an answer keeps its own vectors. Nothing of the uploads is kept."""
        messages = self._open(self.semantics, round, payloads)
        uploads = {client: normalize(message.tensors["vectors"], dim=1) for client, message in messages.items()}
        views = self.aggregator.aggregate(uploads)
        return {name: pack(self.semantics, SERVER, round, {"vectors": view}) for name, view in sorted(views.items())}

    def aggregate_teacher(self, round: int, payloads: Mapping[str, bytes]) -> bool:
        """Aggregate the updates of a round into the global teacher.

        Returns:
            Whether it changed; it stays as it was where nothing that counts arrived.

        Raises:
            MessageError: a message is refused; then none of the round's messages changes the global state.
        """
        if self.teacher is None:
            raise MessageError("this server does not exchange teacher weights, and a client sent some")
        updates = {}
        for client, message in self._open(self.teacher, round, payloads).items():
            tensors = dict(message.tensors)
            weight = tensors.pop("__weight__", None)
            updates[client] = ClientUpdate(tensors, 1.0 if weight is None else float(weight))
        if not any(update.weight > 0 for update in updates.values()):
            return False
        self.global_teacher = self.weights.aggregate(self.global_teacher, updates)
        self.version = round
        return True

    def _open(self, schema: MessageSchema, round: int, payloads: Mapping[str, bytes]) -> dict[str, Message]:
        """All messages of a round, or none: after a refusal the others may be given again without the refused one."""
        before, messages = self.guard.state_dict(), {}
        try:
            for client in sorted(payloads):
                messages[client] = unpack(schema, payloads[client])
                self.guard.accept(messages[client], round, client)
        except MessageError:
            self.guard.load_state_dict(before)
            raise
        return messages

    def take_mean(self, round: int, mean: Mapping[str, Tensor]) -> None:
        """Aggregate the mean that secure aggregation gave, in the place of the updates it is made of.

        Raises:
            MessageError: it does not fit the teacher.
        """
        self.global_teacher = self.weights.aggregate(self.global_teacher, {"mean": ClientUpdate(dict(mean))})
        self.version = round

    def broadcast(self) -> Message:
        """The global teacher as a message to one client."""
        if self.broadcast_schema is None:
            raise MessageError("this server has no teacher to send")
        return pack(self.broadcast_schema, SERVER, self.version, self.global_teacher)

    def state_dict(self) -> dict[str, object]:
        """Everything a resumed server needs."""
        return {
            "global_teacher": dict(self.global_teacher),
            "version": self.version,
            "weights": self.weights.state_dict(),
            "guard": self.guard.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; refuses a teacher of other names or shapes."""
        teacher: dict[str, Tensor] = dict(state["global_teacher"])
        if teacher and (
            self.broadcast_schema is None
            or {k: tuple(v.shape) for k, v in teacher.items()}
            != {k: v.shape for k, v in self.broadcast_schema.tensors.items()}
        ):
            raise CheckpointError(
                "the checkpoint's shared teacher does not fit this model: resume with the same config"
            )
        self.global_teacher = {k: torch.as_tensor(v) for k, v in teacher.items()}
        self.version = int(state["version"])
        self.weights.load_state_dict(state["weights"])
        self.guard.load_state_dict(state["guard"])
