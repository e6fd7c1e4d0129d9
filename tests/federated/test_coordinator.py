"""What one silo sends can cost that silo its round and no more; what the server keeps in its folder, and for how long."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm.errors import CheckpointError, ConfigError, MessageError
from lightning_sfubm.federated import checkpoint, ledger
from lightning_sfubm.federated.checkpoint import find_state, read_loop, stored_states
from lightning_sfubm.federated.envelopes import Reply, Request, describe_shapes, read_shapes
from lightning_sfubm.federated.messages import MessageSchema, unpack
from tests.federated.machines import HASTY, coordinator, cut_off_in_round


def with_nonce(schema: MessageSchema, payload: bytes, nonce: str) -> bytes:
    """The same message under another nonce."""
    return payload.replace(unpack(schema, payload).nonce.encode(), nonce.encode()) if payload else b""


def test_a_silo_that_reuses_its_nonce_drops_out_alone(
    machines: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a round and in an exchange, also where the coordinator was started again in between."""
    names, schedule = ["alpha", "beta", "gamma"], {"rounds": 2, "local_max_epochs": 1, "joins": {"gamma": 2}}
    transport, nonce, kills = machines(names, **schedule), "5" * 32, [2]

    def forge(name: str, request: Request, reply: Reply) -> Reply:
        if (request.action, request.round) == ("train", 2) and kills:
            kills.pop()
            raise KeyboardInterrupt
        if name != "beta" or request.action not in ("semantics", "train"):
            return reply
        assert driver.server.teacher is not None
        vectors = with_nonce(driver.server.semantics, reply.semantics, nonce)
        return replace(reply, semantics=vectors, teacher=with_nonce(driver.server.teacher, reply.teacher, nonce))

    transport.after = forge
    driver = coordinator(transport, tmp_path, names, **schedule)
    with pytest.raises(KeyboardInterrupt):
        driver.run()
    driver = coordinator(transport, tmp_path, names, **schedule)
    driver.run()
    assert driver.progress.dropped == {"1": ["beta"], "2": ["beta", "beta"]}  # its vectors of the start were the first
    assert driver.server.version == 2
    assert f"'beta' dropped out (message refused: message {nonce} of client 'beta' was already received" in caplog.text


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        ({"w": [1 << 30, 1 << 30, 1 << 30]}, "2 billion values .*'w'"),
        ({"a": [1 << 30], "w": [1 << 30, 2]}, "2 billion values .*'w'"),
        ({"a": [2], "w": [1] * 9}, "'w'.* 9 dimensions"),
        ({"a": [2], "w": [1] * 100_000}, "'w'.* 100000 dimensions"),
        ({"w": [4, 1 << 31]}, "'w'"),
        ({"w": [4, 0]}, "'w'"),
        ({"w": [4, True]}, "'w'"),
        ({"w": {}}, "'w'"),
        ({"w": "44"}, "'w'"),
        ({"w": None}, "'w' has no list"),
        ({"__weight__": [1]}, "'__weight__'"),
        ([["w", [4]]], "is not one"),
    ],
)
def test_shapes_are_bounded_before_anything_is_made_of_them(teacher: Any, reason: str) -> None:
    with pytest.raises(MessageError, match=f"shared weights.*{reason}"):
        read_shapes(json.dumps({"dim": 4, "teacher": teacher}))


def test_shapes_that_fit_are_read() -> None:
    shared = {"w": torch.zeros(3, 4, 2), "scale": torch.zeros(())}
    dim, template = read_shapes(describe_shapes(4, shared))
    assert (dim, {k: v.shape for k, v in template.items()}) == (4, {k: v.shape for k, v in shared.items()})


