"""SIGKILL at any moment: the run that goes on ends as the one that never stopped, bit for bit (T1, T2)."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.federated.hard_run import (
    data,
    finished_state,
    make,
    module,
    run_recorded,
    run_until,
    run_until_step,
    same,
    watched,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # a busy machine restarts what is killed slowly
SYNTHETIC = Path(__file__).resolve().parents[2] / "configs/debug/synthetic.yaml"


@pytest.fixture
def job(federated_trainer: Any, federated_data: Any, tmp_path: Path) -> Callable[..., Any]:
    """``job(folder, private=False)``: work that starts the hard run in a folder, or goes on with it."""

    def fit(folder: str, private: bool = False) -> Any:
        trainer = make(federated_trainer, folder, private=private, watch=tmp_path / f"{folder} epochs.jsonl")
        trainer.run_dir.mkdir(exist_ok=True)
        trainer.fit(module(), datamodule=data(federated_data), ckpt_path="last")
        return trainer

    return fit


def left(tmp_path: Path, folder: str) -> list[Any]:
    return [finished_state(tmp_path / folder), watched(tmp_path / f"{folder} epochs.jsonl")]


@pytest.mark.parametrize(("private", "kills"), [(False, 40), (True, 15)], ids=["plain", "private"])
def test_killed_at_random_moments(private: bool, kills: int, job: Callable[..., Any], tmp_path: Path) -> None:
    """Spread over start-up, local epochs, messages and the writing of states; weights, counters, streams, epsilon."""
    started = time.monotonic()
    job("straight", private)
    longest = 0.3 * (time.monotonic() - started)
    expected = left(tmp_path, "straight")
    assert any(said["accountant"] for said in expected[1].values()) == private
    clock, done, runs = random.Random(5), 0, 0
    while done < kills:
        runs += 1
        folder = f"killed {runs}"
        killed = 0
        # The more often a run was killed the longer it is let be, so that it ends however slow the machine has become.
        while not run_until(partial(job, folder, private), clock.uniform(0.05, longest * (1 + killed / 20))):
            killed += 1
        done += killed
        assert same(left(tmp_path, folder), expected), folder


def test_killed_before_every_step_that_changes_a_file(job: Callable[..., Any], tmp_path: Path) -> None:
    """States, history, ledger, the clients' own files: each kind of step that a whole run and a resumed one take."""
    job("straight")
    expected = left(tmp_path, "straight")
    log, clock = tmp_path / "steps", random.Random(6)
    run_recorded(partial(job, "recorded"), tmp_path / "recorded", log)
    folder, run = "cut", tmp_path / "cut"
    run_until(partial(job, folder), 1.0)
    run_recorded(partial(job, folder), run, log)
    steps = sorted(set(log.read_text().splitlines()))
    assert len(steps) > 20
    for words in ("loop.json", "server.ckpt", "history.jsonl", "ledger.jsonl", "os.link", "os.rename", "trained.ckpt"):
        assert any(words in step for step in steps), words
    clock.shuffle(steps)
    kills, number = 0, 0
    for step in steps:
        if not run_until_step(partial(job, folder), run, step, clock.choice([1, 1, 2, 5])):
            kills += 1
            continue
        assert same(left(tmp_path, folder), expected), step  # it got to its end
        number += 1
        folder, run = f"cut {number}", tmp_path / f"cut {number}"
        kills += not run_until_step(partial(job, folder), run, step, 1)
    while not run_until_step(partial(job, folder), run, "", 1):
        pass
    assert same(left(tmp_path, folder), expected)
    assert kills > 0.7 * len(steps)


def test_the_command_line_goes_on_after_kills(tmp_path: Path) -> None:
    def command(folder: str, *more: str) -> list[str]:
        flags = ["--trainer.default_root_dir", str(tmp_path / folder), "--trainer.enable_progress_bar", "false"]
        flags += ["--trainer.federation.init_args.exchange", "both", "--trainer.federation.init_args.rounds", "3"]
        flags += ["--trainer.federation.init_args.local_max_epochs", "4", "--experiment", "null", *more]
        return [sys.executable, "-m", "lightning_sfubm", "fit", "--config", str(SYNTHETIC), *flags]

    environment = {**os.environ, "SFUBM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    start = partial(subprocess.Popen, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    straight = start(command("straight"))
    assert straight.wait() == 0, straight.stderr and straight.stderr.read()
    clock = random.Random(7)
    resumed: tuple[str, ...] = ()
    for state in (2, 6, 11):  # in the first round, in the second, in a local phase
        process = start(command("killed", *resumed))
        while process.poll() is None and not list((tmp_path / "killed/checkpoints").glob(f"state-{state:04d}")):
            time.sleep(0.01)
        time.sleep(clock.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr and process.stderr.read()
        resumed = ("--ckpt_path", "last")
    last = start(command("killed", *resumed))
    assert last.wait() == 0, last.stderr and last.stderr.read()
    assert same(finished_state(tmp_path / "killed"), finished_state(tmp_path / "straight"))
