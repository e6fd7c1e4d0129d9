"""What may travel, and what is refused (T3, T18)."""

import io
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from lightning_sfubm.errors import MessageError
from lightning_sfubm.federated.messages import (
    MAX_HEADER_BYTES,
    ReplayGuard,
    pack,
    semantics_schema,
    teacher_schema,
    unpack,
)


def unit(n: int = 7, dim: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1)


def header(**changes: str) -> dict[str, str]:
    fields = {"version": "1", "kind": "semantics", "client": "a", "round": "0", "nonce": "0" * 32}
    return {**fields, **changes}


def test_round_trip_keeps_every_bit() -> None:
    schema = semantics_schema(4)
    message = pack(schema, "a", 3, {"vectors": unit()})
    received = unpack(schema, message.payload)
    assert torch.equal(received.tensors["vectors"], unit())
    assert torch.equal(load(message.payload)["vectors"], unit())  # ordinary safetensors
    assert (received.client, received.round, received.nonce) == ("a", 3, message.nonce)


def test_a_semantics_message_holds_the_vectors_and_five_fields_and_nothing_else() -> None:
    payload = pack(semantics_schema(4), "shop", 1, {"vectors": unit()}).payload
    size = int.from_bytes(payload[:8], "little")
    parsed = json.loads(payload[8 : 8 + size])
    assert set(parsed) == {"__metadata__", "vectors"}
    assert set(parsed["__metadata__"]) == {"version", "kind", "client", "round", "nonce"}
    assert len(payload) == 8 + size + 7 * 4 * 4


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({"vectors": unit(), "user_ids": unit()}, "user_ids"),
        ({"vectors": unit(), "counts": torch.ones(7)}, "counts"),
        ({"vectors": unit(), "id_table.grad": unit()}, "id_table.grad"),
        ({}, "vectors"),
        ({"vectors": unit(dim=5)}, "shape"),
        ({"vectors": unit()[0]}, "shape"),
        ({"vectors": unit() * 2}, "unit"),
        ({"vectors": torch.full((3, 4), float("nan"))}, "NaN"),
        ({"vectors": torch.full((3, 4), float("inf"))}, "NaN or infinite"),
        ({"vectors": torch.empty(0, 4)}, "empty"),
    ],
)
def test_tensors_outside_the_schema_never_leave_and_are_never_taken(tensors: dict, word: str) -> None:
    with pytest.raises(MessageError, match=word):
        pack(semantics_schema(4), "a", 0, tensors)
    with pytest.raises(MessageError, match=word):
        unpack(semantics_schema(4), save({k: v.clone() for k, v in tensors.items()}, metadata=header()))


@pytest.mark.parametrize("length", [0.998, 1.002])
def test_the_length_of_a_vector_says_nothing(length: float) -> None:
    """What a silo has counted could travel in it."""
    vectors = unit()
    vectors[3] *= length
    with pytest.raises(MessageError, match="unit"):
        pack(semantics_schema(4), "a", 0, {"vectors": vectors})
    rounded = unit() * (1 + (length - 1) / 4)  # as rounding may leave it
    assert torch.equal(pack(semantics_schema(4), "a", 0, {"vectors": rounded}).tensors["vectors"], rounded)


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_are_bounded_on_either_side(sign: int) -> None:
    schema = teacher_schema({"w": torch.zeros(3)}, with_weight=False)
    largest = sign * torch.tensor([1.0, 1e4, 0.0])
    assert torch.equal(unpack(schema, pack(schema, "a", 0, {"w": largest}).payload).tensors["w"], largest)
    with pytest.raises(MessageError, match="beyond"):
        pack(schema, "a", 0, {"w": 1.01 * largest})


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "0"},
        {"kind": "teacher"},
        {"round": "-1"},
        {"round": "x"},
        {"round": "07"},
        {"round": "٣"},
        {"client": ""},
        {"nonce": "zz"},
        {"extra": "1"},
    ],
)
def test_wrong_fields_are_refused(changes: dict[str, str]) -> None:
    with pytest.raises(MessageError):
        unpack(semantics_schema(4), save({"vectors": unit()}, metadata=header(**changes)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"F32"', b'"F32","user_ids":[17,4]'),
        (b'"round":', b'"round":"user 17","round":'),
        (b'"vectors":', b'"vectors":null,"vectors":'),
        (b'{"__metadata__"', b'{ "__metadata__"'),
        (b"}}", b"}}" + b" " * 4096),
    ],
)
def test_nothing_can_be_hidden_in_a_header(old: bytes, new: bytes) -> None:
    payload = pack(semantics_schema(4), "a", 0, {"vectors": unit()}).payload
    size = int.from_bytes(payload[:8], "little")
    raw = payload[8 : 8 + size].rstrip().replace(old, new, 1)
    raw += b" " * (-len(raw) % 8)
    with pytest.raises(MessageError, match="header"):
        unpack(semantics_schema(4), len(raw).to_bytes(8, "little") + raw + payload[8 + size :])


