"""What a silo on a machine of its own agrees to, refuses and sends, whoever asks (T4, T6, T18)."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm.audit.guarantee import guarantee
from lightning_sfubm.callbacks import differential_privacy
from lightning_sfubm.callbacks.differential_privacy import DifferentialPrivacy
from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.errors import ConfigError, MessageError, PrivacyError
from lightning_sfubm.federated.checkpoint import stored_states
from lightning_sfubm.federated.envelopes import Reply, Request
from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.federated.ledger import read_ledger
from lightning_sfubm.federated.loop import FederatedLoop
from lightning_sfubm.federated.messages import pack, unpack
from lightning_sfubm.federated.silo import Silo
from lightning_sfubm.privacy.noise import NoiseStream
from tests.conftest import small_distiller
from tests.federated.machines import coordinator


class Foreign(FederatedCallback):
    protects = frozenset({"semantics"})


@pytest.fixture
def hello(machines: Any, tmp_path: Path) -> Any:
    """A request for which a silo's schedule was agreed, and the silo."""

    def make(callbacks: Any = (), **federation: Any) -> tuple[Callable[[], Silo], Request]:
        settings = {"exchange": "both", **federation}
        transport = machines(["alpha"], callbacks, **settings)
        driver = coordinator(transport, tmp_path, ["alpha", "beta"], **federation)
        return transport.silos[1][1], driver._request("hello", 0)

    return make


def test_a_silo_refuses_terms_it_did_not_agree_to(hello: Any) -> None:
    make, request = hello()
    for change in (
        {"rounds": 3},
        {"weighting": "examples"},
        {"secure": True},
        {"schedule": {}},
        *({"rounds": n} for n in ("2", True, -1)),
    ):
        asked = json.dumps({**json.loads(request.terms), **change})
        with pytest.raises(ConfigError, match=r"trainer\.federation|agreed to 2"):
            make().answer(replace(request, terms=asked))
    for broken in ("[]", "{", '{"schedule": '):
        with pytest.raises(MessageError, match="terms"):
            make().answer(replace(request, terms=broken))
    fewer = json.dumps({**json.loads(request.terms), "rounds": 1})
    assert make().answer(replace(request, terms=fewer)).shape


@pytest.mark.parametrize(
    "callback", [PrivacyNoise(0.1), DifferentialPrivacy(noise_multiplier=1.0, expected_batch_size=8)]
)
def test_a_silo_refuses_noise_that_the_server_could_subtract(callback: Any, hello: Any, tmp_path: Path) -> None:
    make, request = hello([callback])
    with pytest.raises(PrivacyError, match=f"{type(callback).__name__} is derived from the run's seed"):
        make().answer(request)
    assert not (tmp_path / "silo/alpha/ledger.jsonl").exists()


def test_a_silo_refuses_an_order_that_the_server_could_undo(hello: Any, tmp_path: Path) -> None:
    """Without noise nothing needs a secret but the order of the rows; a callback from outside may know of none."""
    make, request = hello()
    for own in (PrivacyNoise(0.0), Foreign()):
        silo = make()
        other = Silo(silo.agreed, silo.client, [own], silo.run_dir, silo.seed)
        silo.client.order_seed = own.order_seed(silo.seed, "alpha") if isinstance(own, PrivacyNoise) else silo.seed
        with pytest.raises(PrivacyError, match="order in which item vectors leave is drawn from the run's seed"):
            other.answer(request)
    assert not (tmp_path / "silo/alpha/ledger.jsonl").exists()


