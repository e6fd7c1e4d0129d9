"""Secure aggregation refuses altered, replayed, misdirected and ill-fitting messages (T16)."""

import pytest
import torch

from lightning_sfubm.errors import ConfigError, MessageError
from lightning_sfubm.privacy.secagg import primitives, shamir
from lightning_sfubm.privacy.secagg.wire import SERVER
from lightning_sfubm.privacy.secure_aggregation import STEPS, SecAggClient, SecAggServer, SecAggSettings, secure_sum

from .conftest import FOUR, SHAPES, Round, tensors


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize("position", [0, 11, 12, 44, 45, 77, 78, 93])  # nonce, both shares, authentication tag
def test_a_tampered_ciphertext_is_refused(position: int) -> None:
    held = Round().to("share_keys")
    sealed = held.fields("mailbox", held.server.collect_shares(held.sent["share_keys"])["a"], SERVER)["sealed"]
    sealed["c"] = flipped(sealed["c"], position)
    with pytest.raises(MessageError, match="sealed share was altered"):
        held.clients["a"].mask_input(held.remake("mailbox", SERVER, {"sealed": sealed}), held.inputs["a"])


def test_ciphertexts_of_another_sender_receiver_or_direction_are_refused() -> None:
    held = Round().to("share_keys")
    boxes = held.server.collect_shares(held.sent["share_keys"])
    box = {name: held.fields("mailbox", payload, SERVER)["sealed"] for name, payload in boxes.items()}
    for wrong in (box["a"] | {"b": box["a"]["c"]}, box["a"] | {"b": box["c"]["b"]}, box["a"] | {"b": box["b"]["a"]}):
        with pytest.raises(MessageError, match="sealed share was altered"):
            held.clients["a"].mask_input(held.remake("mailbox", SERVER, {"sealed": wrong}), held.inputs["a"])
    stranger = {"e": box["a"]["b"], "c": box["a"]["c"], "d": box["a"]["d"]}
    with pytest.raises(MessageError, match="not on the roster"):
        held.clients["a"].mask_input(held.remake("mailbox", SERVER, {"sealed": stranger}), held.inputs["a"])
    assert held.clients["a"].mask_input(boxes["a"], held.inputs["a"])  # refused mailboxes changed nothing


SECRETS = [("seed_shares", "b", "seed of client 'b'"), ("key_shares", "d", "mask key of client 'd'")]


@pytest.mark.parametrize(("kind", "owner", "word"), SECRETS)
@pytest.mark.parametrize("position", [0, 1, 32])
def test_a_tampered_share_is_refused(kind: str, owner: str, word: str, position: int) -> None:
    held = Round().to("unmask", {"d": "mask_input"})
    fields = held.fields("reveal", held.sent["unmask"]["a"], "a")
    fields[kind][owner] = flipped(fields[kind][owner], position)
    altered = held.sent["unmask"] | {"a": held.remake("reveal", "a", fields)}
    # Byte 0 is 0 in a field element (but for 297 of 2^256): flipped, the share leaves the field.
    with pytest.raises(MessageError, match=word if position else "not an element of its field"):
        held.server.collect_reveals(altered)
    total = held.server.collect_reveals(held.sent["unmask"])  # the refused step has not begun to remove masks
    plain = sum(held.inputs[name]["w"].double() for name in "abc")
    torch.testing.assert_close(total.tensors["w"], plain, rtol=0, atol=3 * 2.0**-25)


def test_a_key_that_differs_only_in_bits_the_exchange_ignores_is_refused() -> None:
    held = Round().to("unmask", {"d": "mask_input"})
    fields = held.fields("reveal", held.sent["unmask"]["a"], "a")
    # Interpolated from the points 1, 2, 3 the secret holds share 1 three times: share 1 + 128/3 sets the top bit of the
    # key's last byte, and the public key stays the same.
    share = int.from_bytes(fields["key_shares"]["d"], "big") + 128 * pow(3, -1, shamir.PRIME)
    fields["key_shares"]["d"] = (share % shamir.PRIME).to_bytes(33, "big")
    with pytest.raises(MessageError, match="mask key of client 'd'"):
        held.server.collect_reveals(held.sent["unmask"] | {"a": held.remake("reveal", "a", fields)})


def test_an_altered_input_that_leaves_the_range_is_noticed() -> None:
    held = Round().to("mask_input")
    payload = held.sent["mask_input"]["a"]
    held.sent["mask_input"]["a"] = payload[:-1] + bytes([payload[-1] ^ 0x40])  # the top byte of the weight's word
    request = held.server.collect_inputs(held.sent["mask_input"])
    with pytest.raises(MessageError, match="beyond what 4 clients can send"):
        held.server.collect_reveals({name: client.unmask(request) for name, client in held.clients.items()})


def test_a_roster_with_exchanged_or_repeated_keys_is_refused() -> None:
    held = Round().to("advertise_keys")
    roster = held.server.collect_keys(held.sent["advertise_keys"])
    for kind in ("channel_keys", "mask_keys"):
        fields = held.fields("roster", roster, SERVER)
        fields[kind]["a"] = primitives.public_key(primitives.new_private_key())
        with pytest.raises(MessageError, match="does not carry the keys of client 'a'"):
            held.clients["a"].share_keys(held.remake("roster", SERVER, fields))
        fields = held.fields("roster", roster, SERVER)
        fields[kind]["c"] = fields[kind]["b"]
        with pytest.raises(MessageError, match="one public key for two"):
            held.clients["a"].share_keys(held.remake("roster", SERVER, fields))
    fields = held.fields("roster", roster, SERVER)
    fields["channel_keys"]["b"] = bytes(32)  # the point 0, with which every private key agrees on 0
    with pytest.raises(MessageError, match="not a usable X25519 key"):
        held.clients["a"].share_keys(held.remake("roster", SERVER, fields))


