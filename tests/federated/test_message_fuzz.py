"""100,000 mutated messages: each is refused with MessageError, or is a message that an independent reader accepts too.

The messages are built here, byte by byte, and judged here by :func:`legitimate`, which shares no code with the product.
"""

import json
import math
import random
import string
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_sfubm.errors import MessageError
from lightning_sfubm.federated import messages
from lightning_sfubm.federated.aggregation import KNNMix
from lightning_sfubm.federated.messages import MessageSchema, ReplayGuard, semantics_schema, teacher_schema, unpack
from lightning_sfubm.federated.server import Server
from lightning_sfubm.federated.weights import FedAvg

COUNT = 100_000
Header = dict[str, Any]
Mutation = Callable[[random.Random, Header, bytes], bytes]
TEMPLATE = {"bias": torch.zeros(3), "weight": torch.zeros(3, 2), "scale": torch.zeros(())}
SCHEMAS = {
    "semantics": semantics_schema(4),
    "teacher": teacher_schema(TEMPLATE, with_weight=True),
}
#: what the two schemas say, said again: name -> (shape, bound, lower bound)
RULES = {
    "semantics": {"vectors": ((None, 4), 1e4, -1e4)},
    "teacher": {
        "__weight__": ((1,), 1e12, 0.0),
        "bias": ((3,), 1e4, -1e4),
        "scale": ((), 1e4, -1e4),
        "weight": ((3, 2), 1e4, -1e4),
    },
}


def text_of(header: object) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def assemble(header: object, body: bytes, pad: bool = True) -> bytes:
    raw = header if isinstance(header, bytes) else text_of(header)
    raw += b" " * (-len(raw) % 8) if pad else b""
    return len(raw).to_bytes(8, "little") + raw + body


