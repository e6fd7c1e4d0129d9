"""Settings of a secure sum, and floats as fixed-point words modulo 2^k.

A value x becomes the integer ``round(w x 2^f)`` (w the client's weight, f fractional bits) modulo 2^k. Sums of words
equal words of sums as long as no sum leaves ``[-2^(k-1), 2^(k-1))``; settings under which one could are refused, for the
largest number of clients, the largest weight and the largest value at once.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_sfubm.errors import ConfigError, MessageError

Words = NDArray[Any]  # little-endian unsigned integers of k bits, (W,)
_EXACT = 1 << 53  # integers up to here are exact in float64


@dataclass(frozen=True)
class SecAggSettings:
    """What all parties of a secure sum agree on beforehand.

    Attributes:
        num_clients: n, the most clients that may take part in a round, at least 2.
        threshold: t, clients that must stay to the end. More than n / 2 (and so at least 2), so that the shares of
            one client cannot be had by asking half of the others for one secret and half for the other. ``None``
            takes the smallest such number.
        clip: largest absolute value of an element.
        fractional_bits: f. Each element of the sum of m clients is exact to ``m 2^(-f-1)``, beside float64's rounding
            of ``w x``.
        max_weight: largest weight of a client.
        modulus_bits: k, 32 or 64, and the bits an element takes on the wire.
        saturate: bring values beyond ``clip`` to ``clip`` instead of refusing them.

    Raises:
        ConfigError: a setting is out of range, or a sum could wrap.
    """

    num_clients: int
    threshold: int | None = None
    clip: float = 16.0
    fractional_bits: int = 24
    max_weight: float = 1.0
    modulus_bits: int = 64
    saturate: bool = False

    def __post_init__(self) -> None:
        if self.num_clients < 2:
            raise ConfigError(
                f"secure aggregation: num_clients = {self.num_clients}, but the sum over one client is its own vector; "
                "at least 2 are needed"
            )
        if self.threshold is None:
            object.__setattr__(self, "threshold", self.num_clients // 2 + 1)
        if not self.num_clients < 2 * self.t <= 2 * self.num_clients:
            raise ConfigError(
                f"secure aggregation: threshold = {self.t} of {self.num_clients} clients; it must be more than half of "
                "them and at most all"
            )
        if self.modulus_bits not in (32, 64):
            raise ConfigError(f"secure aggregation: modulus_bits = {self.modulus_bits}, 32 or 64 are possible")
        if not 0 <= self.fractional_bits <= 52:
            raise ConfigError(f"secure aggregation: fractional_bits = {self.fractional_bits} is not within 0 to 52")
        for name, value in (("clip", self.clip), ("max_weight", self.max_weight)):
            if not 0 < value <= _EXACT:  # false for NaN too
                raise ConfigError(f"secure aggregation: {name} = {value} must be positive and at most 2^53")
        if self.bound > _EXACT or self.num_clients * self.bound >= 1 << (self.modulus_bits - 1):
            raise ConfigError(
                f"secure aggregation: {self.num_clients} clients with values up to {self.clip:g}, weights up to "
                f"{self.max_weight:g} and {self.fractional_bits} fractional bits could wrap a sum modulo "
                f"2^{self.modulus_bits} (or pass 2^53 alone): lower clip, max_weight or fractional_bits, or raise "
                "modulus_bits"
            )

    @property
    def t(self) -> int:
        """The threshold as a number."""
        assert self.threshold is not None
        return self.threshold

    @property
    def bound(self) -> int:
        """Largest absolute value of one client's word, read as a signed integer."""
        return math.ceil(max(self.clip, 1.0) * self.max_weight * 2.0**self.fractional_bits)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The word on the wire; its arithmetic is the arithmetic modulo 2^k."""
        return np.dtype("<u4" if self.modulus_bits == 32 else "<u8")


Shapes = Mapping[str, tuple[int, ...]]


def num_words(shapes: Shapes) -> int:
    """W: one word an element, and one for the weight."""
    return 1 + sum(math.prod(shape) for shape in shapes.values())


def agreement(settings: SecAggSettings, shapes: Shapes) -> bytes:
    """SHA-256 of everything the parties must agree on: settings, tensor names and shapes."""
    terms = [asdict(settings), {name: list(shapes[name]) for name in sorted(shapes)}]
    return hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).digest()


def encode(tensors: Mapping[str, Tensor], weight: float, shapes: Shapes, settings: SecAggSettings) -> Words:
    """Weighted tensors, flattened in sorted order of name, and the weight, as words (W,).

    Raises:
        MessageError: names, shapes or dtypes differ from the agreed ones, or a value or weight is out of range.
    """
    if set(tensors) != set(shapes):
        raise MessageError(f"a secure sum over tensors {sorted(shapes)[:5]} was given {sorted(tensors)[:5]}")
    if not 0 <= weight <= settings.max_weight:  # false for NaN too
        raise MessageError(f"the weight {weight} of a secure sum is not within 0 to {settings.max_weight:g}")
    scale = 2.0**settings.fractional_bits
    parts = []
    for name in sorted(shapes):
        tensor = tensors[name].detach()
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise MessageError(f"tensor '{name}' has shape {tuple(tensor.shape)}, {tuple(shapes[name])} was agreed on")
        if not tensor.dtype.is_floating_point:
            raise MessageError(f"tensor '{name}' has dtype {tensor.dtype}, a secure sum takes floats")
        values = tensor.to("cpu", torch.float64).flatten()
        if not torch.isfinite(values).all():
            raise MessageError(f"tensor '{name}' holds NaN or infinite values")
        if settings.saturate:
            values = values.clamp(-settings.clip, settings.clip)
        elif values.numel() and float(values.abs().max()) > settings.clip:
            raise MessageError(
                f"tensor '{name}' holds a value beyond the clip range +-{settings.clip:g} of this secure sum: raise "
                "clip, or set saturate"
            )
        parts.append((values * weight * scale).round().to(torch.int64))
    parts.append(torch.tensor([round(weight * scale)], dtype=torch.int64))
    return torch.cat(parts).numpy().astype(settings.dtype)


def decode(words: Words, clients: int, shapes: Shapes, settings: SecAggSettings) -> tuple[dict[str, Tensor], float]:
    """The inverse of :func:`encode` for the sum of ``clients`` vectors: float64 tensors and the sum of weights.

    Raises:
        MessageError: the sum is larger than that many clients could have made it, so a mask is still on it.
    """
    signed = torch.from_numpy(words.view(words.dtype.str.replace("u", "i")).astype(np.int64))
    if int(signed.max()) > clients * settings.bound or int(signed.min()) < -clients * settings.bound:
        raise MessageError(
            f"the unmasked sum is beyond what {clients} clients can send: a masked input was not made by the protocol"
        )
    values = signed.to(torch.float64) / 2.0**settings.fractional_bits
    names = sorted(shapes)
    parts = values.split([*(math.prod(shapes[name]) for name in names), 1])
    tensors = {name: part.reshape(shapes[name]).clone() for name, part in zip(names, parts, strict=False)}
    return tensors, float(parts[-1])