def test_clients_with_different_rosters_do_not_end_in_one_sum() -> None:
    held = Round().to("advertise_keys")
    roster = held.server.collect_keys(held.sent["advertise_keys"])
    fields = held.fields("roster", roster, SERVER)
    fields["mask_keys"]["d"] = primitives.public_key(primitives.new_private_key())
    other = held.remake("roster", SERVER, fields)
    shares = {name: held.clients[name].share_keys(other if name == "a" else roster) for name in "abcd"}
    boxes = held.server.collect_shares(shares)
    with pytest.raises(MessageError, match="sealed share was altered"):
        held.clients["b"].mask_input(boxes["b"], held.inputs["b"])


COLLECT = {
    "advertise_keys": "collect_keys",
    "share_keys": "collect_shares",
    "mask_input": "collect_inputs",
    "unmask": "collect_reveals",
}


@pytest.mark.parametrize("step", STEPS)
def test_the_server_refuses_replays_and_messages_of_other_rounds_steps_and_senders(step: str) -> None:
    held, old, next_round = Round().to(step), Round().to(step), Round(round=4).to(step)
    collect = getattr(held.server, COLLECT[step])
    good = held.sent[step]
    other = "share_keys" if step != "share_keys" else "advertise_keys"
    foreign = (held if other in held.sent else Round().to(other)).sent[other]["a"]
    for wrong, word in [
        (old.sent[step]["a"], "another session"),
        (next_round.sent[step]["a"], "of round 4, not of round 3"),
        (foreign, "is due"),
        (good["b"], "names 'b' as its sender"),
    ]:
        with pytest.raises(MessageError, match=word):
            collect({**good, "a": wrong})
    if step != "advertise_keys":
        with pytest.raises(MessageError, match=r"\['z'\] sent a message for a step"):
            collect({**good, "z": good["a"]})
    collect(good)
    with pytest.raises(MessageError, match="taken once"):
        collect(good)


@pytest.mark.parametrize("step", STEPS)
def test_a_client_refuses_replays_and_messages_of_other_rounds_and_steps(step: str) -> None:
    held, old, next_round = Round().to("unmask"), Round().to("unmask"), Round(round=4).to("unmask")

    def take(client: SecAggClient, source: Round, name: str) -> bytes:
        answers = {
            "advertise_keys": lambda: client.advertise_keys(source.invite),
            "share_keys": lambda: client.share_keys(source.roster),
            "mask_input": lambda: client.mask_input(source.boxes["a"], held.inputs["a"]),
            "unmask": lambda: client.unmask(source.request),
        }
        return answers[name]()

    with pytest.raises(MessageError, match="taken once"):
        take(held.clients["a"], held, step)  # a spent client
    fresh = Round()
    fresh_client = fresh.clients["a"]
    if step == "advertise_keys":
        with pytest.raises(MessageError, match="of round 4"):
            take(fresh_client, next_round, step)
        with pytest.raises(MessageError, match="'invite' is due"):
            fresh_client.advertise_keys(old.roster)
        return
    with pytest.raises(MessageError, match="is due"):
        take(fresh_client, old, step)  # a step before its turn
    fresh.to(STEPS[STEPS.index(step) - 1])
    for source, word in ((old, "another session"), (next_round, "of round 4")):
        with pytest.raises(MessageError, match=word):
            take(fresh_client, source, step)


def test_parties_with_other_settings_or_shapes_do_not_start() -> None:
    invite = SecAggServer(FOUR, SHAPES).invite()
    for client in (
        SecAggClient("a", SecAggSettings(4, 3, clip=8.0), SHAPES),
        SecAggClient("a", SecAggSettings(4, 4), SHAPES),
        SecAggClient("a", FOUR, {**SHAPES, "b": (3,)}),
    ):
        with pytest.raises(MessageError, match="different secure-aggregation settings"):
            client.advertise_keys(invite)


def test_more_clients_than_the_settings_allow_are_refused() -> None:
    with pytest.raises(MessageError, match="5 clients answered"):
        secure_sum({name: tensors(0) for name in "abcde"}, FOUR)


def test_shares_for_too_few_or_too_many_are_refused() -> None:
    held = Round().to("share_keys")
    fields = held.fields("shares", held.sent["share_keys"]["a"], "a")
    for sealed in (
        {k: v for k, v in fields["sealed"].items() if k != "b"},
        {**fields["sealed"], "a": fields["sealed"]["b"]},
    ):
        message = held.remake("shares", "a", {**fields, "sealed": sealed})
        with pytest.raises(MessageError, match="'a' did not seal one share"):
            held.server.collect_shares({**held.sent["share_keys"], "a": message})


@pytest.mark.parametrize("bad", [{"z": "unmask"}, {"a": "lunch"}])
def test_unknown_dropouts_are_refused(bad: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="drop"):
        secure_sum({name: tensors(i) for i, name in enumerate("abcd")}, FOUR, dropped=bad)


def test_vectors_or_weights_that_do_not_fit_together_are_refused() -> None:
    vectors = {name: tensors(i) for i, name in enumerate("abcd")}
    with pytest.raises(MessageError, match="weight for each"):
        secure_sum(vectors, FOUR, weights={"a": 1.0})
    with pytest.raises(MessageError, match="at least two"):
        secure_sum({}, FOUR)
    with pytest.raises(MessageError, match="tensors"):
        secure_sum({**vectors, "d": {"w": vectors["d"]["w"]}}, FOUR)