def test_a_silo_with_impossible_shapes_is_not_taken(
    machines: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names, schedule = ["alpha", "beta"], {"exchange": "teacher", "rounds": 1, "local_max_epochs": 1}
    transport = machines(names, **schedule)

    def boast(name: str, request: Request, reply: Reply) -> Reply:
        shape = json.dumps({"dim": 4, "teacher": {"w": [1 << 30] * 3}})
        return replace(reply, shape=shape) if name == "alpha" and reply.shape else reply

    transport.after = boast
    driver = coordinator(transport, tmp_path, names, HASTY, **schedule)
    with pytest.raises(ConfigError, match=r"1 silos came .* missing: \['alpha'\]"):
        driver.run()
    assert (
        "a silo is not taken: a silo describes shared weights of more than 2 billion values (with 'w')" in caplog.text
    )


# ------------------------------------------------------------------ files


def referred_to(server: Path) -> set[str]:
    """Hashes of the messages that a state on disk still wants delivered."""
    outboxes = [read_loop(s)["stored"]["progress"]["outbox"] for s in stored_states(server / "checkpoints")]
    return {sha256 for outbox in outboxes for kinds in outbox.values() for sha256 in kinds.values()}


def test_messages_are_the_owners_alone_and_gone_once_delivered(machines: Any, tmp_path: Path) -> None:
    """Whenever the coordinator is killed, every message that a state wants delivered is there."""
    names, schedule = ["alpha", "beta"], {"rounds": 3, "local_max_epochs": 1, "leaves": {"alpha": 2}}
    transport, outbox = machines(names, **schedule), tmp_path / "server/outbox"
    outbox.mkdir(parents=True)  # as an earlier version made it
    outbox.chmod(0o755)
    foreign = outbox / "note.txt"
    foreign.write_text("put here by hand")
    seen: list[int] = []

    def look(name: str, request: Request, reply: Reply) -> Reply:
        files = {path for path in outbox.iterdir() if path != foreign}
        assert {path.name for path in files} >= referred_to(tmp_path / "server")
        assert outbox.stat().st_mode & 0o777 == 0o700 or not files
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)
        seen.append(len(files))
        if len(transport.asked) in (5, 7, 8):
            raise KeyboardInterrupt
        return reply

    transport.after = look
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            coordinator(transport, tmp_path, names, **schedule).run()
    driver = coordinator(transport, tmp_path, names, **schedule)
    driver.run()
    assert max(seen) >= 2
    assert driver.progress.finished == names
    assert [path.name for path in outbox.iterdir()] == ["note.txt"]
    assert outbox.stat().st_mode & 0o777 == 0o700