def original(rng: random.Random) -> tuple[str, Header, bytes]:
    """A good message of either kind: kind, header and body."""
    kind = rng.choice(list(RULES))
    draw = np.random.default_rng(rng.getrandbits(32))
    fields = {"version": "1", "kind": kind, "client": rng.choice(["a", "shop 2", 'naïve "東京"\\'])}
    fields |= {"round": str(rng.choice([0, 1, 7, 120])), "nonce": f"{rng.getrandbits(128):032x}"}
    header: Header = {"__metadata__": fields}
    body = b""
    for name, (shape, _, low) in sorted(RULES[kind].items()):
        sizes = [rng.randint(1, 6) if size is None else size for size in shape]
        values = draw.standard_normal(sizes).astype("<f4")
        if kind == "semantics":
            values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype("<f4")
        data = (np.abs(values) if low == 0 else values).tobytes()
        header[name] = {"dtype": "F32", "shape": sizes, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return kind, header, body


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


# ---------------------------------------------------------------------- mutations


def flip(rng: random.Random, header: Header, body: bytes) -> bytes:
    payload = bytearray(assemble(header, body))
    for _ in range(rng.choice([1, 1, 2, 8])):
        payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
    return bytes(payload)


def overwrite(rng: random.Random, header: Header, body: bytes) -> bytes:
    payload = bytearray(assemble(header, body))
    start = rng.randrange(len(payload))
    chunk = rng.choice([b"\x00", b"\xff", b'"', b"{", b"}", b"\x80\x04}q\x00", rng.randbytes(rng.randint(1, 16))])
    payload[start : start + len(chunk)] = chunk
    return bytes(payload)


def truncate(rng: random.Random, header: Header, body: bytes) -> bytes:
    payload = assemble(header, body)
    return payload[: rng.randrange(len(payload))]


def extend(rng: random.Random, header: Header, body: bytes) -> bytes:
    payload, more = assemble(header, body), rng.randbytes(rng.randint(1, 64))
    return rng.choice([payload + more, more + payload, payload + payload])


def length_field(rng: random.Random, header: Header, body: bytes) -> bytes:
    payload = assemble(header, body)
    true = int.from_bytes(payload[:8], "little")
    size = rng.choice([0, 1, 2, true - 8, true - 1, true + 1, true + 8, len(payload), 1 << 20, 1 << 63, (1 << 64) - 1])
    return size.to_bytes(8, "little") + payload[8:]


def some_tensor(rng: random.Random, header: Header) -> Header:
    return header[rng.choice([name for name in header if name != "__metadata__"])]


def dtype(rng: random.Random, header: Header, body: bytes) -> bytes:
    kinds = [
        "F64",
        "F16",
        "BF16",
        "I32",
        "U32",
        "I64",
        "I8",
        "U8",
        "BOOL",
        "F8_E4M3",
        "F8_E5M2",
        "F4",
        "C64",
        "f32",
        "O",
    ]
    some_tensor(rng, header)["dtype"] = rng.choice([*kinds, "", None, 32, ["F32"], "F32\x00"])
    return assemble(header, body)


def shape(rng: random.Random, header: Header, body: bytes) -> bytes:
    about = some_tensor(rng, header)
    sizes = about["shape"]
    huge = [1 << 31, 1 << 62, (1 << 64) - 1, 1 << 64, 10**400]
    other: Any = [
        [*sizes, 1],
        sizes[:-1],
        [math.prod(sizes)],
        list(reversed(sizes)),
        [-n for n in sizes],
        [0, *sizes[1:]],
        [float(n) for n in sizes],
        [str(n) for n in sizes],
        [rng.choice(huge), *sizes[1:]],
        [rng.choice(huge), 0],
        [rng.choice(huge), rng.choice(huge)],
        [1] * rng.choice([5, 100, 5000]),
        None,
        "3",
        7,
        {"0": 3},
        [True],
        [sizes],
    ]
    about["shape"] = rng.choice(other)
    return assemble(header, body)


def offsets(rng: random.Random, header: Header, body: bytes) -> bytes:
    about = some_tensor(rng, header)
    start, end = about["data_offsets"]
    step = rng.choice([1, 4, 8])
    other: Any = [
        some_tensor(rng, header)["data_offsets"],
        [start + step, end + step],
        [start - step, end - step],
        [end, start],
        [start, end + step],
        [start, end - step],
        [-step, end],
        [start, 1 << 63],
        [(1 << 64) - step, end],
        [1 << 64, 1 << 65],
        [float(start), float(end)],
        [start],
        [start, end, end],
        None,
        {},
        "0,4",
        [str(start), str(end)],
        [True, end],
    ]
    about["data_offsets"] = rng.choice(other)
    return assemble(header, body)


def entries(rng: random.Random, header: Header, body: bytes) -> bytes:
    """Tensors missing, added, renamed, hidden beside another's description, or two under one extent."""
    name = rng.choice([name for name in header if name != "__metadata__"])
    action = rng.randrange(6)
    if action == 0:
        del header[name]
    elif action == 1:
        header[rng.choice(["user_ids", "weight.grad", "", "__metadata", name + " ", "VECTORS"])] = header.pop(name)
    elif action == 2:
        header["counts"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
        body += b"\x00\x00\x80\x3f"
    elif action == 3:
        header["empty"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
    elif action == 4:
        header[name][rng.choice(["user_ids", "note", "dtype ", "strides"])] = rng.choice(["u17", [1, 2, 3], None, {}])
    else:
        header[name] = rng.choice([None, [], "F32", 0, [header[name]]])
    return assemble(header, body)


def metadata(rng: random.Random, header: Header, body: bytes) -> bytes:
    fields = header["__metadata__"]
    name = rng.choice(list(fields))
    values = {
        "version": ["0", "2", "", "1 ", "01", "1.0", "١"],
        "kind": ["teacher", "semantics", "", "Teacher", "secagg"],
        "client": ["", "b", "a\n", "\x00", "x" * 129, "x" * 128, "a\u202e", "../../etc", "\ud800", "server"],
        "round": ["-1", "+1", "1e3", "00", "07", "٣", "3 ", " 3", "²", "", "9" * 9, "9" * 10, "9" * 5000, "1_0", "0x1"],
        "nonce": ["", "0" * 31, "0" * 33, "G" * 32, "A" * 32, "０" * 32, "0" * 32],
    }
    action = rng.randrange(5)
    if action == 0:
        del fields[name]
    elif action == 1:
        fields[rng.choice(["user_ids", "text", "", "client ", "Round"])] = "u1,u2,u3"
    elif action == 2:
        fields[name] = rng.choice([1, None, True, [], {}, 1.5, [fields[name]]])
    elif action == 3:
        header["__metadata__"] = rng.choice([None, [], "a", 3, {}, {"__metadata__": fields}])
    else:
        fields[name] = rng.choice(values[name])
    return assemble(header, body)


def repeated_keys(rng: random.Random, header: Header, body: bytes) -> bytes:
    """A second entry under a name that is there already: parsers differ in which they take."""
    raw = text_of(header)
    name = rng.choice([name for name in header if name != "__metadata__"])
    action = rng.randrange(4)
    if action == 0:
        raw = raw[:-1] + b"," + text_of(name) + b":" + text_of(header[name]) + b"}"
    elif action == 1:
        raw = raw[:-1] + b',"__metadata__":' + text_of(header["__metadata__"]) + b"}"
    elif action == 2:
        raw = raw.replace(b'"round":', b'"round":"5","round":', 1)
    else:
        raw = raw.replace(b'"dtype":', b'"dtype":"hidden","dtype":', 1)
    return assemble(raw, body)


def spelling(rng: random.Random, header: Header, body: bytes) -> bytes:
    """The same content in other words, which would leave room for a hidden message."""
    raw = text_of(header)
    action = rng.randrange(7)
    if action == 0:
        raw += b" " * (8 * rng.randint(1, 400))
    elif action == 1:
        raw = json.dumps(header).encode()
    elif action == 2:
        raw = raw.replace(b"F32", rb"\u0046\u0033\u0032", 1)
    elif action == 3:
        return assemble(raw, body, pad=False) if len(raw) % 8 else assemble(raw + b"\n", body)
    elif action == 4:
        raw = b" " + raw
    elif action == 5:
        raw = b"\xef\xbb\xbf" + raw
    else:
        raw = raw.replace(b"[0,", rng.choice([b"[-0,", b"[0.0,", b"[0e0,", b"[00,"]), 1)
    return assemble(raw, body)


def nonsense(rng: random.Random, header: Header, body: bytes) -> bytes:
    """Headers that are no header: deep, huge, broken, of other types, a pickle."""
    depth = rng.choice([10, 200, 5_000, 50_000])
    raw = rng.choice(
        [
            b"[" * depth,
            b'{"a":' * depth + b"1" + b"}" * depth,
            b'{"__metadata__":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}",
            b'{"a":' + b"9" * depth + b"}",
            b'{"a":1e999}',
            b'{"a":NaN}',
            b"null",
            b"[]",
            b'"text"',
            b"{}",
            b"\xff\xfe{}",
            b"cos\nsystem\n(S'true'\ntR.",
            rng.randbytes(64),
            text_of({"__metadata__": header["__metadata__"]}),
        ]
    )
    return rng.choice([assemble(raw, body), raw, assemble(raw, b"")])


def values(rng: random.Random, header: Header, body: bytes) -> bytes:
    """Other numbers in good form: some allowed, some not."""
    special = [
        math.nan,
        math.inf,
        -math.inf,
        3e38,
        1e-45,
        -1e-40,
        -0.0,
        0.0,
        1e4,
        -1e4,
        10001.0,
        1e12,
        1.1e12,
        -1.0,
        1.0,
    ]
    content = np.frombuffer(body, "<f4").copy()
    for _ in range(rng.randint(1, 3)):
        with np.errstate(over="ignore"):
            content[rng.randrange(len(content))] = rng.choice([*special, rng.gauss(0, 1)])
    return assemble(header, content.tobytes())


def signalling(rng: random.Random, header: Header, body: bytes) -> bytes:
    """Any bit pattern as a number."""
    content = bytearray(body)
    start = 4 * rng.randrange(len(body) // 4)
    content[start : start + 4] = rng.randbytes(4)
    return assemble(header, bytes(content))


def rows(rng: random.Random, header: Header, body: bytes) -> bytes:
    """Rows repeated, removed or turned; allowed where the schema leaves the number of rows free."""
    if "vectors" not in header:
        return values(rng, header, body)
    vectors = np.frombuffer(body, "<f4").reshape(-1, 4)
    vectors = np.concatenate([vectors, -vectors])[rng.randrange(len(vectors)) :] * np.float32(
        rng.choice([1, 1, 2, 0.9])
    )
    header["vectors"] = {"dtype": "F32", "shape": list(vectors.shape), "data_offsets": [0, vectors.nbytes]}
    return assemble(header, vectors.astype("<f4").tobytes())


def order(rng: random.Random, header: Header, body: bytes) -> bytes:
    """Entries in another order, which says the same."""
    items = list(header.items())
    rng.shuffle(items)
    shuffled = dict(items)
    fields = list(header["__metadata__"].items())
    rng.shuffle(fields)
    shuffled["__metadata__"] = dict(fields)
    return assemble(shuffled, body)


def oversized(rng: random.Random, header: Header, body: bytes) -> bytes:
    kind = header["__metadata__"]["kind"]
    if kind == "semantics":  # its limit is gigabytes; see the test of the limit
        return assemble(header, body + bytes(rng.randint(1, 5000)))
    return assemble(header, body) + bytes(SCHEMAS[kind].max_bytes)


MUTATIONS: list[Mutation] = [flip, overwrite, truncate, extend, length_field, dtype, shape, offsets, entries, metadata]
MUTATIONS += [repeated_keys, spelling, nonsense, values, signalling, rows, order]
ACCEPTED_AT_TIMES = {"flip", "overwrite", "metadata", "offsets", "values", "signalling", "rows", "order", "shape"}
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
