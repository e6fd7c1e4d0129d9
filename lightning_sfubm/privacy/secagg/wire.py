"""The eight messages of a round of secure aggregation as bytes of one strict form.

A message is 8 magic bytes, the header's length (4 bytes, little-endian), a header in canonical JSON (sorted keys, no
spaces), and a body that is empty in all but the masked input. The tensor schema of
:mod:`lightning_sfubm.federated.messages` does not fit here: it holds float32 tensors of bounded size, and these messages
hold keys, ciphertexts and words that look random. What is shared is the rule: exactly the listed fields or refused whole.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_sfubm.errors import MessageError
from lightning_sfubm.privacy.secagg.primitives import KEY_BYTES, SEAL_BYTES
from lightning_sfubm.privacy.secagg.shamir import SHARE_BYTES

MAGIC = b"SFUBMSA1"
SERVER = "server"
_HEADER = {"client", "fields", "kind", "round", "session"}
_MAX_ROUND = 10**9


@dataclass(frozen=True)
class _Field:
    """Bytes (``one``), bytes by client (``table``) or names of clients (``names``); ``size`` counts the bytes."""

    form: Literal["one", "table", "names"]
    size: int = 0


_KEY, _KEYS, _NAMES = _Field("one", KEY_BYTES), _Field("table", KEY_BYTES), _Field("names")
_SEALED, _SHARES = _Field("table", 2 * SHARE_BYTES + SEAL_BYTES), _Field("table", SHARE_BYTES)
KINDS: dict[str, dict[str, _Field]] = {
    "invite": {"agreement": _KEY},
    "keys": {"channel_key": _KEY, "mask_key": _KEY},
    "roster": {"channel_keys": _KEYS, "mask_keys": _KEYS},
    "shares": {"commitment": _KEY, "sealed": _SEALED},
    "mailbox": {"sealed": _SEALED},
    "input": {},
    "request": {"survivors": _NAMES, "dropped": _NAMES},
    "reveal": {"seed_shares": _SHARES, "key_shares": _SHARES},
}


@dataclass(frozen=True)
class Envelope:
    """A parsed message; ``fields`` holds bytes, ``{client: bytes}`` or a list of names, as its kind says."""

    session: str
    fields: dict[str, Any]
    body: bytes


def pack(kind: str, client: str, round: int, session: str, fields: Mapping[str, Any], body: bytes = b"") -> bytes:
    """A message as bytes. ``client`` is the sender, :data:`SERVER` for the server."""
    plain = {name: _plain(fields[name]) for name in KINDS[kind]}
    header = _canonical({"client": client, "fields": plain, "kind": kind, "round": round, "session": session})
    return MAGIC + len(header).to_bytes(4, "little") + header + body


def unpack(
    kind: str, payload: bytes, *, sender: str, round: int, session: str | None, clients: int, body_bytes: int = 0
) -> Envelope:
    """Parse and check a message from outside.

    Args:
        kind: the one kind that is due at this step.
        payload: the bytes.
        sender: whose channel the bytes came on.
        round: the round that is being run.
        session: the session that is being run; ``None`` for the invitation, which opens it.
        clients: most clients of a round; bounds the size.
        body_bytes: exact size of the body.

    Raises:
        MessageError: of another kind, round, session or sender (a replay among them), or not exactly in its form.
    """
    where = f"a secure-aggregation message on the channel of '{sender}'"
    if not isinstance(payload, (bytes, bytearray)):
        raise MessageError(f"{where} must be bytes, not {type(payload).__name__}")
    limit = 4096 + 2048 * clients + body_bytes
    if len(payload) > limit:
        raise MessageError(f"{where} has {len(payload)} bytes, more than the limit of {limit}")
    payload = bytes(payload)
    start = len(MAGIC) + 4
    size = int.from_bytes(payload[len(MAGIC) : start], "little")
    if len(payload) < start or payload[: len(MAGIC)] != MAGIC or len(payload) < start + size:
        raise MessageError(f"{where} is not in the form of secure aggregation, version {MAGIC[-1:].decode()}")
    header, body = _parse(where, payload[start : start + size]), payload[start + size :]
    if header["kind"] != kind:
        raise MessageError(f"{where} is of kind '{str(header['kind'])[:20]}' where '{kind}' is due")
    if header["client"] != sender:
        raise MessageError(f"{where} names '{str(header['client'])[:128]}' as its sender")
    if type(header["round"]) is not int or header["round"] != round:
        raise MessageError(f"{where} is of round {str(header['round'])[:20]}, not of round {round}")
    if not _is_hex(header["session"], 16) or session not in (None, header["session"]):
        raise MessageError(f"{where} belongs to another session of round {round} (replay)")
    if len(body) != body_bytes:
        raise MessageError(f"{where} has a body of {len(body)} bytes, {body_bytes} are required")
    found, wanted = header["fields"], KINDS[kind]
    if not isinstance(found, dict) or set(found) != set(wanted):
        raise MessageError(f"{where} does not hold exactly the fields {sorted(wanted)} of kind '{kind}'")
    fields = {name: _checked(f"{where}, field '{name}',", found[name], wanted[name], clients) for name in wanted}
    return Envelope(header["session"], fields, body)


def check_round(round: int) -> int:
    """``round`` if a header can hold it, else :class:`MessageError`."""
    if not 0 <= round < _MAX_ROUND:
        raise MessageError(f"round {round} of a secure aggregation is not within 0 to {_MAX_ROUND - 1}")
    return round


def check_name(name: object) -> str:
    """``name`` if it can name a client, else :class:`MessageError`."""
    if not isinstance(name, str) or not 0 < len(name) <= 128 or not name.isprintable():
        raise MessageError("a client's name in secure aggregation must be 1 to 128 printable characters")
    return name


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return {name: data.hex() for name, data in value.items()} if isinstance(value, Mapping) else sorted(value)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _parse(where: str, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode())
        canonical = _canonical(header) == raw  # no repeated keys, no second spelling of the same message
    except (ValueError, RecursionError):
        raise MessageError(f"{where} has an unreadable header") from None
    if not canonical or not isinstance(header, dict) or set(header) != _HEADER:
        raise MessageError(f"{where} does not have exactly the header {sorted(_HEADER)} in canonical form")
    return header


def _is_hex(value: object, size: int) -> bool:
    return isinstance(value, str) and len(value) == 2 * size and set(value) <= set("0123456789abcdef")


def _checked(where: str, value: Any, field: _Field, clients: int) -> Any:
    if field.form == "one":
        if not _is_hex(value, field.size):
            raise MessageError(f"{where} is not {field.size} bytes in hexadecimal")
        return bytes.fromhex(value)
    if field.form == "names":
        if not isinstance(value, list) or len(value) > clients or [check_name(n) for n in value] != sorted(set(value)):
            raise MessageError(f"{where} does not list at most {clients} clients once each in sorted order")
        return value
    if not isinstance(value, dict) or len(value) > clients:
        raise MessageError(f"{where} is not a table of at most {clients} clients")
    if not all(_is_hex(data, field.size) for data in value.values()):
        raise MessageError(f"{where} does not hold {field.size} bytes in hexadecimal for each client")
    return {check_name(name): bytes.fromhex(data) for name, data in value.items()}


class Steps:
    """The order of one party's steps: each is taken once, in turn, and none twice.

    A step that raised was not taken. It may be tried again with the messages it should have had.
    """

    def __init__(self, party: str, steps: tuple[str, ...]) -> None:
        self._party, self._steps, self._done = party, steps, 0

    def check(self, step: str) -> None:
        """Raise :class:`MessageError` unless ``step`` is due."""
        due = self._steps[self._done] if self._done < len(self._steps) else "nothing more"
        if step != due:
            raise MessageError(
                f"{self._party}: step '{step}' was asked for where '{due}' is due; every step of a round of secure "
                "aggregation is taken once"
            )

    def done(self) -> None:
        """The step that was due has been taken."""
        self._done += 1