def test_ledger_lines_are_on_disk_before_a_state_counts_them(
    machines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a state that is there and lines that are not would never go on."""
    order: list[str] = []
    ledger_flush, state_flush = ledger.flush, checkpoint.flush
    server = tmp_path / "server"

    def noting(name: str, path: Path, real: Any) -> None:
        if server in path.parents:
            order.append(name)
        real(path)

    monkeypatch.setattr(ledger, "flush", lambda path: noting("ledger", path, ledger_flush))
    monkeypatch.setattr(checkpoint, "flush", lambda path: noting("state", path, state_flush))
    transport = machines(["alpha", "beta"], rounds=1, local_max_epochs=1)
    coordinator(transport, tmp_path, ["alpha", "beta"], rounds=1, local_max_epochs=1).run()
    assert "ledger" in order
    states = [name for name, before in zip(order, ["", *order], strict=False) if name == "state" != before]
    assert len(states) == order.count("ledger")  # each state's files come after a flush of the ledger
    assert order[0] == "ledger"


def test_nothing_is_deleted_while_a_state_cannot_be_read(machines: Any, tmp_path: Path) -> None:
    schedule = {"exchange": "semantics", "rounds": 1, "local_max_epochs": 1}
    transport = machines(["alpha", "beta"], **schedule)
    driver = coordinator(transport, tmp_path, ["alpha", "beta"], **schedule)
    transport.after = lambda name, request, reply: None if request.action in ("train", "finish") else reply
    driver.run()
    kept = {path.name for path in (tmp_path / "server/outbox").iterdir()}
    assert len(kept) == 2
    assert kept == referred_to(tmp_path / "server")
    driver.progress.outbox.clear()
    older = stored_states(tmp_path / "server/checkpoints")[-1] / "loop.json"
    older.write_text(older.read_text()[:50])
    driver._checkpoint()
    assert {path.name for path in (tmp_path / "server/outbox").iterdir()} == kept
    driver._checkpoint()
    driver._checkpoint()
    assert not list((tmp_path / "server/outbox").iterdir())


def test_a_message_that_is_gone_or_changed_is_named(machines: Any, tmp_path: Path) -> None:
    schedule = {"exchange": "semantics", "rounds": 1, "local_max_epochs": 1}
    transport = machines(["alpha", "beta"], **schedule)
    transport.after = lambda name, request, reply: None if request.action in ("train", "finish") else reply
    coordinator(transport, tmp_path, ["alpha", "beta"], **schedule).run()
    for path in (tmp_path / "server/outbox").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"outbox/[0-9a-f]{64}: .*changed"):
        coordinator(transport, tmp_path, ["alpha", "beta"], **schedule).run()
    for path in (tmp_path / "server/outbox").iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match=r"outbox/[0-9a-f]{64}: .*No such file"):
        coordinator(transport, tmp_path, ["alpha", "beta"], **schedule).run()


@pytest.mark.parametrize("content", [b"", b"0" * 31, b"0" * 32 + b"\n", b"g" * 32, b"A" * 32, b"\xff" * 32, None])
def test_a_torn_name_of_the_run_is_refused(content: bytes | None, machines: Any, tmp_path: Path) -> None:
    transport = machines(["alpha", "beta"])
    file = tmp_path / "server/federation.id"
    file.parent.mkdir()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"server/federation\.id: "):
        coordinator(transport, tmp_path, ["alpha", "beta"]).run()
    assert transport.asked == []


def test_the_name_of_the_run_stays(machines: Any, tmp_path: Path) -> None:
    transport = machines(["alpha", "beta"], rounds=1, local_max_epochs=1)

    def kill(name: str, request: Request, reply: Reply) -> Reply:
        raise KeyboardInterrupt

    transport.after = kill
    driver = coordinator(transport, tmp_path, ["alpha", "beta"], rounds=1, local_max_epochs=1)
    with pytest.raises(KeyboardInterrupt):
        driver.run()
    again = coordinator(transport, tmp_path, ["alpha", "beta"], rounds=1, local_max_epochs=1)
    with pytest.raises(KeyboardInterrupt):
        again.run()
    assert again.progress.federation == driver.progress.federation == (tmp_path / "server/federation.id").read_text()


def test_a_state_of_the_other_kind_is_refused(machines: Any, in_one_process: Any, tmp_path: Path) -> None:
    names, schedule = ["alpha", "beta"], {"exchange": "teacher", "rounds": 1, "local_max_epochs": 1}
    together = in_one_process(names, **schedule)
    transport = machines(names, **schedule)
    driver = coordinator(transport, tmp_path, names, **schedule)
    driver.run()
    other = coordinator(transport, tmp_path, names, **schedule)
    other.run_dir = together.run_dir
    with pytest.raises(CheckpointError, match=f"{find_state(other.checkpoints)}: .*not .* a server"):
        other.run()
    with pytest.raises(CheckpointError, match=f"{find_state(driver.checkpoints)}: .*not .* clients"):
        together.loop.resume(driver.checkpoints)


# ------------------------------------------------------------------ who must be there, and for how many rounds


def test_silos_that_join_later_do_not_stand_in_for_one_that_is_needed(machines: Any, tmp_path: Path) -> None:
    names, schedule = ["alpha", "beta", "gamma"], {"rounds": 3, "joins": {"gamma": 3}}
    transport = machines(names, **schedule)
    transport.offline = {2}
    with pytest.raises(ConfigError, match=r"1 silos came .* 2 of \['alpha', 'beta'\] are needed; missing: \['beta'\]"):
        coordinator(transport, tmp_path, names, HASTY, **schedule).run()
    assert {action for action, _, _ in transport.asked} == {"hello"}


def test_a_silo_that_left_is_sent_the_end_when_it_comes_after_the_others(machines: Any, tmp_path: Path) -> None:
    """Once all rounds are over, who has not finished is wanted, whether or not it would take part in one more."""
    names, schedule = ["alpha", "beta"], {"rounds": 2, "local_max_epochs": 1, "leaves": {"alpha": 1}}
    transport = machines(names, **schedule)
    transport.after = lambda name, request, reply: None if (name, request.action) == ("alpha", "finish") else reply
    coordinator(transport, tmp_path, names, **schedule).run()
    transport.after, transport.offline = (lambda name, request, reply: reply), {2}
    driver = coordinator(transport, tmp_path, names, HASTY, **schedule)
    driver.run()
    assert driver.progress.finished == names


def test_a_finished_federation_is_not_given_other_rounds(machines: Any, tmp_path: Path) -> None:
    """Its silos would refuse them, and the run would be called complete."""
    names, schedule = ["alpha", "beta"], {"rounds": 2, "local_max_epochs": 1, "exchange": "teacher"}
    transport = machines(names, **{**schedule, "rounds": 3})
    # known to nobody: their answers are lost, and they have finished all the same
    transport.after = lambda name, request, reply: None if request.action == "finish" else reply
    coordinator(transport, tmp_path, names, **schedule).run()
    asked, before = len(transport.asked), (tmp_path / "server/ledger.jsonl").read_bytes()
    for rounds, reason in ((3, "2 rounds behind it and was finished, and rounds = 3"), (1, "rounds = 1 are asked for")):
        with pytest.raises(CheckpointError, match=f"{reason}.*set rounds to 2, "):
            coordinator(transport, tmp_path, names, **{**schedule, "rounds": rounds}).run()
    assert len(transport.asked) == asked
    assert (tmp_path / "server/ledger.jsonl").read_bytes() == before
    transport.after = lambda name, request, reply: reply
    driver = coordinator(transport, tmp_path, names, **schedule)
    driver.run()
    assert driver.progress.finished == names


def test_nobody_is_waited_for_once_all_have_finished(
    machines: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same command again: silos have ended, and nothing is left to deliver."""
    names, schedule = ["alpha", "beta"], {"rounds": 1, "local_max_epochs": 1, "exchange": "teacher"}
    transport = machines(names, **schedule)
    coordinator(transport, tmp_path, names, **schedule).run()
    asked, states = len(transport.asked), stored_states(tmp_path / "server/checkpoints")
    transport.offline = {1, 2}
    with caplog.at_level("INFO", "lightning_sfubm"):
        coordinator(transport, tmp_path, names, HASTY, **schedule).run()
    assert "all silos finished after 1 rounds before: nothing is left to do" in caplog.text
    assert (len(transport.asked), stored_states(tmp_path / "server/checkpoints")) == (asked, states)


def test_a_coordinator_killed_while_silos_finish_knows_that_they_were_asked(machines: Any, tmp_path: Path) -> None:
    """They learn from no further round, and would drop out of each."""
    names, schedule = ["alpha", "beta"], {"rounds": 1, "local_max_epochs": 1, "exchange": "teacher"}
    transport = machines(names, **{**schedule, "rounds": 3})
    cut_off_in_round(transport, 2, coordinator(transport, tmp_path, names, **schedule))  # they finish in the one after
    assert transport.asked[-1][0] == "finish"
    asked = len(transport.asked)
    with pytest.raises(CheckpointError, match="1 rounds behind it and was finished, and rounds = 2 are asked for"):
        coordinator(transport, tmp_path, names, **{**schedule, "rounds": 2}).run()
    assert len(transport.asked) == asked
    driver = coordinator(transport, tmp_path, names, **schedule)
    driver.run()
    assert driver.progress.finished == names


def test_a_federation_that_was_cut_off_may_be_given_more_rounds(machines: Any, tmp_path: Path) -> None:
    names, schedule = ["alpha", "beta"], {"rounds": 2, "local_max_epochs": 1, "exchange": "teacher"}
    transport = machines(names, **schedule)
    cut_off_in_round(transport, 2, coordinator(transport, tmp_path, names, **schedule))
    with pytest.raises(CheckpointError, match=r"1 rounds behind it, and rounds = 0 .*set rounds to 1 or more"):
        coordinator(transport, tmp_path, names, **{**schedule, "rounds": 0}).run()
    driver = coordinator(transport, tmp_path, names, **schedule)
    driver.run()
    assert (driver.progress.round, driver.progress.finished) == (2, names)
