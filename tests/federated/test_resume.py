"""Exact resume after any piece of work, whole and torn states, and what the ledger says of a resumed run (T1, T2, T3)."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.errors import CheckpointError
from lightning_sfubm.federated import state as run_state
from lightning_sfubm.federated.checkpoint import find_state, stored_states
from lightning_sfubm.federated.client import Client
from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.federated.ledger import read_ledger
from lightning_sfubm.federated.server import Server
from lightning_sfubm.federated.server_optimizers import FedAdam
from tests.conftest import small_distiller
from tests.federated.hard_run import data, finished_state, make, module, same, watched


def test_a_run_cut_off_after_any_piece_of_work_ends_as_if_it_never_was(
    federated_data: Any, federated_trainer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Weights, optimisers, rates, streams, counters, accountants, history, messages; with privacy and without."""

    def run(folder: str, private: bool, **flags: Any) -> Any:
        trainer = make(federated_trainer, folder, private=private, watch=tmp_path / f"{folder} epochs.jsonl")
        trainer.fit(module(), datamodule=data(federated_data), **flags)
        return trainer

    def left(folder: str) -> list[Any]:
        return [finished_state(tmp_path / folder), watched(tmp_path / f"{folder} epochs.jsonl")]

    pieces = {private: run(f"straight {private}", private).loop.counters.step for private in (False, True)}
    expected = {private: left(f"straight {private}") for private in pieces}
    for private, (_, epochs) in expected.items():
        assert pieces[private] > 15
        assert len({tuple(said["learning rates"]) for said in epochs.values()}) > 5  # there is a schedule to restore
        assert any(said["accountant"] for said in epochs.values()) == private
        for moving in ("optimiser", "stream", "weights"):
            assert len({said[moving] for said in epochs.values()}) == len(epochs)
    written = run_state.save_state
    for number, stop in enumerate(range(1, min(pieces.values()), 6)):
        folder, private = f"cut {stop}", bool(number % 2)

        def cut(*args: Any, stop: int = stop, **kwargs: Any) -> Any:
            if args[1] == stop + 1:
                raise KeyboardInterrupt  # the piece is done, its state is not written
            return written(*args, **kwargs)

        monkeypatch.setattr(run_state, "save_state", cut)
        with pytest.raises(KeyboardInterrupt):
            run(folder, private)
        monkeypatch.setattr(run_state, "save_state", written)
        torch.manual_seed(stop)  # a new process has another global stream
        run(folder, private, ckpt_path="last")
        assert same(left(folder), expected[private]), f"cut after piece {stop}"