def test_a_negative_number_of_examples_is_refused() -> None:
    schema = teacher_schema({"w": torch.zeros(3)}, with_weight=True)
    with pytest.raises(MessageError, match="negative"):
        pack(schema, "a", 1, {"w": torch.ones(3), "__weight__": torch.tensor([-5.0])})


def test_a_pickle_is_refused_and_never_executed() -> None:
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    buffer = io.BytesIO()
    torch.save({"vectors": unit()}, buffer)
    for payload in (pickle.dumps(Bomb()), buffer.getvalue(), b"", b"\x00" * 64, b"{}"):
        with pytest.raises(MessageError):
            unpack(semantics_schema(4), payload)


def test_an_oversized_message_is_refused_before_it_is_parsed() -> None:
    schema = teacher_schema({"w": torch.zeros(3)}, with_weight=False)
    with pytest.raises(MessageError, match="exceeds"):
        unpack(schema, b"\xff" * (schema.max_bytes + 1))


def test_the_size_limit_of_item_vectors_is_a_setting() -> None:
    schema = semantics_schema(4, max_items=7)
    assert torch.equal(unpack(schema, pack(schema, "a", 0, {"vectors": unit(7)}).payload).tensors["vectors"], unit(7))
    assert 7 * 4 * 4 < schema.max_bytes < 7 * 4 * 4 + 2 * MAX_HEADER_BYTES
    words = r"trainer\.federation\.max_items = 7"
    with pytest.raises(MessageError, match=f"8 rows, at most 7 .*{words}"):
        pack(schema, "a", 0, {"vectors": unit(8)})
    with pytest.raises(MessageError, match=f"8 rows, at most 7 .*{words}"):
        unpack(schema, pack(semantics_schema(4), "a", 0, {"vectors": unit(8)}).payload)
    with pytest.raises(MessageError, match=f"exceeds the limit of {schema.max_bytes} .*{words}"):
        unpack(schema, bytes(schema.max_bytes + 1))
    assert semantics_schema(384).max_bytes < 1.6e9  # what is held for an unread message by default


def test_float16_and_wrong_dtypes_are_refused() -> None:
    with pytest.raises(MessageError, match="float32"):
        unpack(semantics_schema(4), save({"vectors": unit().half()}, metadata=header()))


def test_weight_travels_only_where_it_was_asked_for() -> None:
    template = {"w": torch.zeros(3)}
    with pytest.raises(MessageError, match="__weight__"):
        pack(teacher_schema(template, with_weight=False), "a", 1, {"w": torch.ones(3), "__weight__": torch.ones(1)})
    sent = pack(teacher_schema(template, with_weight=True), "a", 1, {"w": torch.ones(3), "__weight__": torch.ones(1)})
    assert float(sent.tensors["__weight__"]) == 1


def test_replay_foreign_round_and_foreign_sender_are_refused() -> None:
    guard, message = ReplayGuard(), pack(semantics_schema(4), "a", 2, {"vectors": unit()})
    for round in (1, 3):
        with pytest.raises(MessageError, match="round"):
            guard.accept(message, round, "a")
    with pytest.raises(MessageError, match="channel"):
        guard.accept(message, 2, "b")
    guard.accept(message, 2, "a")
    restored = ReplayGuard()
    restored.load_state_dict(guard.state_dict())
    for each in (guard, restored):
        with pytest.raises(MessageError, match="replay"):
            each.accept(message, 2, "a")


@given(st.integers(0, 10_000), st.integers(0, 255), st.booleans())
@settings(derandomize=True, deadline=None, max_examples=300)
def test_mutated_messages_are_refused_or_still_fit_the_schema(position: int, value: int, cut: bool) -> None:
    schema = semantics_schema(4)
    payload = bytearray(pack(schema, "a", 0, {"vectors": unit()}).payload)
    position %= len(payload)
    if cut:
        payload = payload[:position]
    else:
        payload[position] = value
    try:
        message = unpack(schema, bytes(payload))
    except MessageError:
        return
    assert not cut
    assert set(message.tensors) == {"vectors"}
    schema.tensors["vectors"].check("vectors", message.tensors["vectors"])
