"""Messages built byte by byte, and what can be done to them on their way."""

import json
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lightning_sfubm.federated.messages import semantics_schema, teacher_schema

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