def test_a_silo_sends_no_semantics_unprotected(hello: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make, request = hello()
    make().answer(request)
    monkeypatch.setattr(PrivacyNoise, "protects", frozenset())
    with pytest.raises(PrivacyError, match="unprotected"):
        make().answer(replace(request, action="semantics"))
    assert {e["kind"] for e in read_ledger(tmp_path / "silo/alpha/ledger.jsonl")} == {"teacher"}


@pytest.mark.parametrize("exchange", ["teacher", "nothing"])
def test_a_silo_sends_no_vectors_where_it_agreed_to_none(exchange: str, hello: Any, tmp_path: Path) -> None:
    """Terms that fit are not enough: what is asked for must be among them."""
    make, request = hello([PrivacyNoise(0.1, str(tmp_path / "keys"))], exchange=exchange)
    make().answer(request)
    with pytest.raises(ConfigError, match=f"exchange: {exchange} does not send"):
        make().answer(replace(request, action="semantics"))
    assert "semantics" not in {e["kind"] for e in read_ledger(tmp_path / "silo/alpha/ledger.jsonl")}


def test_a_silo_trains_and_sends_in_the_rounds_it_agreed_to_only(hello: Any, tmp_path: Path) -> None:
    make, request = hello(rounds=2, leaves={"alpha": 1})
    make().answer(request)
    assert make().answer(replace(request, action="train", round=1)).teacher
    before = len(read_ledger(tmp_path / "silo/alpha/ledger.jsonl"))
    for action, number in (("train", 2), ("train", 3), ("train", 50), ("train", 0), ("semantics", 1), ("semantics", 9)):
        with pytest.raises(ConfigError, match=f"'{action}' in round {number}, which .* rounds 1 to 1"):
            make().answer(replace(request, action=action, round=number))
    assert len(read_ledger(tmp_path / "silo/alpha/ledger.jsonl")) == before


def test_a_silo_refuses_strangers_and_replays(hello: Any) -> None:
    make, request = hello()
    with pytest.raises(MessageError, match="never said hello"):
        make().answer(replace(request, action="train", round=1))
    make().answer(request)
    with pytest.raises(ConfigError, match="holds another run"):
        make().answer(replace(request, federation="0" * 32))
    make().answer(replace(request, action="train", round=2))
    with pytest.raises(MessageError, match="replay"):
        make().answer(replace(request, action="train", round=1))
    silo = make()
    assert silo.server.broadcast_schema is not None
    old = pack(silo.server.broadcast_schema, "beta", 1, silo.server.global_teacher)
    with pytest.raises(MessageError, match="in the place of one of the server"):
        make().answer(replace(request, action="train", round=2, teacher=old.payload))
    with pytest.raises(MessageError, match="safetensors"):
        make().answer(replace(request, action="train", round=2, teacher=b"\x80\x04."))


def test_a_silo_takes_each_answer_of_the_server_in_its_time(hello: Any) -> None:
    """The newest may come twice; an older one is a replay, and there is none yet of the round that is asked for."""
    make, request = hello(rounds=4)
    make().answer(request)
    silo = make()
    assert silo.server.broadcast_schema is not None
    weights = {key: torch.zeros_like(value) for key, value in silo.server.global_teacher.items()}
    teacher = {n: pack(silo.server.broadcast_schema, "server", n, weights).payload for n in (1, 2, 3)}
    vectors = {"vectors": silo.client.semantics()}
    views = {n: pack(silo.server.semantics, "server", n, vectors).payload for n in (0, 1, 2, 3)}

    train = replace(request, action="train")
    for early in ({"round": 1, "teacher": teacher[1]}, {"round": 1, "semantics": views[2]}):
        with pytest.raises(MessageError, match="before there can be one"):
            make().answer(replace(train, **early))
    assert make().answer(replace(train, round=1, semantics=views[0])).teacher
    assert (
        make().answer(replace(train, round=2, semantics=views[0], teacher=teacher[1])).teacher
    )  # not known to be here
    assert make().answer(replace(train, round=3, semantics=views[2], teacher=teacher[2])).teacher
    for old, kind in (({"semantics": views[1]}, "semantics"), ({"teacher": teacher[1]}, "teacher")):
        with pytest.raises(MessageError, match=f"the {kind} of round 1 arrived after that of round 2"):
            make().answer(replace(train, round=4, **old))
    silo = make()
    for _ in range(2):  # the same process, asked again
        assert silo.answer(replace(train, round=4, semantics=views[2], teacher=teacher[3])).teacher


def test_a_reply_has_room_for_messages_and_names_alone() -> None:
    assert [field.name for field in fields(Reply)] == ["silo", "error", "shape", "semantics", "teacher"]
    for wrong in ({"error": "user 17 has no items"}, {"silo": ""}, {"silo": "a" * 129}, {"silo": "a\x00b"}):
        with pytest.raises(MessageError, match="name"):
            Reply(**{"silo": "alpha", **wrong})


def test_an_order_that_the_server_cannot_undo(hello: Any) -> None:
    make, _ = hello()
    silo = make()
    private = silo.client.semantics()
    silo.client.order_seed = silo.seed  # what whoever knows the seed would try
    assert not torch.equal(private, silo.client.semantics())


def test_what_a_silo_keeps_of_what_left_is_not_cleared_by_a_run_from_the_beginning(hello: Any, tmp_path: Path) -> None:
    make, request = hello()
    make().answer(request)
    silo = make()
    folder = tmp_path / "silo/alpha"
    kept = (folder / "ledger.jsonl").read_bytes()
    alone = FederatedLoop(silo.agreed, silo.clients, (), folder, silo.seed)
    with pytest.raises(ConfigError, match=r"silo/alpha holds a silo's part of a federated run .* --ckpt_path last"):
        alone.run()
    assert (folder / "ledger.jsonl").read_bytes() == kept


def test_a_fit_goes_on_from_what_a_silo_holds_whatever_the_schedule_says_of_others(
    federated_data: Any, federated_trainer: Any
) -> None:
    trainer = federated_trainer(leaves={"beta": 1, "alpha": 2})
    data = federated_data(domains=1, num_users=20)
    with pytest.raises(ConfigError, match="leaves names 'beta'"):
        trainer.build_loop(small_distiller(), data)
    trainer.run_dir.mkdir(parents=True, exist_ok=True)
    (trainer.run_dir / "federation.id").write_text("0" * 32)
    assert trainer.build_loop(small_distiller(), data).federation.leaves == {"alpha": 2}


def private(folder: Path, users: int = 8) -> DifferentialPrivacy:
    return DifferentialPrivacy(
        noise_multiplier=1.0, expected_batch_size=users, secret_dir=str(folder / "secrets"), accounting="rdp"
    )


def test_nothing_that_was_trained_after_the_rounds_leaves(hello: Any, tmp_path: Path) -> None:
    make, request = hello([private(tmp_path)], exchange="teacher", rounds=2)
    make().answer(request)
    first = make().answer(replace(request, action="train", round=1)).teacher
    for early in (1, 2, 4):
        with pytest.raises(ConfigError, match=f"finish in round {early}, and its terms say 2 rounds"):
            make().answer(replace(request, action="finish", round=early))
    assert (
        make().answer(replace(request, action="train", round=1)).teacher[-100:] == first[-100:]
    )  # what was trained then
    make().answer(replace(request, action="train", round=2))
    make().answer(replace(request, action="finish", round=3))
    lines = read_ledger(tmp_path / "silo/alpha/ledger.jsonl")
    for number in (1, 2):
        with pytest.raises(MessageError, match=f"'train' of round {number} arrived after this silo had finished"):
            make().answer(replace(request, action="train", round=number))
    terms = json.dumps({**json.loads(request.terms), "rounds": 0})
    with pytest.raises(MessageError, match="replay"):
        make().answer(replace(request, action="finish", round=1, terms=terms))
    assert read_ledger(tmp_path / "silo/alpha/ledger.jsonl") == lines


def test_weights_without_the_guarantee_they_were_trained_with_do_not_leave(hello: Any, tmp_path: Path) -> None:
    make, request = hello([private(tmp_path)], exchange="teacher", rounds=2)
    silo = make()
    silo.answer(request)
    silo.answer(replace(request, action="train", round=1))
    with torch.no_grad():
        next(iter(silo.client.module.teacher.parameters())).add_(1e-3)
    with pytest.raises(PrivacyError, match=r"weights of \['alpha'\] are not those that were trained with differential"):
        silo._train_round(1)


@pytest.mark.parametrize("users", [8, 30])  # four steps a round, and a single one
def test_a_silo_that_lost_its_newest_state_does_not_spend_uncounted(
    users: int, hello: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, request = hello([private(tmp_path, users)], exchange="teacher", rounds=3)
    train = replace(request, action="train")
    make().answer(request)
    make().answer(replace(train, round=1))
    sent = make().answer(replace(train, round=2)).teacher
    states = stored_states(tmp_path / "silo/alpha/checkpoints")
    (states[-1] / "server.ckpt").write_bytes(b"")  # as a disk that failed leaves it
    weights = {key: torch.zeros_like(value) for key, value in make().server.global_teacher.items()}
    schema = make().server.broadcast_schema
    assert schema is not None
    teacher = pack(schema, "server", 2, weights).payload
    with pytest.raises(
        PrivacyError, match=r"in round 2 'alpha' sent weights .* what round 3 spends could not be counted"
    ):
        make().answer(replace(train, round=3, teacher=teacher))

    used: list[object] = []

    def watched(secret: bytes, *names: object) -> NoiseStream:
        used.append(names)
        return NoiseStream(secret, *names)

    monkeypatch.setattr(differential_privacy, "NoiseStream", watched)
    again = make().answer(replace(train, round=2)).teacher  # the same once more: nothing new is spent
    server = make().server
    assert server.teacher is not None
    assert all(
        torch.equal(value, unpack(server.teacher, sent).tensors[key])
        for key, value in unpack(server.teacher, again).tensors.items()
    )
    lines = read_ledger(tmp_path / "silo/alpha/ledger.jsonl")
    assert lines[-1].get("resent")
    assert guarantee(lines, [])["standing"] == "all"
    same = list(used)
    used.clear()
    silo = make()
    silo.resume(states[-2])
    silo.client.receive_teacher(weights)
    silo.client.train_round(2, 3, 1, tmp_path / "other", lambda *entry: None, shares=True)
    assert len(used) == len(same)
    assert not set(used) & set(same)  # the same steps on other weights


@pytest.mark.parametrize("rows", [-1, 1])
def test_an_answer_of_another_length_is_refused_in_one_sentence(
    rows: int, hello: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make, request = hello(rounds=2)
    make().answer(request)
    silo = make()
    own = silo.client.semantics()
    wrong = own[:rows] if rows < 0 else torch.cat([own, own[:rows]])
    view = pack(silo.server.semantics, "server", 0, {"vectors": wrong}).payload
    with pytest.raises(MessageError, match=f"'alpha' has {len(own)} items.* {len(wrong)} rows"):
        make().answer(replace(request, action="train", round=1, semantics=view))
