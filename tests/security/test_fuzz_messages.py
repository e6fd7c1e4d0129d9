"""100,000 mutated messages: each is refused with a MessageError or is exactly what the schema allows (T3, T16, T18)."""

import json
import math
import random
import struct
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save

from lightning_sfubm.errors import MessageError
from lightning_sfubm.federated import messages
from lightning_sfubm.federated.messages import (
    MessageSchema,
    ReplayGuard,
    TensorSchema,
    pack,
    semantics_schema,
    teacher_schema,
    unpack,
)

CLIENT, ROUND = "shop", 7
UNIT = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1)
TEMPLATE = {"adaptor.weight": torch.ones(3, 2), "encoder.bias": torch.full((5,), -0.25)}
#: what the server waits for, and an honest message of it
KINDS = [
    (semantics_schema(4), {"vectors": UNIT}),
    (teacher_schema(TEMPLATE, with_weight=False), TEMPLATE),
    (teacher_schema(TEMPLATE, with_weight=True), {**TEMPLATE, "__weight__": torch.tensor([40.0])}),
]
WORDS = [
    "",
    "F64",
    "BF16",
    "I64",
    "server",
    "0",
    "-1",
    "8",
    "2",
    "NaN",
    "\x00",
    "../x",
    "9" * 400,
    "٧",
    None,
    0,
    -1,
    1e400,
]
Mutation = Callable[[random.Random, bytes, dict], bytes]


def split(payload: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(payload[:8], "little")
    return json.loads(payload[8 : 8 + size]), payload[8 + size :]


def join(header: object, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def flip_bits(draw: random.Random, payload: bytes, tensors: dict) -> bytes:
    mutated = bytearray(payload)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        mutated[draw.randrange(len(mutated))] ^= 1 << draw.randrange(8)
    return bytes(mutated)


def cut_or_grow(draw: random.Random, payload: bytes, tensors: dict) -> bytes:
    place = draw.randrange(1, len(payload))
    noise = draw.randbytes(draw.randrange(1, 40))
    return draw.choice([payload[:place], payload[place:], payload + noise, payload[:place] + noise + payload[place:]])


def change_length(draw: random.Random, payload: bytes, tensors: dict) -> bytes:
    size = draw.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(payload), len(payload) - 8, draw.randrange(600)])
    return size.to_bytes(8, "little") + payload[8:]


def change_field(draw: random.Random, payload: bytes, tensors: dict) -> bytes:
    header, body = split(payload)
    fields = header["__metadata__"]
    key = draw.choice([*fields, "extra"])
    if draw.random() < 0.2:
        fields.pop(key, None)
    else:
        fields[key] = draw.choice(WORDS)
    return join(header, body)


def change_tensor_entry(draw: random.Random, payload: bytes, tensors: dict) -> bytes:
    header, body = split(payload)
    name = draw.choice(list(tensors))
    entry = header[name]
    match draw.randrange(6):
        case 0:
            entry["dtype"] = draw.choice(["F16", "F64", "BF16", "I32", "U8", "BOOL", "C64", "F8_E4M3", "x", 4, None])
        case 1:
            entry["shape"] = draw.choice(
                [[], [0], [-1], [2**62, 4], [1, *entry["shape"]], entry["shape"][::-1], "6", [6.0, 4]]
            )
        case 2:
            entry["data_offsets"] = [draw.choice([0, -4, 4, 2**63, len(body)]), draw.choice([0, 8, len(body), 2**64])]
        case 3:
            header[draw.choice(["user_ids", "title", "__weight__", "ids.weight.grad"])] = dict(entry)
        case 4:
            header[draw.choice(["renamed", ""])] = header.pop(name)
        case _:
            header[name] = draw.choice([None, [], 3, "F32", {}])
    return join(header, body)


