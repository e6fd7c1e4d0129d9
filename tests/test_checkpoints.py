"""``--ckpt_path last`` and ``best`` of one model, in a process that has trained nothing."""

import logging
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sfubm.__main__ import main
from lightning_sfubm.checkpoints import find_checkpoint
from lightning_sfubm.errors import CheckpointError
from lightning_sfubm.federated.trainer import FederatedTrainer
from lightning_sfubm.modules.llm_head import LLMHead
from lightning_sfubm.next_steps import next_steps
from lightning_sfubm.safe_load import load_checkpoint
from tests.conftest import small_distiller
from tests.federated.test_loop import contents

SYNTHETIC = "lightning_sfubm.datamodules.synthetic."


@pytest.fixture
def synthetic(federated_data: Any) -> Any:
    return federated_data(domains=1).domains["alpha"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    encoder = Path(__file__).resolve().parent.parent / "configs/encoder/sasrec.yaml"
    data = ["--data", "lightning_sfubm.datamodules.domain_datamodule.DomainDataModule", "--data.name", "alpha"]
    data += ["--data.reader", SYNTHETIC + "SyntheticReader", "--data.reader.num_users", "80"]
    data += ["--data.text_encoder", SYNTHETIC + "HashingTextEncoder", "--data.k_core", "0", "--data.batch_size", "16"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    quiet += ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.logger", "false"]
    return ["--config", str(encoder), *data, *quiet, "--trainer.accelerator", "cpu"]


def evaluate(command: list[str], *more: str) -> dict[str, float]:
    from lightning_sfubm.cli import SFUBMCLI

    return {k: float(v) for k, v in SFUBMCLI(args=["test", *command, *more]).trainer.callback_metrics.items()}


def test_a_new_process_finds_the_last_and_the_best_weights(
    command: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main(["fit", *command, "--trainer.max_epochs", "6", "--trainer.min_epochs", "1", "--model.init_args.lr", "0.01"])
    last = find_checkpoint([tmp_path / "run"], "last")
    best = find_checkpoint([tmp_path / "run"], "best")
    assert (last.name, best.name.startswith("epoch=")) == ("last.ckpt", True)
    for which, path in (("last", last), ("best", best)):
        assert evaluate(command, "--ckpt_path", which) == evaluate(command, "--ckpt_path", str(path))
    assert "no ckpt_path" not in caplog.text

    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert find_checkpoint([tmp_path / "moved"], "best").name == best.name
    find_checkpoint([tmp_path / "moved"], "best").unlink()
    with pytest.raises(CheckpointError, match="is gone"):
        find_checkpoint([tmp_path / "moved"], "best")


@pytest.mark.parametrize("which", ["last", "best"])
def test_untrained_weights_are_not_evaluated_in_place_of_those_asked_for(
    which: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["test", *command, "--ckpt_path", which])
    assert exit.value.code == 2
    assert "no last.ckpt of an earlier run" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["fit", "test", "predict"])
def test_a_checkpoint_that_cannot_be_read_leaves_no_folder_of_logs(
    action: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"PK torn")
    for given, told in (
        (tmp_path / "none.ckpt", "none.ckpt: there is no checkpoint file"),
        (last, "last.ckpt: not a safe checkpoint of this product"),
        ("last", "last.ckpt: not a safe checkpoint of this product"),
    ):
        with pytest.raises(SystemExit) as exit:
            main([action, *command, "--trainer.logger=true", f"--ckpt_path={given}"])
        assert exit.value.code == 2
        assert told in capsys.readouterr().err.strip().splitlines()[-1]
        assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [last]


@pytest.mark.parametrize("action", ["validate", "test", "predict"])
def test_random_weights_of_stage_1_are_not_evaluated(
    action: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main([action, *command])
    assert exit.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "without --ckpt_path the weights are random: give 'last' or 'best'" in message


def test_a_fit_shows_the_data_and_says_how_to_go_on(
    command: list[str], capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    schedule = ["--trainer.enable_progress_bar", "true", "--trainer.max_epochs", "2", "--trainer.min_epochs", "1"]
    main(["fit", *command, *schedule, "--ckpt_path", "last"])
    shown, notices = capfd.readouterr()
    assert shown.count("Data card: alpha") == 1
    assert "TPU available" not in shown + notices
    assert not [w for w in recwarn if "LeafSpec" in str(w.message)]
    best, further = shown.strip().splitlines()[-2:]
    assert best.startswith("best val/ndcg@10 0.")
    assert Path(best.split("; last: ")[1]).name == "last.ckpt"
    assert further.startswith("next: lightning-sfubm test --config ")
    assert further.endswith(" --ckpt_path best (or predict in place of test)")
    told = shlex.split(further.removeprefix("next: ").removesuffix(" (or predict in place of test)"))
    for action in ("test", "predict"):
        main([action, *told[2:]])
    shown = capfd.readouterr().out
    assert "test/ndcg@10" in shown
    assert "Recommendations of alpha" in shown
    assert not [w for w in recwarn if "batch indices" in str(w.message)]


@pytest.mark.parametrize("flag", ["max_epochs", "max_steps"])
def test_a_fit_that_takes_no_step_says_so(flag: str, command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    main(["fit", *command, f"--trainer.{flag}", "0"])
    assert (
        capfd.readouterr()
        .out.splitlines()[-1]
        .startswith("nothing was trained: trainer and data left no step to take (")
    )


def test_a_fit_without_a_batch_is_refused(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *command, "--trainer.limit_train_batches", "0"])
    assert stop.value.code == 2
    assert "there is no batch to train on: set trainer.limit_train_batches above 0" in capfd.readouterr().err


def test_a_fit_that_goes_on_from_its_end_says_that_it_took_no_step(
    command: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    command += ["--trainer.max_epochs", "1", "--trainer.min_epochs", "1"]
    main(["fit", *command])
    assert "nothing was trained" not in capfd.readouterr().out
    main(["fit", *command, "--ckpt_path", "last"])
    assert "nothing was trained: trainer and data left no step to take (max_epochs 1, " in capfd.readouterr().out


def test_a_best_checkpoint_that_a_new_process_would_not_find_is_named_by_its_path(tmp_path: Path) -> None:
    callback = ModelCheckpoint(dirpath=tmp_path / "elsewhere", monitor="val/ndcg@10")
    trainer = FederatedTrainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=[callback])
    assert next_steps(trainer, small_distiller(), ["fit"]) == []  # nothing written
    callback.best_model_path = str(tmp_path / "elsewhere" / "a.ckpt")
    first, second = next_steps(trainer, small_distiller(), ["fit", "--a", "1", "--ckpt_path=x"])
    assert first == f"checkpoint: {callback.best_model_path}"
    assert f"lightning-sfubm test --a 1 --ckpt_path {callback.best_model_path} " in second


def test_a_python_caller_may_evaluate_a_module_as_it_is(
    synthetic: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may have been trained; where a checkpoint lies besides, a line says that it is not used."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"")
    trainer = FederatedTrainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    with caplog.at_level(logging.WARNING, "lightning_sfubm"):
        trainer.test(small_distiller(), datamodule=synthetic, verbose=False)
    assert "no ckpt_path is given" in caplog.text


def test_an_untrained_model_that_is_not_of_stage_1_may_be_evaluated(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an LLM head is, zero-shot."""
    monkeypatch.setattr("lightning_sfubm.cli.CatalogueModule", LLMHead)
    assert "test/ndcg@10" in evaluate(command)


def test_a_fit_starts_from_the_beginning_where_there_is_no_last(
    command: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING, "lightning_sfubm"):
        main(["fit", *command, "--trainer.max_epochs", "1", "--trainer.min_epochs", "1", "--ckpt_path", "last"])
    assert "training starts from the beginning" in caplog.text
    again: list[Any] = [
        "fit",
        *command,
        "--trainer.max_epochs",
        "2",
        "--trainer.min_epochs",
        "1",
        "--ckpt_path",
        "last",
    ]
    main(again)
    assert load_checkpoint(find_checkpoint([tmp_path / "run"], "last"))["epoch"] == 1


def test_a_training_that_goes_on_keeps_its_best_and_saves_every_epoch(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    """With a logger each start has a folder of its own, in which Lightning would have forgotten what was best."""
    fit = ["fit", *command, "--trainer.logger=true", "--trainer.min_epochs=1"]
    main([*fit, "--trainer.max_epochs=2"])
    last, best = (find_checkpoint([tmp_path / "run"], which) for which in ("last", "best"))
    loaded = load_checkpoint(last)
    (state,) = [state for state in loaded["callbacks"].values() if state.get("monitor")]
    state["best_model_score"] = state["kth_value"] = torch.tensor(2.0)  # beyond any epoch's
    state["best_k_models"] = dict.fromkeys(state["best_k_models"], torch.tensor(2.0))
    torch.save(loaded, last)
    capsys.readouterr()
    main([*fit, "--trainer.max_epochs=4", "--ckpt_path=last"])
    assert f"best val/ndcg@10 2.0000: {best}; last: {last}\n" in capsys.readouterr().out
    assert find_checkpoint([tmp_path / "run"], "best") == best
    assert find_checkpoint([tmp_path / "run"], "last") == last
    assert load_checkpoint(last)["epoch"] == 3
    assert len(list((tmp_path / "run").rglob("*.ckpt"))) == 2
    assert not [w for w in recwarn if "dirpath has changed" in str(w.message)]


def refused(fit: list[str], told: str) -> None:
    from lightning_sfubm.cli import SFUBMCLI

    with pytest.raises(CheckpointError, match=told):
        SFUBMCLI(args=fit)


def test_a_training_goes_on_under_the_settings_it_was_begun_with_alone(command: list[str], tmp_path: Path) -> None:
    fit = ["fit", *command, "--trainer.logger=true", "--trainer.min_epochs=1"]
    main([*fit, "--trainer.max_epochs=2"])
    again = [*fit, "--ckpt_path=last", "--trainer.max_epochs=3"]
    for other, told in (
        ("--model.init_args.lr=0.5", r"model\.init_args\.lr was 0\.001 and is 0\.5; set them back"),
        ("--data.batch_size=7", r"data\.init_args\.batch_size was 16 and is 7; set them back"),
        ("--seed_everything=2", r"seed_everything was 1 and is 2; set them back"),
        ("--trainer.max_epochs=0", r"2 epochs had begun when it was written, and trainer\.max_epochs is 0: set it"),
        ("--trainer.max_epochs=1", r"2 epochs had begun when it was written, and trainer\.max_epochs is 1: set it"),
    ):
        with pytest.raises(SystemExit):
            main([*again, other])
        refused([*again, other], told)
    for which in ("last", "best"):
        path = find_checkpoint([tmp_path / "run"], which)
        for named in (which, str(path)):
            told = f"{path}: was trained with other settings: model.init_args.lr was 0.001 and is 0.5; "
            refused([*again, f"--ckpt_path={named}", "--model.init_args.lr=0.5"], re.escape(told))
    main([*again, "--trainer.max_epochs=2"])  # nothing is left to train, and nothing contradicts it
    main([*again, "--trainer.log_every_n_steps=3"])
    assert load_checkpoint(find_checkpoint([tmp_path / "run"], "last"))["epoch"] == 2


def test_the_settings_are_those_of_the_checkpoint_whatever_other_commands_left_in_its_folder(
    command: list[str], tmp_path: Path
) -> None:
    fit = ["fit", *command, "--trainer.min_epochs=1"]
    again = [*fit, "--trainer.max_epochs=2", "--ckpt_path=last"]
    main([*fit, "--trainer.max_epochs=1"])
    config = tmp_path / "run" / "config.yaml"
    before = config.read_text()
    for action in ("validate", "test", "predict"):
        main([action, *command, "--data.num_candidates=10", "--ckpt_path=last"])
        assert config.read_text() == before
        assert "num_candidates: 10" in config.with_name(f"config_{action}.yaml").read_text()
    # As a fit from the beginning leaves it that has written no checkpoint yet.
    config.write_text(before.replace("lr: 0.001", "lr: 0.5"))
    refused([*again, "--model.init_args.lr=0.5"], r"model\.init_args\.lr was 0\.001 and is 0\.5; set them back")
    main(again)
    last = find_checkpoint([tmp_path / "run"], "last")
    loaded = load_checkpoint(last)
    assert loaded["epoch"] == 1

    (entry,) = [key for key in loaded if "settings" in key]
    del loaded[entry]  # as an earlier version wrote it: the folder tells
    torch.save(loaded, last)
    refused([*again, "--model.init_args.lr=0.5"], r"model\.init_args\.lr was 0\.001 and is 0\.5; set them back")
    config.unlink()
    main([*again, "--trainer.max_epochs=3"])

    loaded = load_checkpoint(last)  # with the entry again; in shards it lies beside them
    last.unlink()
    last.mkdir()
    config.unlink()
    torch.save(loaded, last / _METADATA_FILENAME)
    refused([*again, "--model.init_args.lr=0.5"], r"model\.init_args\.lr was 0\.001 and is 0\.5; set them back")


def test_a_command_that_is_refused_leaves_the_run_before_as_it_was(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where Lightning has set everything up by then."""
    schedule = ["--trainer.max_epochs=1", "--trainer.min_epochs=1"]
    main(["fit", *command, *schedule])
    main(["predict", *command, "--ckpt_path=last"])
    before = contents(tmp_path / "run")
    assert {"config.yaml", "config_predict.yaml", "predictions/alpha.parquet"} <= before.keys()
    rows = ["--model.item_updates=rows", "--model.loss=sampled"]
    for refused, told in (
        (["fit", *schedule, *rows, "--trainer.gradient_clip_val=1"], "are not clipped"),
        (["predict", "--ckpt_path=last", "--data.reader.num_items=60"], "num_items"),
        (["test", "--ckpt_path=last", "--data.reader.num_items=60"], "num_items"),
        (["validate", "--ckpt_path=last", "--data.reader.num_items=60"], "num_items"),
    ):
        with pytest.raises(SystemExit) as exit:
            main([refused[0], *command, *refused[1:]])
        assert exit.value.code == 2
        assert told in capsys.readouterr().err.strip().splitlines()[-1]
        assert contents(tmp_path / "run") == before


def test_where_the_last_one_is_looked_for(tmp_path: Path) -> None:
    """In the places Lightning writes to, not in another run's folder below this one; shards are a folder."""

    def make(name: str, time: int, shards: bool = False) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if shards:
            path.mkdir()
        else:
            path.write_bytes(b"")
        os.utime(path, (time, time))
        return path

    make("run/other/lightning_logs/version_0/checkpoints/last.ckpt", 9)
    make("run/checkpoints/last_good.ckpt", 9)
    with pytest.raises(CheckpointError, match=r"no last\.ckpt"):
        find_checkpoint([tmp_path / "run"], "last")
    for number, name in enumerate(("checkpoints/last.ckpt", "sfubm/8f3a/checkpoints/last-v1.ckpt", "last-v12.ckpt")):
        path = make(f"run/{name}", number + 1)
        assert find_checkpoint([tmp_path / "run"], "last") == path
    outside = make("outside/last.ckpt", 5, shards=True)
    assert find_checkpoint([tmp_path / "run", tmp_path / "outside"], "last") == outside
    with pytest.raises(CheckpointError, match="in shards"):
        find_checkpoint([tmp_path / "run", tmp_path / "outside"], "best")


def test_checkpoints_of_a_folder_of_their_own_are_found(command: list[str], tmp_path: Path) -> None:
    callback = "lightning.pytorch.callbacks.ModelCheckpoint"
    own = ["--trainer.callbacks", callback, f"--trainer.callbacks.dirpath={tmp_path / 'own'}"]
    own += ["--trainer.callbacks.save_last=true", "--trainer.min_epochs=1"]
    main(["fit", *command, *own, "--trainer.max_epochs=1"])
    main(["fit", *command, *own, "--trainer.max_epochs=2", "--ckpt_path", "last"])
    last = find_checkpoint([tmp_path / "run", tmp_path / "own"], "last")
    assert last.parent == tmp_path / "own"
    assert load_checkpoint(last)["epoch"] == 1


def test_a_file_that_is_no_checkpoint_is_told_from_a_damaged_and_from_a_refused_one(tmp_path: Path) -> None:
    """In words of our own: PyTorch's advise to switch the safe reader off."""
    torch.save({"a": torch.ones(1000)}, tmp_path / "whole.ckpt")
    whole = (tmp_path / "whole.ckpt").read_bytes()
    torch.save({"a": Path.touch}, tmp_path / "refused.ckpt")
    refused = (tmp_path / "refused.ckpt").read_bytes()
    for content, words in (
        (b"# Read me\n\nProse.\n", "not a checkpoint file; give the path of one that fit has written"),
        (b"", "not a checkpoint file; give the path of one that fit has written"),
        (
            whole[: len(whole) // 2],
            "not a safe checkpoint of this product: it is cut off, damaged, or a file of another kind",
        ),
        (
            b"\x80\x04\x95....",
            "not a safe checkpoint of this product: it is cut off, damaged, or a file of another kind",
        ),
        (
            refused,
            "not a safe checkpoint of this product: to read it would run or build getattr, which is refused",
        ),
    ):
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path)
        assert str(error.value) == f"{path}: {words}"
