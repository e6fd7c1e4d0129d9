"""Mutated messages of secure aggregation: refused with one of two errors, or read as exactly what they say."""

import json
import random
from collections import Counter
from typing import Any

import pytest
import torch

from lightning_sfubm.errors import MessageError, PrivacyError
from lightning_sfubm.privacy.secagg import wire
from lightning_sfubm.privacy.secagg.client import input_bytes
from lightning_sfubm.privacy.secure_aggregation import STEPS

from .conftest import FOUR, SHAPES, Round

COUNT = 20_000
#: bytes of a value by field, said again; ``None`` = a list of names
SIZES = {"agreement": 32, "channel_key": 32, "mask_key": 32, "channel_keys": 32, "mask_keys": 32, "commitment": 32}
SIZES |= {"sealed": 2 * 33 + 28, "seed_shares": 33, "key_shares": 33, "survivors": None, "dropped": None}
COLLECT = dict(zip(STEPS, ("collect_keys", "collect_shares", "collect_inputs", "collect_reveals"), strict=True))
BODY = input_bytes(SHAPES, FOUR)


@pytest.fixture(scope="module")
def good() -> list[tuple[str, str, bytes]]:
    """Every message of one round: kind, sender, bytes."""
    held = Round().to("unmask", {"d": "mask_input"})
    kinds = dict(zip(STEPS, ("keys", "shares", "input", "reveal"), strict=True))
    sent = [(kinds[step], name, data) for step, by_name in held.sent.items() for name, data in by_name.items()]
    session = json.loads(held.invite[12 : 12 + int.from_bytes(held.invite[8:12], "little")])["session"]
    keys = {name: bytes([number] * 32) for number, name in enumerate("abcd")}
    made: dict[str, dict[str, Any]] = {
        "roster": {"channel_keys": keys, "mask_keys": keys},
        "mailbox": {"sealed": {name: bytes(94) for name in "bcd"}},
        "request": {"survivors": ["a", "b", "c"], "dropped": ["d"]},
    }
    down = [(kind, wire.SERVER, wire.pack(kind, wire.SERVER, 3, session, fields)) for kind, fields in made.items()]
    return [*sent, *down, ("invite", wire.SERVER, held.invite)]


