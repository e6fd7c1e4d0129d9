"""Hooks of the federated loop. A :class:`FederatedCallback` is a Lightning callback with more hooks.

Give them to the trainer like any callback (``trainer.callbacks``). Inside a client's local training only Lightning's own
hooks run, on callbacks that are not federated ones.
"""

from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_sfubm.errors import SFUBMError

if TYPE_CHECKING:
    from lightning_sfubm.federated.loop import FederatedLoop


class ClientDropped(SFUBMError):
    """A client is not there, or its message did not arrive in time. Raised by a hook; the round goes on without it."""


class FederatedCallback(Callback):
    """Base class; override what is needed.

    Attributes:
        protects: kinds of messages this callback perturbs before they leave. The loop refuses to upload item semantics
            unless some callback protects them.
    """

    protects: frozenset[str] = frozenset()

    def on_round_start(self, loop: "FederatedLoop", round: int) -> None:
        """Before the clients of a round start; rounds count from 1."""

    def on_client_start(self, loop: "FederatedLoop", client: str, round: int) -> None:
        """Before a client trains in a round. Raise :class:`ClientDropped` where it does not take part after all."""

    def on_upload(self, loop: "FederatedLoop", client: str, kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Transform what a client is about to send. Called before packing; the result is what leaves.

        Raise :class:`ClientDropped` where it does not arrive.
        """
        return tensors

    def on_aggregate(self, loop: "FederatedLoop", round: int) -> None:
        """After the server has aggregated and every client has received its answer."""

    def on_round_end(self, loop: "FederatedLoop", round: int, metrics: dict[str, dict[str, float]]) -> None:
        """After a round; ``metrics`` holds each client's validation metrics and what its training has spent of privacy."""

    def on_phase_end(self, loop: "FederatedLoop", client: str, phase: str, best: float) -> None:
        """After a client's local phase; ``best`` is the best value of the monitored validation metric."""

    def describe_upload(self, kind: str) -> dict[str, object]:
        """Mechanism applied to messages of this kind, for the ledger; empty where there is none."""
        return {}