def change_values(draw: random.Random, payload: bytes, tensors: dict) -> bytes:
    mutated, size = bytearray(payload), int.from_bytes(payload[:8], "little")
    place = 8 + size + 4 * draw.randrange((len(payload) - 8 - size) // 4)
    mutated[place : place + 4] = struct.pack(
        "<f", draw.choice([math.nan, math.inf, -math.inf, 3e38, 1.1e4, 2.0, 1e-40])
    )
    return bytes(mutated)


def other_content(draw: random.Random, payload: bytes, tensors: dict) -> bytes:
    """Well-formed safetensors that say something else."""
    fields, names = split(payload)[0]["__metadata__"], list(tensors)
    changed = {name: value.clone() for name, value in tensors.items()}
    name = draw.choice(names)
    form = [
        lambda v: v.double(),
        lambda v: v.half(),
        lambda v: v.long(),
        lambda v: v[:0],
        lambda v: v.repeat(2, *[1] * (v.ndim - 1)),
    ]
    changed[name] = draw.choice([*form, lambda v: v * 1e9, lambda v: v / 0, lambda v: v.unsqueeze(0)])(
        changed[name]
    ).contiguous()
    if draw.random() < 0.3:
        changed[draw.choice(["history", "user", "counts"])] = torch.ones(2)
    return save(changed, metadata=fields)


def odd_header(draw: random.Random, payload: bytes, tensors: dict) -> bytes:
    header, body = split(payload)
    odd = [
        b"[" * 5000,
        b'{"a":' * 3000,
        b"null",
        b"[]",
        b'{"__metadata__":{}}',
        b"\xff\xfe",
        b"{" + b" " * 900 + b"}",
        b"1" * 5000,
    ]
    text = draw.choice([*odd, json.dumps({**header, "__metadata__": draw.choice([None, [], "x", 1])}).encode()])
    return len(text).to_bytes(8, "little") + text + body


def oversized(draw: random.Random, payload: bytes, tensors: dict) -> bytes:
    return payload + bytes(messages.MAX_HEADER_BYTES + 500)


def foreign(draw: random.Random, payload: bytes, tensors: dict) -> bytes:
    """An honest message of another client, round, version or kind."""
    header, body = split(payload)
    key, value = draw.choice(
        [("client", "films"), ("client", "server"), ("round", "6"), ("round", "8"), ("version", "2"), ("kind", "x")]
    )
    header["__metadata__"][key] = value
    return join(header, body)


def replayed(draw: random.Random, payload: bytes, tensors: dict) -> bytes:
    return payload  # as it is: the receiver has had it


MUTATIONS: list[tuple[Mutation, int]] = [
    (flip_bits, 30),
    (cut_or_grow, 12),
    (change_length, 6),
    (change_field, 12),
    (change_tensor_entry, 14),
    (change_values, 8),
    (other_content, 8),
    (odd_header, 4),
    (oversized, 1),
    (foreign, 3),
    (replayed, 2),
]


def receive(schema: MessageSchema, guard: ReplayGuard, payload: bytes) -> messages.Message:
    """As the server does it, on the channel of a client in a round."""
    message = unpack(schema, payload)
    guard.accept(message, ROUND, CLIENT)
    return message


@pytest.mark.slow
def test_no_mutated_message_crashes_hangs_or_passes_for_another() -> None:
    draw = random.Random(11)
    choices, weights = zip(*MUTATIONS, strict=True)
    accepted: Counter[str] = Counter()
    reasons: set[str] = set()
    sent = [(schema, tensors, pack(schema, CLIENT, ROUND, tensors)) for schema, tensors in KINDS]
    for mutation in draw.choices(choices, weights, k=100_000):
        schema, tensors, honest = draw.choice(sent)
        payload = mutation(draw, honest.payload, tensors)
        guard = ReplayGuard()
        repeated = mutation is replayed or draw.random() < 0.5
        if repeated:  # the honest message has arrived before
            guard.load_state_dict({"seen": [honest.nonce]})
        try:
            message = receive(schema, guard, payload)
        except MessageError as error:
            reasons.add(str(error))
            continue
        # What came through is fresh, of this client and round, and whole.
        accepted[mutation.__name__] += 1
        assert (message.client, message.round, message.kind) == (CLIENT, ROUND, schema.kind)
        assert not (repeated and message.nonce == honest.nonce)
        assert len(payload) <= schema.max_bytes
        assert list(message.tensors) == sorted(schema.tensors)
        for name, value in message.tensors.items():
            spec: TensorSchema = schema.tensors[name]
            assert value.dtype == torch.float32
            assert torch.isfinite(value).all()
            assert float(value.abs().max()) <= spec.max_abs
            assert value.shape[1:] == tensors[name].shape[1:]
            assert spec.shape[0] is None or value.shape == tensors[name].shape
            if spec.unit_rows:
                assert float((value.norm(dim=1) - 1).abs().max()) <= 1e-3
        with pytest.raises(MessageError, match="replay"):
            guard.accept(message, ROUND, CLIENT)
    never = {"foreign", "replayed", "oversized", "odd_header", "change_length", "cut_or_grow"}
    assert not never & set(accepted), accepted
    assert accepted["change_values"] > 100  # in bounds: the test would see a wrong one
    assert accepted["flip_bits"] > 1000
    assert len({reason[:16] for reason in reasons}) > 15
    assert max(map(len, reasons)) < 800


@pytest.mark.parametrize(("schema", "tensors"), KINDS)
def test_the_size_is_looked_at_before_anything_is_parsed(
    schema: MessageSchema, tensors: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parsed(*args: object) -> None:
        pytest.fail("parsed before its size was checked")

    monkeypatch.setattr(messages, "_header", parsed)
    monkeypatch.setattr(messages, "_load", parsed)
    monkeypatch.setattr(MessageSchema, "max_bytes", 100)
    payload = pack(schema, CLIENT, ROUND, tensors).payload
    with pytest.raises(MessageError, match="exceeds the limit of 100"):
        unpack(schema, payload)


def test_no_schema_of_weights_admits_more_than_its_tensors_and_a_header() -> None:
    for schema, tensors in KINDS[1:]:
        assert schema.max_bytes == 4 * sum(t.numel() for t in tensors.values()) + messages.MAX_HEADER_BYTES + 8
