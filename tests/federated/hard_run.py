"""A small federated run with everything that has state, what it leaves behind, and processes that run it and are killed."""

import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lightning_sfubm.callbacks.differential_privacy import DifferentialPrivacy
from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
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


class Watch(Callback):
    """Notes what a client holds after every local epoch: a finished run no longer has its optimisers.

    Weights, optimiser, learning rates, counters, random stream and accountant, in whichever process the epoch ran.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        accountants = [c.accountant for c in trainer.callbacks if isinstance(c, DifferentialPrivacy) and c._active]
        piece = f"{pl_module.phase} to epoch {trainer.max_epochs}, at least {trainer.min_epochs}"
        key = f"{Path(trainer.default_root_dir).name}, {piece}: epoch {trainer.current_epoch}"
        said = {
            "accountant": [[a.history, a.epsilon()] for a in accountants],
            "learning rates": [group["lr"] for o in trainer.optimizers for group in o.param_groups],
            "schedules": [c.scheduler.state_dict()["last_epoch"] for c in trainer.lr_scheduler_configs],
            "global step": trainer.global_step,
            "optimiser": fingerprint([o.state_dict() for o in trainer.optimizers]),
            "weights": fingerprint(pl_module.state_dict()),
            "stream": fingerprint(torch.get_rng_state()),
        }
        with open(self.path, "a") as file:
            file.write(json.dumps([key, said]) + "\n")


def fingerprint(state: Any) -> str:
    """Hash of tensors and plain values, to the last bit."""
    if isinstance(state, torch.Tensor):
        form = f"{state.dtype}{tuple(state.shape)}".encode()
        return sha256(form + state.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    if isinstance(state, dict):
        return fingerprint([[str(key), value] for key, value in state.items()])
    if isinstance(state, (list, tuple)):
        return sha256(" ".join(map(fingerprint, state)).encode()).hexdigest()
    return sha256(repr(state).encode()).hexdigest()


#: a schedule with everything that has state: server moments, partial participation, drop-outs, late and early clients
HARD = {"rounds": 4, "participation": 0.7, "joins": {"gamma": 2}, "leaves": {"alpha": 3}, "client_epochs": {"beta": 2}}


def make(
    federated_trainer: Any,
    folder: str,
    extra: tuple[FederatedCallback, ...] = (),
    private: bool = False,
    watch: Path | None = None,
    **settings: Any,
) -> Any:
    callbacks: list[Callback] = [PrivacyNoise(0.05), Flaky(), *extra]
    if private:
        callbacks.append(DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, accounting="rdp"))
    if watch is not None:
        callbacks.append(Watch(watch))
    return federated_trainer(folder, callbacks=callbacks, **{**HARD, "weights": FedAdam(), **settings})


def data(federated_data: Any) -> Any:
    return federated_data(domains=3, num_users=30, num_items=48)


def module() -> Any:
    """Its learning rate rises over all rounds."""
    return small_distiller(warmup_steps=20)


def finished_state(folder: Path) -> dict[str, Any]:
    """Everything a finished run leaves, but for nonces, clocks and the number of states written."""
    state = find_state(folder / "checkpoints")
    loop = read_loop(state)["stored"]
    server = torch.load(state / "server.ckpt", weights_only=True)
    clients = {file.stem: torch.load(file, weights_only=True) for file in sorted((state / "clients").glob("*.ckpt"))}
    keep = ("state_dict", "global_step", "epoch", "optimizer_states", "lr_schedulers", "callbacks")
    ledger = [e for e in read_ledger(folder / "ledger.jsonl") if not e.get("resent")]
    told = ("round", "client", "direction", "kind", "content_sha256", "mechanism")
    return {
        "clients": {name: {k: c[k] for k in keep if k in c} for name, c in clients.items()},
        "server": {k: server[k] for k in ("global_teacher", "version", "weights")},
        "counters": {k: v for k, v in loop["counters"].items() if k != "step"},
        "history": (folder / "history.jsonl").read_text(),
        "sent": [{key: entry[key] for key in told} for entry in ledger],
    }


def watched(path: Path) -> dict[str, Any]:
    """What :class:`Watch` noted, by epoch; an epoch that was trained twice must have said the same twice."""
    notes: dict[str, Any] = {}
    for line in path.read_text().splitlines():
        key, said = json.loads(line)
        assert notes.setdefault(key, said) == said, key
    return notes


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


# ---------------------------------------------------------------------- processes


def fork(work: Callable[[], None], hook: Callable[[str, tuple], None] | None = None) -> int:
    """Start ``work`` in a copy of this process, silent, under an audit hook; exit code 0 = it came to its end."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            if hook is not None:
                sys.addaudithook(hook)
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def run_until(work: Callable[[], None], seconds: float) -> bool:
    """SIGKILL ``work`` after some time; whether it had come to its end."""
    child = fork(work)
    time.sleep(seconds)
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        assert os.waitstatus_to_exitcode(status) == 0
        return True
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


_WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.copyfile", "shutil.rmtree"}


def step_of(event: str, args: tuple, run: Path) -> str | None:
    """Name of a step that changes files of a run, without numbers, random parts and which client; ``None`` = another one."""
    if event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+")):
        return None
    if event not in _WRITES and event != "open":
        return None
    paths = [os.fsdecode(a) for a in args[:2] if isinstance(a, (str, bytes, os.PathLike))]
    inside = [p[len(str(run)) :] for p in paths if p.startswith(str(run))]
    relative = event in ("os.remove", "os.rmdir") and not os.path.isabs(paths[0])  # a step of shutil.rmtree
    if not inside and not relative:
        return None
    names = [re.sub(r"\d+|alpha|beta|gamma", "#", re.sub(r"\.jsonl\.\w{8}$", ".jsonl.*", p)) for p in inside or paths]
    return " ".join([event, *names])


def run_recorded(work: Callable[[], None], run: Path, log: Path) -> None:
    """Run ``work`` to its end and write the steps that changed its files to ``log``."""

    def hook(event: str, args: tuple) -> None:
        step = step_of(event, args, run)
        if step is not None:
            os.write(target, step.encode() + b"\n")

    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    child = fork(work, hook)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(target)


def run_until_step(work: Callable[[], None], run: Path, wanted: str, occurrence: int) -> bool:
    """SIGKILL ``work`` right before a step it takes for the n-th time; whether it came to its end without it."""
    seen: Counter[str] = Counter()

    def hook(event: str, args: tuple) -> None:
        step = step_of(event, args, run)
        if step == wanted:
            seen[step] += 1
            if seen[step] == occurrence:
                os.kill(os.getpid(), signal.SIGKILL)

    code = os.waitstatus_to_exitcode(os.waitpid(fork(work, hook), 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0
