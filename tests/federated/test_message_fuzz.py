"""100,000 mutated messages: each is refused with MessageError, or is a message that an independent reader accepts too.

The messages are built here, byte by byte, and judged here by :func:`legitimate`, which shares no code with the product.
"""

import json
import math
import random
import string
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from lightning_sfubm.errors import MessageError
from lightning_sfubm.federated import messages
from lightning_sfubm.federated.aggregation import KNNMix
from lightning_sfubm.federated.messages import MessageSchema, ReplayGuard, unpack
from lightning_sfubm.federated.server import Server
from lightning_sfubm.federated.weights import FedAvg

from .mutated_messages import (
    ACCEPTED_AT_TIMES,
    MUTATIONS,
    RULES,
    SCHEMAS,
    TEMPLATE,
    Header,
    assemble,
    original,
    oversized,
    text_of,
)

COUNT = 100_000
# ---------------------------------------------------------------------- the independent reader


class Wrong(Exception):
    """The independent reader's one objection."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise Wrong("repeated key")
    return dict(pairs)


def legitimate(kind: str, payload: bytes) -> tuple[Header, dict[str, np.ndarray]] | None:
    """Fields and tensors of a message of this kind, or ``None`` where it is not one."""
    try:
        size = int.from_bytes(payload[:8], "little")
        if len(payload) < 8 or size > len(payload) - 8 or size > 1 << 20:
            raise Wrong("size")
        raw, body = payload[8 : 8 + size], payload[8 + size :]
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
        plain = text_of(header)
        if raw.rstrip(b" ") != plain or size % 8 or size - len(plain) > 7:
            raise Wrong("spelling")
        fields = header.pop("__metadata__")
        if sorted(fields) != ["client", "kind", "nonce", "round", "version"]:
            raise Wrong("fields")
        client, number, nonce = fields["client"], fields["round"], fields["nonce"]
        digits = (
            0 < len(number) < 10 and all(c in string.digits for c in number) and number in ("0", number.lstrip("0"))
        )
        if (fields["version"], fields["kind"]) != ("1", kind) or not digits:
            raise Wrong("version, kind or round")
        if not (len(nonce) == 32 and all(c in "0123456789abcdef" for c in nonce)):
            raise Wrong("nonce")
        if not (0 < len(client) < 129 and client.isprintable()):
            raise Wrong("client")
        return fields, values_of(kind, header, body)
    except (Wrong, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def values_of(kind: str, header: Header, body: bytes) -> dict[str, np.ndarray]:
    rules, found, spans = RULES[kind], {}, []
    if set(header) != set(rules):
        raise Wrong("names")
    for name, (shape, high, low) in rules.items():
        about = header[name]
        sizes, (start, end) = about["shape"], about["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*sizes, start, end))
        if sorted(about) != ["data_offsets", "dtype", "shape"] or about["dtype"] != "F32" or not whole:
            raise Wrong("description")
        if len(sizes) != len(shape) or any(want not in (None, have) for want, have in zip(shape, sizes, strict=True)):
            raise Wrong("shape")
        if end - start != 4 * math.prod(sizes) or end > len(body) or not math.prod(sizes):
            raise Wrong("extent")
        values = np.frombuffer(body[start:end], "<f4").reshape(sizes)
        if not np.isfinite(values).all() or np.abs(values).max() > high or values.min() < low:
            raise Wrong("bounds")
        if kind == "semantics" and np.abs(np.linalg.norm(values.astype(np.float64), axis=1) - 1).max() > 1e-3:
            raise Wrong("length")
        found[name] = values
        spans.append((start, end))
    spans.sort()
    if [0, *(end for _, end in spans)] != [*(start for start, _ in spans), len(body)]:
        raise Wrong("gaps or overlaps")
    return found


BORDER = 2e-6  # float32 norms this near the limit may fall on either side of it


def near_the_limit(kind: str, payload: bytes) -> bool:
    size = int.from_bytes(payload[:8], "little")
    body = payload[8 + size :]
    if kind != "semantics" or not body or len(body) % 16:
        return False
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(np.frombuffer(body, "<f4").astype(np.float64).reshape(-1, 4), axis=1)
        return bool((np.abs(np.abs(norms - 1) - 1e-3) < BORDER).any())


def judge(schema: MessageSchema, payload: bytes) -> messages.Message | None:
    """What the product says; nothing but MessageError may come out of it."""
    try:
        return unpack(schema, payload)
    except MessageError:
        return None


@pytest.mark.slow
def test_mutated_messages_are_refused_or_are_messages() -> None:
    rng, outcomes = random.Random(20), Counter[tuple[str, bool]]()
    guard, seen = ReplayGuard(), set[str]()
    history: list[tuple[str, bytes]] = []
    for number in range(COUNT):
        mutate = MUTATIONS[number % len(MUTATIONS)] if number % 500 else oversized
        kind, header, body = original(rng)
        expected_round = int(header["__metadata__"]["round"])
        expected_client = header["__metadata__"]["client"]
        payload = mutate(rng, header, body)
        if history and rng.random() < 0.02:  # again, a message that was good before
            kind, payload = rng.choice(history)
        message, truth = judge(SCHEMAS[kind], payload), legitimate(kind, payload)
        if near_the_limit(kind, payload):
            continue
        assert (message is None) == (truth is None), (mutate.__name__, payload[:600])
        outcomes[mutate.__name__, message is not None] += 1
        if message is None or truth is None:
            continue
        fields, tensors = truth
        assert (message.kind, message.client, message.nonce) == (kind, fields["client"], fields["nonce"])
        assert message.round == int(fields["round"])
        assert message.payload == payload
        assert set(message.tensors) == set(tensors)
        for name, array in tensors.items():
            assert message.tensors[name].dtype == torch.float32
            assert tuple(message.tensors[name].shape) == array.shape
            assert message.tensors[name].numpy().tobytes() == array.tobytes()
        fits = int(fields["round"]) == expected_round and fields["client"] == expected_client
        try:
            guard.accept(message, expected_round, expected_client)
            taken = True
        except MessageError:
            taken = False
        assert taken == (fits and fields["nonce"] not in seen)
        if taken:
            seen.add(fields["nonce"])
            history.append((kind, payload))
    for mutate in [*MUTATIONS, oversized]:
        name = mutate.__name__
        assert outcomes[name, False] or name == "order", f"{name} was never refused: it tests nothing"
        assert outcomes[name, True] or name not in ACCEPTED_AT_TIMES, f"{name} was never accepted: too coarse"
    assert len(seen) > COUNT // 20


@pytest.mark.slow
def test_a_server_given_mutated_rounds_changes_nothing_or_takes_the_whole_round() -> None:
    rng, taken = random.Random(21), 0
    server = Server(KNNMix(), 4, TEMPLATE, FedAvg(), weighting="examples")
    for number in range(2_000):
        payloads, good = {}, True
        for client in ("a", "b"):
            kind = ""
            while kind != "teacher":
                kind, header, body = original(rng)
            header["__metadata__"] |= {"client": client, "round": str(number)}
            payloads[client] = assemble(header, body)
            if rng.random() < 0.5:
                payloads[client] = rng.choice(MUTATIONS)(rng, header, body)
            truth = legitimate("teacher", payloads[client])
            good &= truth is not None and truth[0]["client"] == client and truth[0]["round"] == str(number)
        before = {name: value.clone() for name, value in server.global_teacher.items()}
        nonces = server.guard.state_dict()
        try:
            server.aggregate_teacher(number, payloads)
            assert good
            taken += 1
            with pytest.raises(MessageError, match="replay"):
                server.aggregate_teacher(number, payloads)
        except MessageError:
            assert not good
            assert server.guard.state_dict() == nonces
            assert all(torch.equal(server.global_teacher[name], value) for name, value in before.items())
        assert all(torch.isfinite(value).all() for value in server.global_teacher.values())
    assert 200 < taken < 1_800


def test_the_size_limit_comes_before_any_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*args: object, **kwargs: object) -> None:
        pytest.fail("an oversized message was parsed")

    _, header, body = original(random.Random(1))
    schema = SCHEMAS["teacher"]
    monkeypatch.setattr(messages.json, "loads", parsed)
    monkeypatch.setattr(messages, "_load", parsed)
    monkeypatch.setattr(messages, "_header", parsed)
    payload = assemble(header, body)
    with pytest.raises(MessageError, match="exceeds the limit"):
        unpack(schema, payload + bytes(schema.max_bytes + 1 - len(payload)))
    with pytest.raises(pytest.fail.Exception, match="was parsed"):  # the trap works: one byte less is parsed
        unpack(schema, payload + bytes(schema.max_bytes - len(payload)))


def test_what_is_packed_is_a_message_to_the_independent_reader() -> None:
    generator = torch.Generator().manual_seed(3)
    for client in ("a", "shop 2", 'naïve "東京"\\', "x" * 128, "🙂/\x7e"):
        tensors = {name: torch.randn(value.shape, generator=generator) for name, value in TEMPLATE.items()}
        sent = messages.pack(SCHEMAS["teacher"], client, 12, {**tensors, "__weight__": torch.ones(1)})
        truth = legitimate("teacher", sent.payload)
        assert truth is not None
        assert truth[0]["client"] == client
        assert all(np.array_equal(truth[1][name], value.numpy()) for name, value in tensors.items())
