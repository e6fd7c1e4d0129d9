"""Aggregation of shared weights: the contract, what every aggregator does with its input, and FedAvg.

``current`` is the server's global weights, ``updates`` what the clients of a round sent. Every aggregator goes through
:func:`participating` first, so the rules are the same for all: clients in sorted order of name (the order of arrival cannot
matter, not even in the last bit), clients of weight 0 left out, updates that do not fit ``current`` refused whole, and a
round without an update leaves the weights as they were. Sums are in float64; the result has the dtypes of ``current``.

Server optimisers (FedAdam, FedYogi) are in :mod:`lightning_sfubm.federated.server_optimizers`, means that hold against
poisoned clients in :mod:`lightning_sfubm.federated.robust`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_sfubm.errors import CheckpointError, MessageError, SFUBMError


class TooFewClientsError(SFUBMError):
    """Fewer clients took part in a round than the aggregator needs; the round must leave the global weights as they are."""


@dataclass(frozen=True)
class ClientUpdate:
    """What one client sent.

    Attributes:
        weights: its shared parameters after local training, by name.
        weight: its say in weighted means, not negative: 1, or the number of its examples. 0 = nothing to say.
    """

    weights: Mapping[str, Tensor]
    weight: float = 1.0


@runtime_checkable
class WeightAggregator(Protocol):
    """Turns the clients' updates into the next global weights.

    Example:
        >>> one = {"w": torch.ones(2)}
        >>> FedAvg().aggregate({"w": torch.zeros(2)}, {"a": ClientUpdate(one)})["w"].tolist()
        [1.0, 1.0]
    """

    def check_clients(self, num_clients: int) -> None:
        """Raise :class:`~lightning_sfubm.errors.ConfigError` if a federation of this size can never be aggregated."""
        ...

    def aggregate(self, current: Mapping[str, Tensor], updates: Mapping[str, ClientUpdate]) -> dict[str, Tensor]:
        """The next global weights: new tensors with the names, shapes and dtypes of ``current``; no input is changed.

        Raises:
            MessageError: an update does not fit ``current``; state and weights stay as they were.
            TooFewClientsError: too few clients are left in this round; likewise.
        """
        ...

    def state_dict(self) -> dict[str, Tensor | float]:
        """What a resumed server needs: tensors and plain numbers by name."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor | float]) -> None:
        """Restore; raises :class:`~lightning_sfubm.errors.CheckpointError` on another aggregator's state."""
        ...


class StatelessAggregator:
    """Base of aggregators that keep nothing between rounds and take any number of clients."""

    def check_clients(self, num_clients: int) -> None:
        """Any number will do."""

    def state_dict(self) -> dict[str, Tensor | float]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor | float]) -> None:
        """Refuse any state but the empty one.

        Raises:
            CheckpointError: there is some.
        """
        if state:
            raise CheckpointError(
                f"{type(self).__name__} keeps no state, but the checkpoint has {sorted(state)[:3]}: resume with the same config"
            )


class FedAvg(StatelessAggregator):
    """The mean of the clients' weights, weighted by :attr:`ClientUpdate.weight` (McMahan et al., 2017).

    One client is the identity. The global weights themselves do not enter.
    """

    def aggregate(self, current: Mapping[str, Tensor], updates: Mapping[str, ClientUpdate]) -> dict[str, Tensor]:
        """See :class:`WeightAggregator`."""
        present = participating(current, updates)
        return like(current, weighted_mean(present) if present else current)


def participating(current: Mapping[str, Tensor], updates: Mapping[str, ClientUpdate]) -> dict[str, ClientUpdate]:
    """The updates that count, checked, in sorted order of client name.

    A client of weight 0 is dropped before its tensors are looked at: one without examples may well send NaN, the mean of
    nothing, and must not cost the others their round.

    Raises:
        MessageError: a weight is negative or not finite; names or shapes differ from ``current``; a tensor is not of a
            floating dtype or holds a value that is not finite.
    """
    shapes = {key: value.shape for key, value in current.items()}
    present = {}
    for name in sorted(updates):
        update = updates[name]
        if not (math.isfinite(update.weight) and update.weight >= 0):
            raise MessageError(f"client '{name}' has the weight {update.weight}, a finite number >= 0 is required")
        if update.weight == 0:
            continue
        if {key: value.shape for key, value in update.weights.items()} != shapes:
            different = [key for key in sorted({*shapes, *update.weights}) if _differs(key, current, update.weights)]
            raise MessageError(
                f"the parameters of client '{name}' differ from the global ones in name or shape: {different[:3]}"
            )
        for key, value in update.weights.items():
            if not value.is_floating_point() or not torch.isfinite(value).all():
                raise MessageError(f"parameter '{key}' of client '{name}' is not of finite floating-point numbers")
        present[name] = update
    return present


def _differs(key: str, current: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> bool:
    return key not in current or key not in sent or current[key].shape != sent[key].shape


def normalised_weights(present: Mapping[str, ClientUpdate]) -> dict[str, float]:
    """Each client's share of the sum of weights; the shares sum to 1. ``present`` is of :func:`participating`."""
    total = math.fsum(update.weight for update in present.values())
    return {name: update.weight / total for name, update in present.items()}


def weighted_mean(present: Mapping[str, ClientUpdate]) -> dict[str, Tensor]:
    """The weighted mean in float64, summed in the order of ``present``, of at least one client."""
    mean: dict[str, Tensor] = {}
    for name, share in normalised_weights(present).items():
        for key, value in present[name].weights.items():
            term = value.detach().double() * share
            mean[key] = mean[key] + term if key in mean else term
    return mean


def like(current: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New tensors with the given values, in the order and with the dtypes of ``current``."""
    return {key: values[key].detach().to(value.dtype, copy=True) for key, value in current.items()}
