"""Clients in worker processes: the same run bit for bit, errors and dead workers are one clear error (T19)."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

from lightning_sfubm.errors import ConfigError, PrivacyError
from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.federated.workers import WorkerError
from tests.conftest import quiet_trainer, small_distiller, small_federation
from tests.federated.hard_run import data, finished_state, make, same

pytestmark = pytest.mark.slow


def gone(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


class Remember(FederatedCallback):
    """Process ids of the workers at the end of each round, and optionally the death of one of them."""

    def __init__(self, kill_after: int | None = None) -> None:
        self.pids: list[list[int]] = []
        self.kill_after = kill_after

    def __getstate__(self) -> dict[str, Any]:
        return {"pids": [], "kill_after": None}

    def on_round_end(self, loop: Any, round: int, metrics: Any) -> None:
        self.pids.append(loop.workers.pids)
        if round == self.kill_after:
            os.kill(loop.workers.pids[-1], signal.SIGKILL)


class Fails(Callback):
    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.datamodule.name == "beta":
            raise self.error("beta cannot")


def test_workers_give_the_same_run_and_one_that_dies_leaves_it_to_be_gone_on_with(
    federated_data: Any, federated_trainer: Any
) -> None:
    serial = make(federated_trainer, "serial")
    serial.fit(small_distiller(), datamodule=data(federated_data))
    expected = finished_state(serial.run_dir)

    seen = Remember()
    parallel = make(federated_trainer, "parallel", extra=(seen,), workers=2)
    parallel.fit(small_distiller(), datamodule=data(federated_data))
    assert same(finished_state(parallel.run_dir), expected)
    assert len(seen.pids[0]) == 2
    assert seen.pids.count(seen.pids[0]) == 4  # the same processes in every round
    assert os.getpid() not in seen.pids[0]
    assert all(map(gone, seen.pids[0]))
    live = [t.test(small_distiller(), datamodule=data(federated_data), verbose=True) for t in (serial, parallel)]
    assert live[0] == live[1]

    dies = Remember(kill_after=1)
    broken = make(federated_trainer, "broken", extra=(dies,), workers=2)
    with pytest.raises(WorkerError, match="exit code -9"):
        broken.fit(small_distiller(), datamodule=data(federated_data))
    assert all(map(gone, dies.pids[0]))
    again = make(federated_trainer, "broken")  # the number of workers may change
    again.fit(small_distiller(), datamodule=data(federated_data), ckpt_path="last")
    assert same(finished_state(again.run_dir), expected)


@pytest.mark.parametrize(
    ("raised", "seen", "words"),
    [(PrivacyError, PrivacyError, "client 'beta': beta cannot"), (KeyError, RuntimeError, "client 'beta' failed")],
)
def test_an_error_in_a_worker_is_one_error_here(
    raised: Any, seen: Any, words: str, federated_data: Any, federated_trainer: Any
) -> None:
    trainer = federated_trainer(exchange="teacher", callbacks=[Fails(raised)], workers=2)
    with pytest.raises(seen, match=words):
        trainer.fit(small_distiller(), datamodule=federated_data())
    assert trainer.loop.workers.pids == []


class Dies(FederatedCallback):
    """The process ends after the first round; its workers are noted before."""

    def __init__(self, pids: Path) -> None:
        self.pids = pids

    def __reduce__(self) -> Any:
        return (FederatedCallback, ())

    def on_round_end(self, loop: Any, round: int, metrics: Any) -> None:
        self.pids.write_text(" ".join(map(str, loop.workers.pids)))
        os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(folder: Path) -> None:
    trainer = quiet_trainer(folder / "run", exchange="teacher", callbacks=[Dies(folder / "pids")], workers=2)
    trainer.fit(small_distiller(), datamodule=small_federation())


def test_no_worker_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=run_and_die, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, pids))


def test_a_negative_number_of_workers_is_refused(federated_trainer: Any) -> None:
    with pytest.raises(ConfigError, match="workers"):
        federated_trainer(workers=-1)


def test_the_command_line_runs_clients_in_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its callbacks hold the parser and this process's trainer, which no other process can be sent."""
    from lightning_sfubm.cli import SFUBMCLI

    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    settings = {"rounds": 1, "local_max_epochs": 1, "local_min_epochs": 1, "patience": 1, "workers": 2}
    flags = [
        part for name, value in settings.items() for part in (f"--trainer.federation.init_args.{name}", str(value))
    ]
    config = Path(__file__).parents[2] / "configs" / "debug" / "synthetic.yaml"
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(tmp_path / "run")]
    SFUBMCLI(args=["fit", "--config", str(config), "--experiment.init_args.methods", "[popularity]", *flags, *quiet])
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "config.yaml").is_file()
