"""What travels between a silo and the server: safetensors with a schema, checked before a single tensor is used.

A message is a safetensors byte string whose header carries five fields (version, kind, client, round, nonce) and whose
body holds exactly the tensors its :class:`MessageSchema` lists. There is no field for user ids, item ids, text or
counts, so none can be sent by mistake; whatever does not fit is refused whole with a :class:`MessageError`.
"""

import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors.torch import load as _load
from safetensors.torch import save as _save
from torch import Tensor

from lightning_sfubm.errors import MessageError

VERSION = "1"
MAX_HEADER_BYTES = 1 << 20
MAX_ITEMS = 1_000_000  #: items of a silo where ``trainer.federation.max_items`` says nothing else
_FIELDS = {"version", "kind", "client", "round", "nonce"}
_TENSOR_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorSchema:
    """Shape and bounds of one float32 tensor.

    Attributes:
        shape: sizes; ``None`` leaves a dimension free.
        max_rows: upper bound of the first dimension where it is free.
        setting: name of the setting that the bound comes from, for errors.
        max_abs: largest absolute value accepted.
        nonnegative: values below 0 are refused.
        unit_rows: rows must have L2 norm 1 (to 1e-3).
    """

    shape: tuple[int | None, ...]
    max_rows: int = MAX_ITEMS
    setting: str = ""
    max_abs: float = 1e4
    nonnegative: bool = False
    unit_rows: bool = False

    def check(self, name: str, tensor: Tensor) -> None:
        """Raise :class:`MessageError` unless ``tensor`` fits."""
        if tensor.dtype != torch.float32:
            raise MessageError(f"tensor '{name}' has dtype {tensor.dtype}, float32 is required")
        fits = len(tensor.shape) == len(self.shape) and all(
            want is None or want == have for want, have in zip(self.shape, tensor.shape, strict=True)
        )
        if not fits:
            want = tuple("any" if s is None else s for s in self.shape)
            raise MessageError(f"tensor '{name}' has shape {tuple(tensor.shape)}, {want} is required")
        if self.shape and self.shape[0] is None and tensor.shape[0] > self.max_rows:
            raise MessageError(
                f"tensor '{name}' has {tensor.shape[0]} rows, at most {self.max_rows} are accepted{self.way_out}"
            )
        if tensor.numel() == 0:
            raise MessageError(f"tensor '{name}' is empty")
        if not torch.isfinite(tensor).all():
            raise MessageError(f"tensor '{name}' holds NaN or infinite values")
        if float(tensor.abs().max()) > self.max_abs:
            raise MessageError(f"tensor '{name}' holds a value beyond +-{self.max_abs:g}")
        if self.nonnegative and float(tensor.min()) < 0:
            raise MessageError(f"tensor '{name}' holds a negative value")
        if self.unit_rows and float((tensor.norm(dim=-1) - 1).abs().max()) > 1e-3:
            raise MessageError(f"tensor '{name}' must hold unit vectors")

    @property
    def way_out(self) -> str:
        """Where the bound of rows is set, to end an error with; empty where it is not a setting."""
        return f" ({self.setting} = {self.max_rows}: raise it where a silo has more)" if self.setting else ""


@dataclass(frozen=True)
class MessageSchema:
    """The one form a kind of message may take.

    Attributes:
        kind: name of the kind, for instance ``"semantics"``.
        tensors: name -> :class:`TensorSchema`; exactly these names must be present.
    """

    kind: str
    tensors: Mapping[str, TensorSchema]

    @property
    def max_bytes(self) -> int:
        """Size limit applied before parsing."""
        total = 0
        for schema in self.tensors.values():
            sizes = [schema.max_rows if s is None else s for s in schema.shape]
            total += 4 * math.prod(sizes)
        return total + MAX_HEADER_BYTES + 8


def semantics_schema(dim: int, max_items: int = MAX_ITEMS) -> MessageSchema:
    """Item semantics: unit vectors (N, D) in a client-private order, nothing else; N is at most ``max_items``.

    That bounds the size of a message before it is parsed: 4 D bytes an item, 1.5 GB for a million items of 384 dimensions.
    """
    vectors = TensorSchema((None, dim), max_rows=max_items, setting="trainer.federation.max_items", unit_rows=True)
    return MessageSchema("semantics", {"vectors": vectors})


def teacher_schema(template: Mapping[str, Tensor], with_weight: bool) -> MessageSchema:
    """Shared teacher weights; names and shapes are those of ``template``.

    ``with_weight`` admits the scalar ``__weight__`` (number of local examples), which FedAvg by examples needs and which
    discloses that number; it is refused otherwise.
    """
    tensors = {name: TensorSchema(tuple(value.shape)) for name, value in template.items()}
    if with_weight:
        tensors["__weight__"] = TensorSchema((1,), max_abs=1e12, nonnegative=True)
    return MessageSchema("teacher", tensors)


@dataclass(frozen=True)
class Message:
    """A parsed message. ``payload`` is the exact byte string that travelled."""

    kind: str
    client: str
    round: int
    nonce: str
    tensors: dict[str, Tensor]
    payload: bytes = field(repr=False)

    @property
    def sha256(self) -> str:
        """Hash of the bytes that travelled."""
        return hashlib.sha256(self.payload).hexdigest()