def parts(payload: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(payload[8:12], "little")
    return json.loads(payload[12 : 12 + size]), payload[12 + size :]


def assemble(header: object, body: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else canonical(header)
    return b"SFUBMSA1" + len(raw).to_bytes(4, "little") + raw + body


def canonical(header: object) -> bytes:
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "surrogatepass")


def mutate(rng: random.Random, payload: bytes) -> bytes:
    action = rng.randrange(9)
    changed = bytearray(payload)
    if action == 0:
        for _ in range(rng.choice([1, 1, 3])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if action == 1:
        return payload[: rng.randrange(len(payload))]
    if action == 2:
        more = rng.randbytes(rng.choice([1, 8, 64, 100_000]))
        return rng.choice([payload + more, more + payload, payload + payload])
    if action == 3:
        size = rng.choice([0, 1, len(payload), (1 << 32) - 1, int.from_bytes(payload[8:12], "little") + 1])
        return payload[:8] + size.to_bytes(4, "little") + payload[12:]
    header, body = parts(payload)
    if action == 4:  # header
        name = rng.choice([*header, "note"])
        odd = [
            None,
            True,
            1,
            0,
            -1,
            3,
            3.0,
            10**400,
            "3",
            "",
            "a",
            "\ud800",
            "x" * 200,
            [],
            {},
            [dict(header)],
            "server",
        ]
        header[name] = rng.choice([*odd, "0" * 32, "f" * 32])
    elif action == 5:
        del header[rng.choice(list(header))]
    elif action == 6:  # fields
        fields = header["fields"]
        name = rng.choice([*fields, "input", "secret"])
        here = fields.get(name)
        odd = [None, 1, "", "00", "0" * 64, "F" * 64, "g" * 64, "0" * 66, [], {}, [[]], ["a", "a"], ["b", "a"], ["a"]]
        odd += [{"a": "0" * 64}, {"a": 1}, {"": "0" * 66}, {"\n": "0" * 64}, {f"c{i}": "0" * 66 for i in range(9)}]
        odd += [{**here, rng.choice("ae"): "0" * rng.choice([64, 66, 188])}] if isinstance(here, dict) else []
        fields[name] = rng.choice(odd)
    elif action == 7:  # spelling
        raw = canonical(header)
        return assemble(
            rng.choice(
                [
                    json.dumps(header).encode(),
                    raw + b" ",
                    raw.replace(b'"kind":', b'"kind":"hidden","kind":'),
                    raw[:-1] + b',"round":3}',
                    raw.replace(b'"client":"', b'"client":"\\u0061'),
                    raw.replace(
                        b'"round":3', rng.choice([b'"round":3.0', b'"round":03', b'"round":3e0', b'"round":NaN'])
                    ),
                    b"[" * 3000,
                    b'{"a":' * 500,
                    b"null",
                    b"\x80\x04}q\x00.",
                ]
            ),
            body,
        )
    else:
        return b"SFUBMSA" + rng.choice([b"0", b"2", b"\x00"]) + payload[8:]
    return assemble(header, body)


def says(kind: str, sender: str, payload: bytes) -> bool:
    """Whether a payload is, word for word, a message of this kind and sender of round 3 of any session."""
    header, body = parts(payload)
    if sorted(header) != ["client", "fields", "kind", "round", "session"] or payload != assemble(header, body):
        return False
    if (header["kind"], header["client"], header["round"]) != (kind, sender, 3) or type(header["round"]) is not int:
        return False
    if len(body) != (BODY if kind == "input" else 0) or sorted(header["fields"]) != sorted(wire.KINDS[kind]):
        return False
    for name, value in header["fields"].items():
        size = SIZES[name]
        if size is None:
            whole = value == sorted(set(value)) and all(0 < len(n) <= 128 and n.isprintable() for n in value)
        else:
            found = value if isinstance(value, dict) else {"": value}
            whole = all(len(bytes.fromhex(v)) == size and v == v.lower() and " " not in v for v in found.values())
            whole &= not isinstance(value, dict) or ("" not in value and "\n" not in value and len(value) <= 4)
        if not whole:
            return False
    return True


@pytest.mark.slow
def test_mutated_messages_are_refused_or_read_as_they_stand(good: list[tuple[str, str, bytes]]) -> None:
    rng, outcomes = random.Random(8), Counter[tuple[str, bool]]()
    for number in range(COUNT):
        kind, sender, payload = good[number % len(good)]
        session = None if kind == "invite" else parts(payload)[0]["session"]
        changed = payload if number % 50 == 0 else mutate(rng, payload)
        if rng.random() < 0.05:  # a message of another kind, sender or round that is good in itself
            kind, sender, _ = rng.choice(good)
        body = BODY if kind == "input" else 0
        try:
            read = wire.unpack(kind, changed, sender=sender, round=3, session=session, clients=4, body_bytes=body)
        except MessageError:
            outcomes[kind, False] += 1
            continue
        outcomes[kind, True] += 1
        assert says(kind, sender, changed), changed
        assert session in (None, read.session)
        assert wire.pack(kind, sender, 3, read.session, read.fields, read.body) == changed
    for kind in wire.KINDS:
        assert outcomes[kind, True]
        assert outcomes[kind, False]


def test_the_size_limit_comes_before_any_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*args: object) -> None:
        pytest.fail("an oversized message was parsed")

    monkeypatch.setattr(wire, "_parse", parsed)
    message = wire.pack("keys", "a", 3, "0" * 32, {"channel_key": bytes(32), "mask_key": bytes(32)})
    limit = 4096 + 2048 * 4
    with pytest.raises(MessageError, match="more than the limit"):
        wire.unpack("keys", message.ljust(limit + 1), sender="a", round=3, session=None, clients=4)
    with pytest.raises(pytest.fail.Exception, match="was parsed"):
        wire.unpack("keys", message.ljust(limit), sender="a", round=3, session=None, clients=4)


@pytest.mark.slow
def test_a_round_with_a_mutated_message_refuses_it_and_can_go_on_without() -> None:
    rng, refused = random.Random(9), 0
    for _ in range(150):
        step = rng.choice(STEPS)
        held = Round().to(step)
        collect = getattr(held.server, COLLECT[step])
        victim = rng.choice("abcd")
        mutated = mutate(rng, held.sent[step][victim])
        try:
            collect(held.sent[step] | {victim: mutated})
        except (MessageError, PrivacyError):
            refused += 1
            answer = collect({name: data for name, data in held.sent[step].items() if name != victim})
            if step == "unmask" or step == "mask_input":
                assert answer
            if step == "unmask":
                plain = sum(held.inputs[name]["w"].double() for name in "abcd")
                torch.testing.assert_close(answer.tensors["w"], plain, rtol=0, atol=4 * 2.0**-25)
    assert refused > 100
