"""Fixed point, secret sharing, the primitives' published vectors, and the form of the messages (T16, T18)."""

import json
import pickle
import struct
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sfubm.errors import ConfigError, MessageError, PrivacyError
from lightning_sfubm.privacy.secagg import primitives, shamir
from lightning_sfubm.privacy.secagg.encoding import decode, encode
from lightning_sfubm.privacy.secagg.wire import KINDS, MAGIC, Envelope, pack, unpack
from lightning_sfubm.privacy.secure_aggregation import SecAggClient, SecAggServer, SecAggSettings, secure_sum

SHAPE = {"x": (3,)}


# --- Fixed point -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_clients": 1}, "its own vector"),
        ({"threshold": 2}, "more than half"),
        ({"threshold": 5}, "at most all"),
        ({"threshold": 0}, "more than half"),
        ({"modulus_bits": 16}, "32 or 64"),
        ({"fractional_bits": 53}, "0 to 52"),
        ({"clip": 0.0}, "clip"),
        ({"clip": float("nan")}, "clip"),
        ({"clip": float("inf")}, "clip"),
        ({"max_weight": -1.0}, "max_weight"),
        ({"modulus_bits": 32, "clip": 32.0}, "could wrap"),  # 4 clients x 2^5 x 2^24 = 2^31
        ({"modulus_bits": 32, "max_weight": 2.0}, "could wrap"),
        ({"modulus_bits": 32, "clip": 0.5, "max_weight": 32.0}, "could wrap"),  # the weights' own word
        ({"modulus_bits": 32, "num_clients": 8}, "could wrap"),
        ({"clip": 2.0**30}, "could wrap"),  # one client's word beyond what float64 holds exactly
    ],
)
def test_settings_that_are_wrong_or_could_wrap_are_refused(changes: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        SecAggSettings(**{"num_clients": 4, **changes})


def test_the_default_threshold_is_the_smallest_majority() -> None:
    assert [SecAggSettings(n).t for n in range(2, 9)] == [2, 2, 3, 3, 4, 4, 5]


@pytest.mark.parametrize(
    "settings",
    [
        SecAggSettings(4, clip=31.99, fractional_bits=24, modulus_bits=32),
        SecAggSettings(4, clip=2.0**9, max_weight=2.0**20, fractional_bits=24),
        SecAggSettings(1023, clip=2.0**20, max_weight=2.0**33, fractional_bits=0),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_widest_settings_accepted_hold_the_largest_sum(settings: SecAggSettings, sign: int) -> None:
    largest = {"x": torch.full((3,), sign * settings.clip, dtype=torch.float64)}
    one = encode(largest, settings.max_weight, SHAPE, settings)
    total = np.zeros_like(one)
    for _ in range(settings.num_clients):
        total += one
    sums, weight = decode(total, settings.num_clients, SHAPE, settings)
    expected = sign * settings.num_clients * settings.clip * settings.max_weight
    step = settings.num_clients / 2 * 2.0**-settings.fractional_bits
    torch.testing.assert_close(sums["x"], torch.full((3,), expected).double(), rtol=1e-7, atol=step)
    assert weight == settings.num_clients * settings.max_weight


def test_values_beyond_the_clip_range_are_refused_or_brought_to_it_where_asked() -> None:
    vectors = {name: {"x": torch.tensor([0.25, 3.0, -9.0])} for name in "ab"}
    with pytest.raises(MessageError, match=r"'x' holds a value beyond the clip range \+-4"):
        secure_sum(vectors, SecAggSettings(2, clip=4.0))
    total = secure_sum(vectors, SecAggSettings(2, clip=4.0, saturate=True))
    assert total.tensors["x"].tolist() == [0.5, 6.0, -8.0]


@pytest.mark.parametrize(
    ("tensor", "weight", "word"),
    [
        (torch.tensor([1.0, float("nan"), 0.0]), 1.0, "NaN"),
        (torch.tensor([1.0, -float("inf"), 0.0]), 1.0, "NaN or infinite"),
        (torch.ones(4), 1.0, r"shape \(4,\)"),
        (torch.ones(3, 1), 1.0, "shape"),
        (torch.ones(3, dtype=torch.long), 1.0, "floats"),
        (torch.ones(3), -0.1, "weight"),
        (torch.ones(3), 1.1, "weight"),
        (torch.ones(3), float("nan"), "weight"),
    ],
)
def test_inputs_out_of_form_are_refused(tensor: torch.Tensor, weight: float, word: str) -> None:
    for saturate in (False, True):
        with pytest.raises(MessageError, match=word):
            encode({"x": tensor}, weight, SHAPE, SecAggSettings(2, saturate=saturate))


def test_half_precision_and_double_precision_are_taken() -> None:
    vectors = {"a": {"x": torch.full((3,), 0.5, dtype=torch.float16)}, "b": {"x": torch.full((3,), 0.25).double()}}
    assert secure_sum(vectors, SecAggSettings(2)).tensors["x"].tolist() == [0.75] * 3


def test_a_32_bit_word_halves_the_masked_input() -> None:
    sizes = {}
    for bits in (32, 64):
        agreed = SecAggSettings(2, modulus_bits=bits)
        server, clients = SecAggServer(agreed, SHAPE), [SecAggClient(n, agreed, SHAPE) for n in "ab"]
        invite = server.invite()
        roster = server.collect_keys({c.name: c.advertise_keys(invite) for c in clients})
        boxes = server.collect_shares({c.name: c.share_keys(roster) for c in clients})
        sizes[bits] = len(clients[0].mask_input(boxes["a"], {"x": torch.ones(3)}))
    assert sizes[64] - sizes[32] == 4 * 4  # three elements and the weight


# --- Secret sharing --------------------------------------------------------------------------------------------------


def test_the_field_is_a_prime_field() -> None:
    # Miller-Rabin to 40 bases: a composite passes with probability below 4^-40.
    odd, twos = shamir.PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        power = pow(base, odd, shamir.PRIME)
        chain = [power]
        for _ in range(twos - 1):
            chain.append(chain[-1] ** 2 % shamir.PRIME)
        assert power == 1 or shamir.PRIME - 1 in chain


@given(st.binary(min_size=32, max_size=32), st.integers(2, 6), st.integers(0, 3))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_any_threshold_of_shares_recovers_and_fewer_are_refused(secret: bytes, threshold: int, spare: int) -> None:
    shares = dict(enumerate(shamir.split(secret, threshold, threshold + spare), start=1))
    for points in combinations(shares, threshold):
        assert shamir.recover({p: shares[p] for p in points}, threshold) == secret
    with pytest.raises(PrivacyError, match="shares of a secret"):
        shamir.recover({p: shares[p] for p in list(shares)[: threshold - 1]}, threshold)


def test_shares_are_drawn_anew_and_one_under_the_threshold_fits_any_secret() -> None:
    first, second = shamir.split(bytes(32), 2, 3), shamir.split(bytes(32), 2, 3)
    assert all(a != b for a, b in zip(first, second, strict=True))
    # The line through share 1 and any guessed secret has another point at 2: share 1 excludes no secret.
    value = int.from_bytes(first[0], "big")
    for guess in (0, 1, 2**255):
        made_up = ((2 * value - guess) % shamir.PRIME).to_bytes(33, "big")
        assert shamir.recover({1: first[0], 2: made_up}, 2) == guess.to_bytes(32, "big")


def test_shares_outside_the_field_or_of_no_32_byte_secret_are_refused() -> None:
    with pytest.raises(MessageError, match="not an element"):
        shamir.recover({1: shamir.PRIME.to_bytes(33, "big"), 2: bytes(33)}, 2)
    constant = (2**256).to_bytes(33, "big")
    with pytest.raises(MessageError, match="do not belong to one secret"):
        shamir.recover({1: constant, 2: constant}, 2)


# --- Primitives ------------------------------------------------------------------------------------------------------


def test_hkdf_gives_the_first_vector_of_rfc_5869() -> None:
    key = primitives.derive(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)))
    assert key.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"


def test_a_mask_is_the_chacha20_key_stream_of_rfc_8439() -> None:
    # Appendix A.1, test vector 1: zero key, nonce and counter.
    stream = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    assert primitives.mask(bytes(32), 4, np.dtype("<u8")).tolist() == list(struct.unpack("<4Q", stream))
    assert primitives.mask(bytes(32), 8, np.dtype("<u4")).tolist() == list(struct.unpack("<8I", stream))


def test_both_ends_agree_on_one_key_a_round_and_purpose() -> None:
    one, two = primitives.new_private_key(), primitives.new_private_key()
    key = primitives.agree(one, primitives.public_key(two), b"roster", b"purpose")
    assert key == primitives.agree(two, primitives.public_key(one), b"roster", b"purpose")
    assert key != primitives.agree(one, primitives.public_key(two), b"another roster", b"purpose")
    assert key != primitives.agree(one, primitives.public_key(two), b"roster", b"another purpose")
    assert primitives.label("ab", "c") != primitives.label("a", "bc")


# --- Messages --------------------------------------------------------------------------------------------------------

SESSION = "0f" * 16
EXAMPLES: dict[str, dict[str, Any]] = {
    "invite": {"agreement": b"\1" * 32},
    "keys": {"channel_key": b"\1" * 32, "mask_key": b"\2" * 32},
    "roster": {"channel_keys": {"a": b"\1" * 32, 'b"ü': b"\2" * 32}, "mask_keys": {"a": b"\3" * 32, 'b"ü': b"\4" * 32}},
    "shares": {"commitment": b"\5" * 32, "sealed": {"b": b"\6" * 94}},
    "mailbox": {"sealed": {"b": b"\6" * 94}},
    "input": {},
    "request": {"survivors": ["a", "b"], "dropped": []},
    "reveal": {"seed_shares": {"a": b"\7" * 33}, "key_shares": {"b": bytes(33)}},
}


def body_of(kind: str) -> bytes:
    return b"\xaa" * 32 if kind == "input" else b""


def take(kind: str, payload: bytes, **changes: Any) -> Envelope:
    due = {"sender": "a", "round": 3, "session": SESSION, "clients": 4, "body_bytes": len(body_of(kind))}
    return unpack(kind, payload, **{**due, **changes})


def raw(header: object, body: bytes = b"") -> bytes:
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return MAGIC + len(text).to_bytes(4, "little") + text + body


@pytest.mark.parametrize("kind", list(KINDS))
def test_messages_round_trip(kind: str) -> None:
    envelope = take(kind, pack(kind, "a", 3, SESSION, EXAMPLES[kind], body_of(kind)))
    assert envelope == Envelope(SESSION, EXAMPLES[kind], body_of(kind))


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_message_without_or_with_one_more_of_anything_is_refused(kind: str) -> None:
    fields = json.loads(pack(kind, "a", 3, SESSION, EXAMPLES[kind])[12:])["fields"]
    good = {"client": "a", "fields": fields, "kind": kind, "round": 3, "session": SESSION}
    assert take(kind, raw(good, body_of(kind))).fields == EXAMPLES[kind]
    wrong: list[object] = [
        *({k: v for k, v in good.items() if k != left_out} for left_out in good),
        {**good, "user_ids": "17"},
        {**good, "fields": {**fields, "count": "17"}},
        *({**good, "fields": {k: v for k, v in fields.items() if k != left_out}} for left_out in fields),
        *({**good, "fields": {**fields, name: value}} for name in fields for value in BAD_VALUES),
        *({**good, "round": value} for value in ("3", 3.0, True, 4, -3, None)),
        *({**good, "session": value} for value in ("0f" * 15, "0F" * 16, "zz" * 16, None, 7)),
        *({**good, "client": value} for value in ("b", "", None, ["a"])),
        *({**good, "kind": value} for value in ("order", None, ["invite"])),
        [good],
        "text",
    ]
    for header in wrong:
        with pytest.raises(MessageError):
            take(kind, raw(header, body_of(kind)))
    for body in (b"", b"\xaa" * 31, b"\xaa" * 33) if kind == "input" else (b"\xaa",):
        with pytest.raises(MessageError, match="body"):
            take(kind, raw(good, body))


BAD_VALUES = [
    None,
    17,
    "01" * 31,
    "zz" * 32,
    "AB" * 32,
    {"a": "01" * 31},
    {"a": 1},
    {"": "01" * 32},
    {"a\n": "01" * 32},
    {"a" * 129: "01" * 32},
    {"a": None},
    ["b", "a"],
    ["a", "a"],
    [1],
    [["a"]],
    [str(i) for i in range(5)],
    {str(i): "01" * 32 for i in range(5)},
]


def test_a_second_spelling_of_a_message_is_refused() -> None:
    payload = pack("invite", "a", 3, SESSION, EXAMPLES["invite"])
    header = payload[12:]
    for text in (
        header.replace(b":", b": ", 1),
        b" " + header,
        header.replace(b'"client":"a"', b'"client":"\\u0061"'),
        header[:-1] + b',"round":3}',
        b'{"round":3,' + header[1:].replace(b',"round":3', b""),
        header.replace(b'"round":3', b'"round":3e0'),
    ):
        assert text != header
        with pytest.raises(MessageError, match="canonical"):
            take("invite", MAGIC + len(text).to_bytes(4, "little") + text)


def test_what_is_not_a_message_is_refused() -> None:
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    nested = b"[" * 4000
    for payload in (
        b"",
        MAGIC,
        pickle.dumps(Bomb()),
        bytes(64),
        MAGIC + b"\xff\xff\xff\xff{}",
        MAGIC + (4).to_bytes(4, "little") + b"\xff\xfe\xfd\xfc",
        MAGIC + (4000).to_bytes(4, "little") + nested,
        MAGIC + (3).to_bytes(4, "little") + b"NaN",
        MAGIC + (8).to_bytes(4, "little") + b'"\\ud800"',
    ):
        with pytest.raises(MessageError):
            take("invite", payload)
    with pytest.raises(MessageError, match="must be bytes, not str"):
        take("invite", "text")  # type: ignore[arg-type]
    with pytest.raises(MessageError, match="more than the limit"):
        take("invite", b"\xff" * 100_000)


@given(st.sampled_from(list(KINDS)), st.integers(0, 10_000), st.integers(0, 255), st.booleans())
@settings(derandomize=True, deadline=None, max_examples=400)
def test_mutated_messages_are_refused_or_still_in_form(kind: str, position: int, value: int, cut: bool) -> None:
    payload = bytearray(pack(kind, "a", 3, SESSION, EXAMPLES[kind], body_of(kind)))
    position %= len(payload)
    if cut:
        payload = payload[:position]
    else:
        payload[position] = value
    try:
        envelope = take(kind, bytes(payload))
    except MessageError:
        return
    assert not cut
    assert pack(kind, "a", 3, SESSION, envelope.fields, envelope.body) == bytes(payload)


@pytest.mark.parametrize("name", ["", "x" * 129, "line\nbreak", 7])
def test_clients_need_a_name(name: Any) -> None:
    with pytest.raises(MessageError, match="printable"):
        SecAggClient(name, SecAggSettings(2), SHAPE)


@pytest.mark.parametrize("number", [-1, 10**9])
def test_rounds_are_numbers_a_header_holds(number: int) -> None:
    with pytest.raises(MessageError, match="round"):
        SecAggServer(SecAggSettings(2), SHAPE, number)
