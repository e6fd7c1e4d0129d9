"""The protocol of secure aggregation: sums, dropouts, what the server sees, who may ask for what (T16, T17, T18)."""

import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sfubm.errors import ConfigError, MessageError, PrivacyError
from lightning_sfubm.privacy.secagg import primitives, shamir
from lightning_sfubm.privacy.secagg.client import adds, mask_purpose, seed_purpose
from lightning_sfubm.privacy.secagg.encoding import decode, encode
from lightning_sfubm.privacy.secagg.wire import SERVER, pack
from lightning_sfubm.privacy.secure_aggregation import STEPS, SecAggClient, SecAggServer, SecAggSettings, secure_sum

from .conftest import FOUR, SHAPES, Round, tensors, words

# --- The sum ---------------------------------------------------------------------------------------------------------

FORMS = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=3)
STEPS_OR_NONE = st.sampled_from([None, None, *STEPS])


@given(st.data(), st.integers(2, 8), FORMS, st.sampled_from([32, 64]), st.booleans())
@settings(derandomize=True, deadline=None, max_examples=120)
def test_the_secure_sum_is_the_plain_sum_whoever_drops_and_when(
    data: st.DataObject, number: int, forms: list[tuple[int, ...]], bits: int, weighted: bool
) -> None:
    names = [f"silo {i}" for i in range(number)]
    shapes = {f"layer.{i}": shape for i, shape in enumerate(forms)}
    threshold = data.draw(st.integers(number // 2 + 1, number))
    agreed = SecAggSettings(
        number, threshold, clip=2.0, fractional_bits=20, max_weight=100.0 if bits == 64 else 1.0, modulus_bits=bits
    )
    gone = {name: step for name in names if (step := data.draw(STEPS_OR_NONE)) is not None}
    vectors = {name: tensors(i, shapes) for i, name in enumerate(names)}
    weights = {name: data.draw(st.floats(0, agreed.max_weight)) for name in names} if weighted else None
    finished = [name for name in names if name not in gone]
    summed = [name for name in names if gone.get(name, "unmask") == "unmask"]
    if len(finished) < threshold:
        with pytest.raises(PrivacyError, match="threshold"):
            secure_sum(vectors, agreed, weights=weights, dropped=gone)
        return
    total = secure_sum(vectors, agreed, weights=weights, dropped=gone)
    assert total.clients == tuple(summed)
    step = len(summed) / 2 * 2.0**-20 * (1 + 1e-9)  # half a unit of the last place for each client
    scale = weights or dict.fromkeys(names, 1.0)
    assert total.weight == pytest.approx(sum(scale[name] for name in summed), abs=step)
    assert {name: tuple(value.shape) for name, value in total.tensors.items()} == shapes
    for key, value in total.tensors.items():
        plain = torch.zeros(shapes[key], dtype=torch.float64)
        for name in summed:
            plain += scale[name] * vectors[name][key].double()
        torch.testing.assert_close(value, plain, rtol=0, atol=step)


def test_the_mean_is_the_weighted_mean_of_the_survivors() -> None:
    vectors, weights = {name: tensors(i) for i, name in enumerate("abcd")}, {"a": 10.0, "b": 1.0, "c": 0.0, "d": 4.0}
    agreed = SecAggSettings(4, max_weight=16.0)
    mean = secure_sum(vectors, agreed, weights=weights, dropped={"d": "mask_input"}).mean()
    for key in SHAPES:
        torch.testing.assert_close(
            mean[key], (10 * vectors["a"][key] + vectors["b"][key]).double() / 11, rtol=0, atol=1e-6
        )
    assert secure_sum(vectors, agreed, weights=dict.fromkeys("abcd", 0.0)).mean() == {}


def test_the_order_of_clients_tensors_and_messages_does_not_matter() -> None:
    vectors = {name: tensors(i) for i, name in enumerate("abcd")}
    first = secure_sum(vectors, FOUR)
    second = secure_sum({n: dict(reversed(vectors[n].items())) for n in "dbca"}, FOUR)
    assert (first.clients, first.weight) == (second.clients, second.weight)
    assert all(torch.equal(first.tensors[k], second.tensors[k]) for k in SHAPES)
    held = Round().to("unmask")
    sums = held.server.collect_reveals(dict(reversed(held.sent["unmask"].items())))
    assert all(torch.equal(first.tensors[k], sums.tensors[k]) for k in SHAPES)


def test_any_threshold_of_replies_gives_the_sum() -> None:
    for absent in "abcd":
        held = Round().to("unmask", {absent: "unmask"})
        total = held.server.collect_reveals(held.sent["unmask"])
        plain = sum(held.inputs[name]["w"].double() for name in "abcd")
        torch.testing.assert_close(total.tensors["w"], plain, rtol=0, atol=4 * 2.0**-25)


def test_keys_and_seeds_are_gone_once_the_input_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gets hold of a client afterwards finds shares, one of each secret, which say nothing."""
    made: list[bytes] = []
    draw, split = primitives.new_private_key, shamir.split

    def drawn() -> bytes:
        made.append(draw())
        return made[-1]

    def shared(secret: bytes, threshold: int, count: int) -> list[bytes]:
        made.append(secret)
        return split(secret, threshold, count)

    monkeypatch.setattr(primitives, "new_private_key", drawn)
    monkeypatch.setattr(shamir, "split", shared)

    def found(held: Round) -> set[bytes]:
        content = b"".join(pickle.dumps(vars(client)) for client in held.clients.values())
        return {secret for secret in made if secret in content}

    assert found(Round().to("share_keys")) == set(made)
    assert len(set(made)) == 4 * 3  # two keys and a seed a client
    assert not found(Round().to("mask_input"))
    assert len(set(made)) == 2 * 4 * 3


# --- What the server sees --------------------------------------------------------------------------------------------

ALARM = (
    1e-7  # false-alarm level of each chi-square test below; some 25 are made, so a sound build fails 1 run in 400,000
)


def survival(statistic: float, degrees: int) -> float:
    """P(chi-square with ``degrees`` >= ``statistic``)."""
    return float(torch.special.gammaincc(torch.tensor(degrees / 2).double(), torch.tensor(statistic / 2).double()))


def uniform_p(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return survival(float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1)


def same_p(first: np.ndarray, second: np.ndarray) -> float:
    """Homogeneity of two samples of equal size."""
    return survival(float(((first - second) ** 2 / np.maximum(first + second, 1)).sum()), len(first) - 1)


def byte_counts(values: np.ndarray) -> np.ndarray:
    """How often each byte value stands at each of a word's byte positions: (8, 256)."""
    table = values.view(np.uint8).reshape(-1, 8)
    return np.stack([np.bincount(table[:, i], minlength=256) for i in range(8)]).astype(float)


def test_a_masked_input_looks_like_random_words_whatever_the_vector_is() -> None:
    shapes, rounds, size = {"x": (4096,)}, 16, 4097  # 65,552 words each: 256 of each byte value expected at a position
    seen = {}
    for value in (0.0, 16.0):
        drawn = []
        for number in range(rounds):
            held = Round("abc", SecAggSettings(3), shapes, number)
            held.inputs["b"] = {"x": torch.full((4096,), value)}
            held.to("mask_input")
            drawn.append(words(held.sent["mask_input"]["b"], size))
        seen[value] = byte_counts(np.concatenate(drawn))
    for position in range(8):
        assert uniform_p(seen[0.0][position]) > ALARM
        assert uniform_p(seen[16.0][position]) > ALARM
        assert same_p(seen[0.0][position], seen[16.0][position]) > ALARM
    # The tests have power: the same vectors before masking fail them.
    bare = {v: byte_counts(encode({"x": torch.full((4096,), v)}, 1.0, shapes, SecAggSettings(3))) for v in seen}
    assert uniform_p(bare[0.0][0]) < 1e-300
    assert same_p(bare[0.0][3], bare[16.0][3]) < 1e-300


def test_the_same_input_is_masked_differently_every_round_and_session() -> None:
    shapes, sent = {"x": (1000,)}, []
    for number in (1, 2, 2):
        held = Round("abc", SecAggSettings(3), shapes, number)
        held.inputs = {name: {"x": torch.ones(1000)} for name in "abc"}
        held.to("mask_input")
        sent += [words(held.sent["mask_input"][name], 1001) for name in "abc"]
    # 36 pairs of 1,001 words of 64 bits: a chance coincidence has probability 2e-15.
    for i, first in enumerate(sent):
        for second in sent[i + 1 :]:
            assert not (first == second).any()


def test_a_late_input_stays_hidden_after_its_mask_key_was_recovered() -> None:
    shapes = {"x": (4095,)}
    held = Round(shapes=shapes).to("share_keys")
    seed = held.clients["a"]._secrets["seed"]
    boxes = held.server.collect_shares(held.sent["share_keys"])
    sent = {name: client.mask_input(boxes[name], held.inputs[name]) for name, client in held.clients.items()}
    late = words(sent.pop("a"), 4096)
    request = held.server.collect_inputs(sent)
    replies = {name: held.clients[name].unmask(request) for name in "bcd"}
    held.server.collect_reveals(replies)
    # What the server knows now: the mask key of a, and with it all masks a shares with others.
    shares = {
        point: held.fields("reveal", replies[name], name)["key_shares"]["a"]
        for point, name in enumerate("bcd", start=2)
    }
    private = shamir.recover(shares, 3)
    for other in "bcd":
        public = held.fields("roster", held.roster, SERVER)["mask_keys"][other]
        key = primitives.agree(private, public, held.server._salt, mask_purpose("a", other))
        mask = primitives.mask(key, 4096, np.dtype("<u8"))
        late = late - mask if adds("a", other) else late + mask
    assert uniform_p(byte_counts(late).sum(axis=0)) > ALARM
    with pytest.raises(MessageError, match="beyond"):
        decode(late, 1, shapes, FOUR)
    # Only the seed, which no survivor gives away for a client reported as dropped, uncovers it.
    own = primitives.mask(primitives.derive(seed, held.server._salt, seed_purpose("a")), 4096, np.dtype("<u8"))
    uncovered, _ = decode(late - own, 1, shapes, FOUR)
    torch.testing.assert_close(uncovered["x"], held.inputs["a"]["x"].double(), rtol=0, atol=2.0**-25)


# --- Thresholds and secrets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_fewer_survivors_than_the_threshold_end_the_round_without_a_sum(step: str) -> None:
    vectors = {name: tensors(i) for i, name in enumerate("abcd")}
    assert secure_sum(vectors, FOUR, dropped={"b": step}).weight == (4 if step == "unmask" else 3)
    with pytest.raises(PrivacyError, match=r"2 clients are left at step '.*', fewer than the threshold of 3"):
        secure_sum(vectors, FOUR, dropped={"b": step, "d": step})


def test_clients_refuse_a_server_that_goes_on_below_the_threshold() -> None:
    held = Round().to("advertise_keys")
    own = held.fields("keys", held.sent["advertise_keys"]["a"], "a")
    lone = {"channel_keys": {"a": own["channel_key"]}, "mask_keys": {"a": own["mask_key"]}}
    with pytest.raises(PrivacyError, match="1 clients are on the roster"):
        held.clients["a"].share_keys(held.remake("roster", SERVER, lone))
    held = Round().to("share_keys")
    box = held.server.collect_shares(held.sent["share_keys"])["a"]
    sealed = held.fields("mailbox", box, SERVER)["sealed"]
    with pytest.raises(PrivacyError, match="2 clients have shared their keys"):
        held.clients["a"].mask_input(held.remake("mailbox", SERVER, {"sealed": {"b": sealed["b"]}}), held.inputs["a"])
    held = Round().to("mask_input")
    with pytest.raises(PrivacyError, match="2 clients have sent"):
        held.clients["a"].unmask(held.remake("request", SERVER, {"survivors": ["a", "b"], "dropped": ["c", "d"]}))


def test_a_client_never_gives_both_secrets_of_one_client() -> None:
    held = Round().to("mask_input")
    client, b_too = held.clients["a"], {"survivors": list("abcd"), "dropped": ["b"]}
    with pytest.raises(PrivacyError, match=r"both secrets of \['b'\]"):
        client.unmask(held.remake("request", SERVER, b_too))
    reply = client.unmask(held.remake("request", SERVER, {"survivors": list("abcd"), "dropped": []}))
    assert held.fields("reveal", reply, "a")["key_shares"] == {}
    with pytest.raises(MessageError, match="taken once"):  # the other secret in a second request
        client.unmask(held.remake("request", SERVER, {"survivors": list("acd"), "dropped": ["b"]}))


@pytest.mark.parametrize("lists", [("abc", ""), ("abcd", "e"), ("bcd", "a"), ("abcde", "")])
def test_a_client_answers_only_for_the_clients_it_shared_keys_with(lists: tuple[str, str]) -> None:
    held = Round(settings=SecAggSettings(5)).to("mask_input")
    request = pack("request", SERVER, 3, held.session, {"survivors": list(lists[0]), "dropped": list(lists[1])})
    with pytest.raises(MessageError, match="request to unmask"):
        held.clients["a"].unmask(request)


def test_the_server_refuses_both_secrets_of_one_client() -> None:
    held = Round().to("unmask", {"d": "mask_input"})
    fields = held.fields("reveal", held.sent["unmask"]["a"], "a")
    fields["key_shares"] |= {"b": b"\1" * 33}
    before = dict(held.sent["unmask"])
    held.sent["unmask"]["a"] = held.remake("reveal", "a", fields)
    with pytest.raises(PrivacyError, match=r"'a' offers shares of both secrets of \['b'\]"):
        held.server.collect_reveals(held.sent["unmask"])
    assert held.server.collect_reveals(before).clients == ("a", "b", "c")  # the refused step changed nothing


def test_a_reply_lacking_a_share_is_refused() -> None:
    held = Round().to("unmask", {"d": "mask_input"})
    fields = held.fields("reveal", held.sent["unmask"]["a"], "a")
    del fields["seed_shares"]["b"]
    with pytest.raises(MessageError, match="'a' does not answer"):
        held.server.collect_reveals(held.sent["unmask"] | {"a": held.remake("reveal", "a", fields)})


# --- The optional package --------------------------------------------------------------------------------------------


def test_without_the_package_one_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for make in (lambda: SecAggServer(FOUR, SHAPES), lambda: SecAggClient("a", FOUR, SHAPES)):
        with pytest.raises(ConfigError, match=r"lightning-sfubm\[secagg\]"):
            make()
