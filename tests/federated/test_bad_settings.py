"""Federated settings and run folders that cannot be used: one sentence, exit code 2, nothing half-written (T31)."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_sfubm.__main__ import main
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder
from lightning_sfubm.errors import ConfigError
from tests.conftest import small_distiller
from tests.federated.test_loop import contents

SYNTHETIC = Path(__file__).resolve().parents[2] / "configs/debug/synthetic.yaml"
FED, AGG = "--trainer.federation.init_args.", "lightning_sfubm.federated."
NOISE = "--trainer.callbacks.init_args.sigma"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([f"{FED}rounds", "-1"], ["rounds = -1"]),
        ([f"{FED}rounds", "many"], ["rounds", "many"]),
        ([f"{FED}roundz", "3"], ["roundz"]),
        ([f"{FED}local_epochs", "0"], ["local_epochs = 0"]),
        ([f"{FED}exchange", "everything"], ["exchange", "everything"]),
        ([f"{FED}participation", "1.5"], ["participation = 1.5"]),
        ([f"{FED}min_updates", "0"], ["min_updates = 0"]),
        ([f"{FED}max_items", "0"], ["max_items = 0"]),
        ([f"{FED}workers", "-2"], ["workers = -2"]),
        ([f"{FED}weighting", "clicks"], ["weighting", "clicks"]),
        ([f"{FED}joins", '{"gamma": 2}'], ["joins", "gamma", "alpha, beta"]),
        ([f"{FED}leaves", '{"beta": -1}'], ["leaves", "beta", "-1"]),
        ([f"{FED}client_epochs", '{"alpha": 0}'], ["client_epochs", "alpha"]),
        ([f"{FED}aggregator", f"{AGG}aggregation.KNNMix", f"{FED}aggregator.init_args.k", "2"], ["k = 2"]),
        ([f"{FED}aggregator", f"{AGG}aggregation.Nothing"], ["aggregation.Nothing"]),
        ([f"{FED}weights", f"{AGG}robust.Krum", f"{FED}exchange", "teacher"], ["Krum", "this federation has 2"]),
        (
            [
                f"{FED}secure_aggregation",
                f"{AGG}secure.SecureAggregation",
                f"{FED}secure_aggregation.init_args.threshold",
                "0.3",
            ],
            ["threshold = 0.3"],
        ),
        (
            [f"{FED}monitor", "val/ndgc@10"],
            ["federation.monitor 'val/ndgc@10' is none of the metrics", " val/ndcg@10,"],
        ),
        ([f"{FED}monitor", "hit@1"], ["federation.monitor 'hit@1' is none of the metrics", " val/hit@1,"]),
        (["--trainer.barebones", "true"], ["trainer.barebones", "remove it"]),
        (["--trainer.overfit_batches", "3"], ["overfit_batches", "set trainer.limit_train_batches instead"]),
        (["--trainer.limit_train_batches", "0"], ["trainer.limit_train_batches is 0"]),
        (["--trainer.limit_val_batches", "0"], ["trainer.limit_val_batches is 0"]),
        (["--trainer.check_val_every_n_epoch", "30"], ["check_val_every_n_epoch = 30", "local_max_epochs = 10"]),
        ([NOISE, "-1"], ["sigma"]),
        (["--ckpt_path", "best"], ["best: no federated checkpoint there; 'last' is the newest state of the run"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_a_setting_that_cannot_be_used_is_one_sentence(
    flags: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", str(SYNTHETIC), "--trainer.default_root_dir", "run", "--experiment", "null", *flags])
    assert exit.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("lightning-sfubm: error:")
    for word in words:
        assert word in message
    assert [file for file in (tmp_path / "run").rglob("*") if file.is_file()] == []


def test_a_run_that_may_not_go_on_leaves_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """States, ledger, history and the configuration that they belong to."""
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--config", str(SYNTHETIC), "--trainer.default_root_dir", "run", "--experiment", "null"]
    command += ["--trainer.enable_progress_bar", "false", f"{FED}rounds", "0", f"{FED}local_max_epochs", "1"]
    command += [
        f"{FED}local_min_epochs",
        "1",
        "--data.init_args.domains.alpha.init_args.reader.init_args.num_users",
        "60",
    ]
    main(command)
    before = contents(tmp_path / "run")
    assert b"local_epochs: 1" in before["config.yaml"]
    with pytest.raises(SystemExit):
        main([*command, "--ckpt_path", "last", f"{FED}local_epochs", "2"])
    message = capsys.readouterr().err
    assert "was written by the schedule" in message
    assert ": trainer.federation.local_epochs was 1 and is 2; set it back, or start anew in another" in message
    assert contents(tmp_path / "run") == before


def test_epochs_of_an_ordinary_fit_are_said_to_have_no_effect(
    federated_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "lightning_sfubm"):
        federated_trainer(flags={"max_steps": -1, "max_epochs": None})
        assert not caplog.records
        federated_trainer(flags={"max_steps": 5, "min_epochs": 2})
    assert "trainer.min_epochs and trainer.max_steps has no effect" in caplog.text


def test_trainings_of_a_federated_run_keep_their_best_epoch_whatever_was_asked_for(
    federated_data: Any, federated_trainer: Any
) -> None:
    """A phase ends by putting the best epoch back, so it has to be kept; the user's own checkpoints have no place."""
    trainer = federated_trainer(rounds=1, local_max_epochs=1, flags={"enable_checkpointing": False})
    trainer.fit(small_distiller(), datamodule=federated_data(num_users=30))
    assert trainer.loop.counters.phases
    with pytest.raises(ConfigError, match=r"take ModelCheckpoint out of trainer\.callbacks"):
        federated_trainer(callbacks=[ModelCheckpoint()])


def test_parts_given_as_objects_serve_every_training(federated_data: Any, federated_trainer: Any) -> None:
    """A trainer makes a strategy its own; logger-bound monitors have no place where nothing is logged."""
    parts = {"strategy": SingleDeviceStrategy("cpu"), "logger": False}
    monitors = [LearningRateMonitor(), DeviceStatsMonitor()]
    trainer = federated_trainer(rounds=1, exchange="nothing", callbacks=monitors, flags=parts)
    trainer.fit(small_distiller(), datamodule=federated_data(num_users=30))
    of_a_row = trainer.make_trainer(label="a row", max_epochs=1)
    assert of_a_row.strategy is not trainer.strategy
    assert not any(isinstance(callback, type(monitor)) for monitor in monitors for callback in of_a_row.callbacks)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_length": 30}, r"SASRec takes histories of max_length=16 items, and domain 'alpha' has some of"),
        ({"dim": 24}, r"text vectors .* differ in size \(beta of 24 numbers, alpha of 32 numbers\): give all the same"),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_a_finished_run_is_cleared(
    changes: dict[str, int], words: str, tmp_path: Path, federated_data: Any, federated_trainer: Any
) -> None:
    trainer = federated_trainer(rounds=1, local_max_epochs=1)
    trainer.fit(small_distiller(), datamodule=federated_data(num_users=30))
    before = contents(trainer.run_dir)
    data = federated_data(num_users=30, **{k: v for k, v in changes.items() if k == "max_length"})
    if "dim" in changes:
        data.domains["beta"].text_encoder = HashingTextEncoder(dim=changes["dim"])
    with pytest.raises(ConfigError, match=words):
        federated_trainer(rounds=1, local_max_epochs=1).fit(small_distiller(), datamodule=data)
    assert contents(trainer.run_dir) == before
