"""Exact resume: after any piece of work, and after SIGKILL at random moments (T1, T2)."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.errors import CheckpointError
from lightning_sfubm.federated import loop as loop_module
from lightning_sfubm.federated.checkpoint import find_state, read_loop
from lightning_sfubm.federated.hooks import ClientDropped, FederatedCallback
from lightning_sfubm.federated.ledger import read_ledger
from lightning_sfubm.federated.server_optimizers import FedAdam
from tests.conftest import small_distiller


class Flaky(FederatedCallback):
    """Client beta is away in round 2, and its message of round 3 is lost."""

    def on_client_start(self, loop: Any, client: str, round: int) -> None:
        if (client, round) == ("beta", 2):
            raise ClientDropped("away")

    def on_upload(self, loop: Any, client: str, kind: str, tensors: Any) -> Any:
        if (client, kind) == ("beta", "teacher") and loop.counters.round == 2:
            raise ClientDropped("lost")
        return tensors


#: a schedule with everything that has state: server moments, partial participation, drop-outs, late and early clients
HARD = {"rounds": 4, "participation": 0.7, "joins": {"gamma": 2}, "leaves": {"alpha": 3}, "client_epochs": {"beta": 2}}


def finished_state(folder: Path) -> dict[str, Any]:
    """Everything a finished run leaves, but for nonces, clocks and the number of states written."""
    state = find_state(folder / "checkpoints")
    loop = read_loop(state)["stored"]
    server = torch.load(state / "server.ckpt", weights_only=True)
    clients = {file.stem: torch.load(file, weights_only=True) for file in sorted((state / "clients").glob("*.ckpt"))}
    keep = ("state_dict", "global_step", "epoch", "optimizer_states", "lr_schedulers")
    ledger = [e for e in read_ledger(folder / "ledger.jsonl") if not e.get("resent")]
    return {
        "clients": {name: {k: c[k] for k in keep if k in c} for name, c in clients.items()},
        "server": {k: server[k] for k in ("global_teacher", "version", "weights")},
        "counters": {k: v for k, v in loop["counters"].items() if k != "step"},
        "history": (folder / "history.jsonl").read_text(),
        "sent": [(e["round"], e["client"], e["direction"], e["kind"], e["content_sha256"]) for e in ledger],
    }


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def make(federated_trainer: Any, folder: str, extra: tuple[FederatedCallback, ...] = ()) -> Any:
    schedule: dict[str, Any] = {**HARD, "weights": FedAdam()}
    return federated_trainer(folder, callbacks=[PrivacyNoise(0.05), Flaky(), *extra], **schedule)


def data(federated_data: Any) -> Any:
    return federated_data(domains=3, num_users=30, num_items=48)


def test_a_run_cut_off_after_any_piece_of_work_ends_as_if_it_never_was(
    federated_data: Any, federated_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = make(federated_trainer, "straight")
    straight.fit(small_distiller(), datamodule=data(federated_data))
    expected = finished_state(straight.run_dir)
    pieces = straight.loop.counters.step
    assert pieces > 15
    written = loop_module.save_state
    for stop in range(1, pieces, 5):
        run = make(federated_trainer, f"cut {stop}")

        def cut(*args: Any, stop: int = stop, **kwargs: Any) -> Any:
            if args[1] == stop + 1:
                raise KeyboardInterrupt  # the piece is done, its state is not written
            return written(*args, **kwargs)

        monkeypatch.setattr(loop_module, "save_state", cut)
        with pytest.raises(KeyboardInterrupt):
            run.fit(small_distiller(), datamodule=data(federated_data))
        monkeypatch.setattr(loop_module, "save_state", written)
        torch.manual_seed(stop)  # a new process has another global stream
        again = make(federated_trainer, f"cut {stop}")
        again.fit(small_distiller(), datamodule=data(federated_data), ckpt_path="last")
        assert same(finished_state(again.run_dir), expected), f"cut after piece {stop}"


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(federated_data: Any, federated_trainer: Any) -> None:
    """Fifty SIGKILLs, spread over start-up, local epochs, messages and the writing of states."""
    straight = make(federated_trainer, "straight")
    straight.fit(small_distiller(), datamodule=data(federated_data))
    expected = finished_state(straight.run_dir)
    clock, kills, runs = random.Random(5), 0, 0
    while kills < 50:
        runs += 1
        while True:
            child = os.fork()
            if child == 0:
                with open(os.devnull, "w") as null:
                    os.dup2(null.fileno(), 1)
                    os.dup2(null.fileno(), 2)
                    try:
                        trainer = make(federated_trainer, f"killed {runs}")
                        trainer.run_dir.mkdir(exist_ok=True)
                        trainer.fit(small_distiller(), datamodule=data(federated_data), ckpt_path="last")
                        os._exit(0)
                    except BaseException:
                        os._exit(1)
            time.sleep(clock.uniform(0.05, 0.9))
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                assert os.waitstatus_to_exitcode(status) == 0
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
        assert same(finished_state(straight.run_dir.parent / f"killed {runs}"), expected), f"run {runs}"
    assert runs >= 2


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