def pack(schema: MessageSchema, client: str, round: int, tensors: Mapping[str, Tensor]) -> Message:
    """Build a message and check it against its own schema, so that a wrong one never leaves.

    Raises:
        MessageError: a tensor is missing, superfluous, or out of its schema.
    """
    body = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in sorted(tensors.items())}
    _check_tensors(schema, body)
    nonce = secrets.token_hex(16)
    header = {"version": VERSION, "kind": schema.kind, "client": client, "round": str(round), "nonce": nonce}
    return Message(schema.kind, client, round, nonce, body, _save(body, metadata=header))


def unpack(schema: MessageSchema, payload: bytes) -> Message:
    """Parse and check a byte string from outside.

    Raises:
        MessageError: too large, not safetensors, wrong fields, wrong tensors. Nothing of the message is kept.
    """
    if not isinstance(payload, (bytes, bytearray)):
        raise MessageError(f"a message must be bytes in safetensors form, not {type(payload).__name__}")
    if len(payload) > schema.max_bytes:
        way_out = "".join(tensor.way_out for tensor in schema.tensors.values())
        raise MessageError(
            f"a '{schema.kind}' message of {len(payload)} bytes exceeds the limit of {schema.max_bytes}{way_out}"
        )
    header = _header(bytes(payload))
    if set(header) != _FIELDS:
        raise MessageError(f"message fields are {sorted(header)}, exactly {sorted(_FIELDS)} are required")
    if header["version"] != VERSION:
        raise MessageError(f"message version {header['version']!r} is not {VERSION!r}: update the older side")
    if header["kind"] != schema.kind:
        raise MessageError(f"message kind {header['kind']!r} where {schema.kind!r} is expected")
    if not _is_round(header["round"]):
        raise MessageError(f"message round {header['round'][:20]!r} is not a round number")
    if not header["client"].isprintable() or not 0 < len(header["client"]) <= 128:
        raise MessageError("message client name must be 1 to 128 printable characters")
    if len(header["nonce"]) != 32 or not all(c in "0123456789abcdef" for c in header["nonce"]):
        raise MessageError("message nonce is not 32 hexadecimal digits")
    try:
        tensors = _load(bytes(payload))
    except Exception as error:
        raise MessageError(f"message body is not valid safetensors: {str(error)[:120]}") from None
    _check_tensors(schema, tensors)
    return Message(
        schema.kind,
        header["client"],
        int(header["round"]),
        header["nonce"],
        dict(sorted(tensors.items())),
        bytes(payload),
    )


def _check_tensors(schema: MessageSchema, tensors: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(set(schema.tensors) - set(tensors)), sorted(set(tensors) - set(schema.tensors))
    if missing or extra:
        raise MessageError(f"a '{schema.kind}' message lacks tensors {missing[:5]} and has unknown tensors {extra[:5]}")
    for name, spec in schema.tensors.items():
        spec.check(name, tensors[name])


def _header(payload: bytes) -> dict[str, str]:
    """The fields of a message. Its header must be spelled as :func:`pack` spells it.

    JSON has room for what no parser reports: repeated keys, spaces, further entries beside a tensor's own. With one
    spelling only there is none, and no two parsers can read two messages in one.
    """
    size = int.from_bytes(payload[:8], "little") if len(payload) >= 8 else 0
    if not 2 <= size <= min(MAX_HEADER_BYTES, len(payload) - 8):
        raise MessageError("message is not in safetensors form (bad header length); pickles are never read")
    raw = payload[8 : 8 + size]
    try:
        header = json.loads(raw.decode())
        spelled = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise MessageError("message is not in safetensors form (unreadable header); pickles are never read") from None
    if not isinstance(header, dict) or raw != spelled + b" " * (-len(spelled) % 8):
        raise MessageError("message header has repeated keys, needless spaces or another spelling than JSON needs")
    fields = header.pop("__metadata__", None)
    if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
        raise MessageError("message metadata must map names to strings")
    if not all(isinstance(about, dict) and set(about) == _TENSOR_FIELDS for about in header.values()):
        raise MessageError(f"message header must describe each tensor by exactly {sorted(_TENSOR_FIELDS)}")
    return fields


def _is_round(text: str) -> bool:
    """Whether ``text`` is a round number in its one spelling: no leading zeros, no digits of other scripts."""
    return text.isascii() and text.isdecimal() and len(text) <= 9 and text == str(int(text))


class ReplayGuard:
    """Remembers nonces and refuses a message seen before or meant for another round or client."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def accept(self, message: Message, round: int, client: str) -> None:
        """Raise :class:`MessageError` on replay, a foreign round or a foreign sender; else remember the nonce."""
        if message.round != round:
            raise MessageError(f"message of round {message.round} arrived in round {round}")
        if message.client != client:
            raise MessageError(f"message of client '{message.client}' arrived on the channel of '{client}'")
        if message.nonce in self._seen:
            raise MessageError(f"message {message.nonce} of client '{client}' was already received (replay)")
        self._seen.add(message.nonce)

    def state_dict(self) -> dict[str, list[str]]:
        """The nonces, sorted."""
        return {"seen": sorted(self._seen)}

    def load_state_dict(self, state: dict[str, list[str]]) -> None:
        """Restore the nonces."""
        self._seen = set(state["seen"])