@pytest.mark.parametrize("where", ["training", "messages"])
def test_cut_off_between_two_clients_none_trains_twice_and_no_message_counts_twice(
    where: str, federated_data: Any, federated_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three clients in round 2, alpha has trained (or all have, and alpha's message is up) when the process dies."""

    class Stop(FederatedCallback):
        def on_client_start(self, loop: Any, client: str, round: int) -> None:
            if (where, client, round) == ("training", "beta", 2):
                raise KeyboardInterrupt

        def on_upload(self, loop: Any, client: str, kind: str, tensors: Any) -> Any:
            if (where, client, kind) == ("messages", "beta", "teacher") and loop.counters.round == 1:
                raise KeyboardInterrupt
            return tensors

    trained: list[tuple[str, int]] = []
    averaged: list[tuple[int, list[str]]] = []
    train, average = Client.train_round, Server.aggregate_teacher

    def count(client: Client, round: int, *args: Any, **kwargs: Any) -> None:
        trained.append((client.name, round))
        train(client, round, *args, **kwargs)

    def note(server: Server, round: int, payloads: Any) -> bool:
        averaged.append((round, sorted(payloads)))
        return average(server, round, payloads)

    monkeypatch.setattr(Client, "train_round", count)
    monkeypatch.setattr(Server, "aggregate_teacher", note)
    settings = {"exchange": "teacher", "local_max_epochs": 1, "flags": {"limit_val_batches": 1}}

    def run(folder: str, callbacks: list, **flags: Any) -> Any:
        trainer = federated_trainer(folder, callbacks=callbacks, **settings)
        trainer.fit(small_distiller(), datamodule=federated_data(domains=3, num_users=30), **flags)
        return trainer

    straight = run("straight", [])
    once = [(name, number) for number in (1, 2) for name in ("alpha", "beta", "gamma")]
    everyone = [(number, ["alpha", "beta", "gamma"]) for number in (1, 2)]
    assert (trained, averaged) == (once, everyone)
    trained.clear()
    averaged.clear()
    with pytest.raises(KeyboardInterrupt):
        run("cut", [Stop()])
    assert trained == (once[:4] if where == "training" else once)
    again = run("cut", [], ckpt_path="last")
    assert (trained, averaged) == (once, everyone)
    # Of each message that counts the server keeps the nonce: one a client and round, whatever else was sent and lost.
    assert len(again.loop.server.guard.state_dict()["seen"]) == len(once)
    sent = [e for e in read_ledger(again.run_dir / "ledger.jsonl") if e["direction"] == "up"]
    told = [(e["client"], e["round"]) for e in sent if not e.get("resent")]
    assert sorted(told) == sorted(once)
    assert len(sent) == len(once) + (where == "messages")
    assert again.loop.counters.rounds_done == straight.loop.counters.rounds_done == dict.fromkeys(again.loop.clients, 2)
    assert same(finished_state(again.run_dir), finished_state(straight.run_dir))


def test_the_ledger_says_what_was_sent_again_and_shows_every_change(
    federated_data: Any, federated_trainer: Any, tmp_path: Path
) -> None:
    class Stop(FederatedCallback):
        def on_aggregate(self, loop: Any, round: int) -> None:
            raise KeyboardInterrupt  # messages of round 1 have travelled, no state knows of them

    cut = federated_trainer("run", callbacks=[PrivacyNoise(0.05), Stop()])
    with pytest.raises(KeyboardInterrupt):
        cut.fit(small_distiller(), datamodule=federated_data())
    before = read_ledger(cut.run_dir / "ledger.jsonl")
    trainer = federated_trainer("run")
    trainer.fit(small_distiller(), datamodule=federated_data(), ckpt_path="last")
    path = trainer.run_dir / "ledger.jsonl"
    entries = read_ledger(path)
    assert entries[: len(before)] == before
    again = [e for e in entries if e.get("resent")]
    assert [e["content_sha256"] for e in again] == [e["content_sha256"] for e in before if e["round"] == 1]
    assert len({e["sha256"] for e in entries}) == len(entries)  # every message has its own nonce

    lines = path.read_text().splitlines()
    for damaged in (
        [*lines[:2], lines[2].replace('"bytes"', '"bites"'), *lines[3:]],
        [*lines[:2], *lines[3:]],
        [*lines[:2], lines[3], lines[2], *lines[4:]],
        [*lines[:2], "{", *lines[3:]],
    ):
        path.write_text("\n".join(damaged) + "\n")
        with pytest.raises(CheckpointError, match=r"ledger\.jsonl, line [34]"):
            read_ledger(path)
    path.write_text("\n".join(lines[:-3]) + "\n")  # the newest entries cut off
    with pytest.raises(CheckpointError, match="put the file back"):
        federated_trainer("run").fit(small_distiller(), datamodule=federated_data(), ckpt_path="last")
    path.write_text("\n".join(lines) + "\n" + json.dumps(entries[-1])[:40])  # a line cut off by a crash
    federated_trainer("run").fit(small_distiller(), datamodule=federated_data(), ckpt_path="last")
    assert read_ledger(path) == entries


def test_a_run_goes_on_in_the_folder_of_its_ledger_alone(federated_data: Any, federated_trainer: Any) -> None:
    first = federated_trainer("run", rounds=0, local_max_epochs=1)
    first.fit(small_distiller(), datamodule=federated_data())
    other = federated_trainer("other", rounds=1, local_max_epochs=1)
    with pytest.raises(CheckpointError, match=r"other/ledger\.jsonl has 0 entries, .* after 4: .* it was begun in"):
        other.fit(small_distiller(), datamodule=federated_data(), ckpt_path=str(first.run_dir / "checkpoints"))
    assert not other.run_dir.exists()


def test_a_run_that_sent_nothing_goes_on_in_its_own_folder_too(federated_data: Any, federated_trainer: Any) -> None:
    """It has no ledger by which another folder would be told."""
    first = federated_trainer("run", rounds=1, local_max_epochs=1, exchange="nothing")
    first.fit(small_distiller(), datamodule=federated_data())
    other = federated_trainer("other", rounds=2, local_max_epochs=1, exchange="nothing")
    with pytest.raises(CheckpointError, match=r"folder that it was begun in, and .*other/history\.jsonl is not there"):
        other.fit(small_distiller(), datamodule=federated_data(), ckpt_path=str(first.run_dir / "checkpoints"))
    assert not other.run_dir.exists()


class StopIn(FederatedCallback):
    """Die while the messages of a round travel."""

    def __init__(self, round: int) -> None:
        self.round = round

    def on_upload(self, loop: Any, client: str, kind: str, tensors: Any) -> Any:
        if (kind, client) == ("teacher", "beta") and loop.counters.round + 1 == self.round:
            raise KeyboardInterrupt
        return tensors


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def garbage(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 40)


def bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_a_torn_state_is_recognised_and_the_one_before_is_used(
    federated_data: Any, federated_trainer: Any, tmp_path: Path
) -> None:
    def run(folder: str, *extra: FederatedCallback, **flags: Any) -> Any:
        callbacks = [PrivacyNoise(0.05), *extra]
        settings = {"rounds": 2, "local_max_epochs": 1, "callbacks": callbacks, "flags": {"limit_val_batches": 1}}
        trainer = federated_trainer(folder, **settings)
        trainer.fit(small_distiller(), datamodule=federated_data(num_users=30), **flags)
        return trainer

    expected = finished_state(run("straight").run_dir)
    with pytest.raises(KeyboardInterrupt):
        run("cut", StopIn(2))
    newest = find_state(tmp_path / "cut/checkpoints").name
    for name in ("loop.json", "server.ckpt", "clients/alpha.ckpt", "clients/beta.ckpt"):
        for damage in (truncate, empty, garbage, bit, os.unlink):
            copy = tmp_path / f"torn {damage.__name__} {Path(name).stem}"
            subprocess.run(["cp", "-a", str(tmp_path / "cut"), str(copy)], check=True)  # with its links
            damage(copy / "checkpoints" / newest / name)
            used = find_state(copy / "checkpoints").name
            assert used < newest, copy.name
            if name in ("loop.json", "server.ckpt"):  # never shared, so it is the state right before
                assert int(used[-4:]) == int(newest[-4:]) - 1
        again = run(copy.name, ckpt_path="last")
        assert same(finished_state(again.run_dir), expected), copy.name
    for state in (copy / "checkpoints").iterdir():
        truncate(state / "server.ckpt")
    with pytest.raises(CheckpointError, match=r"server\.ckpt.*server\.ckpt"):  # nothing whole is left: each is named
        run(copy.name, ckpt_path="last")


def test_states_are_ordered_by_number(tmp_path: Path) -> None:
    for name in ("state-10000", "state-9999", "state-0002", "state-old", ".state-10001.tmp"):
        (tmp_path / name).mkdir()
    assert [state.name for state in stored_states(tmp_path)] == ["state-0002", "state-9999", "state-10000"]


def test_the_newest_states_are_kept_and_a_whole_one_shares_no_file(
    federated_data: Any, federated_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, linked = run_state.save_state, []

    def check(root: Path, step: int, *args: Any) -> Path:
        final = write(root, step, *args)
        for file in root.parent.rglob("*.ckpt"):  # of states and of clients at work: none needs a pickle
            torch.load(file, weights_only=True)
        states = sorted(root.iterdir())
        assert [s.name for s in states[-2:]] == [f"state-{n:04d}" for n in (step - 1, step) if n]
        assert len(states) <= 3
        inodes = {s: {f.stat().st_ino for f in s.rglob("*.ckpt")} for s in states}
        alone = [s for s in states if not any(inodes[s] & inodes[o] for o in states if o != s)]
        assert alone or step == 2  # the first two are linked
        linked.append(args[-1])
        return final

    monkeypatch.setattr(run_state, "save_state", check)
    trainer = federated_trainer(rounds=2, weights=FedAdam(), flags={"limit_val_batches": 1})
    trainer.fit(module(), datamodule=federated_data(domains=3))
    assert linked[:6] == [True, True, False, True, True, False]
    assert not linked[-1]
    assert len(list((trainer.run_dir / "checkpoints").iterdir())) == 2


def test_a_run_goes_on_from_a_state_before_the_newest(
    federated_data: Any, federated_trainer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By choice, or because the newer ones, which share files, are torn; they are gone once it has written a state."""

    def run(folder: str, **flags: Any) -> Any:
        settings = {"rounds": 2, "local_max_epochs": 1, "flags": {"limit_val_batches": 1}}
        trainer = federated_trainer(folder, callbacks=[PrivacyNoise(0.05)], **settings)
        trainer.fit(small_distiller(), datamodule=federated_data(domains=4, num_users=30), **flags)
        return trainer

    expected = finished_state(run("straight").run_dir)
    written = run_state.save_state

    def cut(root: Path, step: int, *args: Any, **kwargs: Any) -> Path:
        if step == 8:
            raise KeyboardInterrupt
        return written(root, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_state, "save_state", cut)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    whole, *newer = stored_states(tmp_path / "cut/checkpoints")
    numbers = [int(state.name[-4:]) for state in (whole, *newer)]
    assert len(newer) == 2
    assert numbers[1] > numbers[0] + 1  # there is room for a state between them
    for torn in (False, True):
        copy = tmp_path / f"torn {torn}"
        subprocess.run(["cp", "-a", str(tmp_path / "cut"), str(copy)], check=True)  # with its links
        if torn:
            older, newest = (copy / "checkpoints" / state.name / "clients" for state in newer)
            garbage(next(file for file in newest.iterdir() if file.samefile(older / file.name)))
            assert find_state(copy / "checkpoints").name == whole.name
        again = run(copy.name, ckpt_path="last" if torn else str(copy / "checkpoints" / whole.name))
        assert same(finished_state(again.run_dir), expected)


def test_a_run_cut_off_before_its_first_state_starts_again_and_its_ledger_remembers(
    federated_data: Any, federated_trainer: Any
) -> None:
    class StopBefore(FederatedCallback):
        def on_upload(self, loop: Any, client: str, kind: str, tensors: Any) -> Any:
            if client == "beta":
                raise KeyboardInterrupt
            return tensors

    cut = federated_trainer("run", callbacks=[PrivacyNoise(0.05), StopBefore()], rounds=1)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(small_distiller(), datamodule=federated_data())
    before = read_ledger(cut.run_dir / "ledger.jsonl")
    assert [(e["client"], e["kind"]) for e in before] == [("alpha", "semantics")]
    again = federated_trainer("run", rounds=1)
    again.fit(small_distiller(), datamodule=federated_data(), ckpt_path="last")
    entries = read_ledger(again.run_dir / "ledger.jsonl")
    assert entries[:1] == before
    assert [e["client"] for e in entries if e.get("resent")] == ["alpha"]
    straight = federated_trainer("straight", rounds=1)
    straight.fit(small_distiller(), datamodule=federated_data())
    assert same(finished_state(again.run_dir), finished_state(straight.run_dir))


def test_half_removed_states_of_an_earlier_run_are_never_gone_on_from(
    federated_data: Any, federated_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"rounds": 1, "flags": {"limit_val_batches": 1}}
    first = federated_trainer("run", local_epochs=1, **settings)
    first.fit(small_distiller(), datamodule=federated_data())
    second = federated_trainer("run", **settings)

    remove = shutil.rmtree

    def die(path: Any, *args: Any, **kwargs: Any) -> None:
        if Path(path).parent == second.run_dir:
            raise KeyboardInterrupt
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        second.fit(small_distiller(), datamodule=federated_data(num_items=53))
    monkeypatch.setattr(shutil, "rmtree", remove)
    again = federated_trainer("run", **settings)
    again.fit(small_distiller(), datamodule=federated_data(num_items=53), ckpt_path="last")
    straight = federated_trainer("straight", **settings)
    straight.fit(small_distiller(), datamodule=federated_data(num_items=53))
    assert same(finished_state(again.run_dir), finished_state(straight.run_dir))
    assert not [e for e in read_ledger(again.run_dir / "ledger.jsonl") if e.get("resent")]
