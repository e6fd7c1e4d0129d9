"""Epsilon at delta is live in the progress line and in W&B, and stands in checkpoints and in the report."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import WandbLogger

from lightning_sfubm.callbacks import progress
from lightning_sfubm.callbacks.differential_privacy import DifferentialPrivacy
from lightning_sfubm.errors import PrivacyError
from lightning_sfubm.evaluation.report import build_report
from lightning_sfubm.federated import state as run_state
from lightning_sfubm.federated.checkpoint import find_state, read_loop
from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.federated.ledger import read_ledger
from lightning_sfubm.privacy.accounting import PrivacyAccountant
from lightning_sfubm.privacy.rounding import round_up
from tests.callbacks.test_dashboard import offline_wandb, wandb_records  # noqa: F401
from tests.conftest import small_distiller

USERS, BATCH, DELTA = 30, 10, 1e-3


def epsilon(steps: int) -> float:
    accountant = PrivacyAccountant("rdp")
    accountant.step(1.0, BATCH / USERS, steps)
    return accountant.epsilon(DELTA)


class Bar:
    """A terminal that remembers what stood behind the bar."""

    shown: list[tuple[str, str]] = []

    def __init__(self, desc: str, **_: Any) -> None:
        self.label = desc

    def update(self, number: int) -> None:
        pass

    def close(self) -> None:
        pass

    def set_postfix_str(self, text: str) -> None:
        Bar.shown.append((self.label, text))


def test_what_is_spent_is_shown_logged_stored_and_reported(
    offline_wandb: Path,  # noqa: F811
    federated_data: Any,
    federated_trainer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import wandb

    Bar.shown = []
    monkeypatch.setattr(progress, "tqdm", Bar)
    states: list[dict[str, Any]] = []
    written = run_state.save_state

    def keep(*args: Any, **kwargs: Any) -> Path:
        final = written(*args, **kwargs)
        files = (final / "clients").glob("*.ckpt")
        clients = {file.stem: torch.load(file, weights_only=True) for file in files}
        states.append({"clients": clients, **read_loop(final)["stored"]["counters"]})
        return final

    monkeypatch.setattr(run_state, "save_state", keep)
    logger = WandbLogger(project="test", save_dir=str(offline_wandb), offline=True)
    private = DifferentialPrivacy(noise_multiplier=1.0, delta=DELTA, accounting="rdp")
    flags = {"logger": logger, "log_every_n_steps": 2, "limit_val_batches": 1, "enable_progress_bar": True}
    trainer = federated_trainer(exchange="teacher", callbacks=[private], local_max_epochs=1, flags=flags)
    trainer.fit(small_distiller(), datamodule=federated_data(num_users=USERS, batch_size=BATCH))
    wandb.finish()
    wandb.teardown()
    a_round = USERS // BATCH
    after = [epsilon(a_round), epsilon(2 * a_round)]
    assert after[0] < after[1]

    behind = [text for label, text in Bar.shown if label == "round 1/2, alpha"]
    first, last = (f"epsilon {round_up(epsilon(steps), 3)} at delta 0.001" for steps in (2, a_round))
    assert first in behind  # within the round: every second step is logged here
    assert last in behind[-1]
    assert behind.index(first) < len(behind) - 1
    assert not any("epsilon" in text for label, text in Bar.shown if label.startswith("local"))  # spends nothing
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("round")]
    for line, spent in zip(lines, after, strict=True):
        assert line.count(f"(epsilon {round_up(spent, 3)} at delta 0.001)") == 2  # of either client

    found: dict[str, list[float]] = {}
    for record in wandb_records(next(offline_wandb.rglob("run-*.wandb"))):
        for item in record.history.item:
            key = item.key or "/".join(item.nested_key)
            if "privacy" in key:
                found.setdefault(key, []).append(json.loads(item.value_json))
    for client in ("alpha", "beta"):
        assert found[f"fed/{client}/privacy/epsilon"] == pytest.approx(after, rel=1e-6)
        assert found[f"fed/{client}/privacy/delta"] == pytest.approx([DELTA, DELTA])
        assert found[f"{client}/privacy/epsilon"][0] == pytest.approx(epsilon(2), rel=1e-6)  # within the round

    assert [sorted(state["spent"]) for state in states[:2]] == [["alpha"], ["alpha", "beta"]]
    for name in ("alpha", "beta"):
        told = [(s["spent"][name]["epsilon"], s["spent"][name]["delta"]) for s in states if name in s["spent"]]
        assert list(dict.fromkeys(told)) == [(spent, DELTA) for spent in after]
        assert told[-1] == (after[1], DELTA)  # also when the optimiser and its accountant are long gone
        accountant = PrivacyAccountant("rdp")
        kept = next(s["clients"][name]["callbacks"] for s in reversed(states) if "callbacks" in s["clients"][name])
        accountant.load_state_dict(kept["DifferentialPrivacy"]["accountant"])
        assert accountant.epsilon(DELTA) == after[1]

    sent = [e["mechanism"] for e in read_ledger(trainer.run_dir / "ledger.jsonl") if e["direction"] == "up"]
    assert [m["differential privacy"]["epsilon"] for m in sent] == [after[0]] * 2 + [after[1]] * 2
    report, told = build_report(trainer.run_dir), f"epsilon {round_up(after[1], 4)} at delta 0.001"
    assert report.read_text().count(told) == 2
    assert "epsilon" not in report.read_text().replace(told, "")


class KillIn(FederatedCallback):
    def __init__(self, round: int) -> None:
        self.round = round

    def on_client_start(self, loop: Any, client: str, round: int) -> None:
        self.run_dir = loop.run_dir
        if (client, round) == ("beta", self.round):
            raise KeyboardInterrupt


def fit(make: Any, data: Any, folder: str, budget: float | None, more: Any = (), **flags: Any) -> Any:
    private = DifferentialPrivacy(noise_multiplier=1.0, delta=DELTA, accounting="rdp", target_epsilon=budget)
    settings = {"exchange": "teacher", "local_max_epochs": 1, "flags": {"limit_val_batches": 1}}
    trainer = make(folder, callbacks=[private, *more], **settings)
    trainer.run_dir.mkdir(exist_ok=True)
    trainer.fit(small_distiller(), datamodule=data(num_users=USERS, batch_size=BATCH), **flags)
    return trainer


def test_a_resumed_run_goes_on_spending(federated_data: Any, federated_trainer: Any) -> None:
    """Killed after alpha's second round: what it spent is kept, and the budget holds for all rounds."""
    spent = {}
    for folder, budget in (("straight", None), ("killed", None), ("poor", epsilon(5))):
        if folder == "killed":
            kill = KillIn(2)
            with pytest.raises(KeyboardInterrupt):
                fit(federated_trainer, federated_data, folder, budget, [kill])
            stored = read_loop(find_state(kill.run_dir / "checkpoints"))["stored"]["counters"]
            assert stored["spent"]["alpha"]["epsilon"] == epsilon(6)
            assert stored["spent"]["beta"]["epsilon"] == epsilon(3)
        if folder == "poor":
            with pytest.raises(PrivacyError, match="over the budget"):
                fit(federated_trainer, federated_data, folder, budget)
            continue
        trainer = fit(federated_trainer, federated_data, folder, budget, ckpt_path="last")
        spent[folder] = trainer.loop.counters.spent
    assert spent["killed"] == spent["straight"]
    assert {name: entry["epsilon"] for name, entry in spent["killed"].items()} == dict.fromkeys(
        spent["killed"], epsilon(6)
    )


def test_what_is_spent_is_in_the_csv_file_of_each_client_after_every_epoch(
    federated_data: Any, federated_trainer: Any
) -> None:
    """Rounds of fewer steps than a logger writes at: these files have no line of the federation's."""
    pytest.importorskip("opacus")
    private = DifferentialPrivacy(noise_multiplier=1.0, delta=DELTA, accounting="rdp")
    trainer = federated_trainer(exchange="teacher", callbacks=[private], local_epochs=2, local_max_epochs=1)
    trainer.fit(small_distiller(), datamodule=federated_data(num_users=USERS, batch_size=BATCH))
    an_epoch = USERS // BATCH
    for client in ("alpha", "beta"):
        (path,) = (trainer.run_dir / "csv" / client).rglob("metrics.csv")
        with open(path, newline="") as handle:
            lines = [line for line in csv.DictReader(handle) if line["privacy/epsilon"]]
        after = [epsilon(an_epoch * number) for number in (1, 2, 3, 4)]
        assert [float(line["privacy/epsilon"]) for line in lines] == pytest.approx(after, rel=1e-6)
        assert [float(line["privacy/delta"]) for line in lines] == pytest.approx([DELTA] * 4)
