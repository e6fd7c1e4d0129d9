"""A run that goes on has the settings and the data of the one before, also where nothing is left to train."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lightning_sfubm.__main__ import main
from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.cli import SFUBMCLI
from lightning_sfubm.errors import CheckpointError, PrivacyError
from lightning_sfubm.federated.federation import Federation
from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.federated.settings import difference, lasting_settings, schedule_difference
from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from tests.conftest import small_distiller

SYNTHETIC = Path(__file__).resolve().parents[2] / "configs/debug/synthetic.yaml"
FED = "--trainer.federation.init_args."


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_places_outputs_and_hardware_may_change_and_what_is_computed_may_not() -> None:
    callback = {"class_path": "lightning_sfubm.callbacks.privacy_noise.PrivacyNoise", "init_args": {"sigma": 0.05}}
    shown = {"class_path": "lightning_sfubm.callbacks.prediction_writer.PredictionWriter"}
    domain = {"reader": {"init_args": {"folder": "a", "max_rows": 5}}, "k_core": 5, "num_workers": 0}
    config: dict[str, Any] = {
        "seed_everything": 1,
        "model": {"init_args": {"lr": 0.1, "layers": [1, 2]}},
        "data": {"root": "here", "domains": {"a": domain}},
        "trainer": {"devices": 1, "precision": None, "federation": {"init_args": {"rounds": 2, "patience": 3}}},
        "experiment": {"methods": ["stage1"]},
    }
    config["trainer"]["callbacks"] = [shown, callback]
    kept = lasting_settings(config)
    assert kept == {
        "seed_everything": 1,
        "model.init_args.lr": 0.1,
        "model.init_args.layers.0": 1,
        "model.init_args.layers.1": 2,
        "trainer.federation.init_args.patience": 3,
        "trainer.callbacks.0.class_path": callback["class_path"],
        "trainer.callbacks.0.init_args.sigma": 0.05,
        "data.domains.a.reader.init_args.max_rows": 5,
        "data.domains.a.k_core": 5,
    }
    assert difference(kept, dict(reversed(kept.items()))) == ""
    assert difference({}, kept) == difference(kept, {}) == ""
    assert difference(kept, {**kept, "model.init_args.lr": 0.2}) == "model.init_args.lr was 0.1 and is 0.2"
    assert "5 more" in difference({"x": 1}, kept)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--trainer.callbacks.sigma", "0.0"], "callbacks.0.init_args.sigma was 0.05 and is 0.0"),
        (["--model.init_args.lr", "0.5"], "model.init_args.lr was"),
        ([FED + "rounds", "2"], "set trainer.federation.rounds to 1"),
        ([FED + "rounds", "0"], "has 1 rounds behind it, trainer.federation.rounds asks for 0"),
        (["--data.init_args.domains.alpha.init_args.seed", "7"], "alpha.init_args.seed was 1 and is 7"),
        (["--trainer.fast_dev_run", "true"], "trainer.fast_dev_run was"),
        (["--data.init_args.domains.alpha.init_args.reader.init_args.num_users", "61"], "other data"),
    ],
)
def test_a_finished_stage_1_is_not_taken_for_that_of_other_settings(
    changed: list[str], words: str, finished: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, command = finished
    before = contents(folder)
    with pytest.raises(SystemExit):
        main([*command, *changed, "--ckpt_path", "last"])
    assert words in capsys.readouterr().err
    assert contents(folder) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("settings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUBM_CACHE", str(folder / "cache"))
        command = ["fit", "--config", str(SYNTHETIC), "--trainer.default_root_dir", str(folder / "run")]
        command += ["--experiment", "null", "--trainer.enable_progress_bar", "false", f"{FED}rounds", "1"]
        command += [f"{FED}local_max_epochs", "1", f"{FED}local_min_epochs", "1"]
        command += ["--data.init_args.domains.alpha.init_args.reader.init_args.num_users", "60"]
        main(command)
        yield folder / "run", command


def test_places_and_workers_of_a_finished_run_may_change(finished: tuple[Path, list[str]]) -> None:
    folder, command = finished
    before = contents(folder)
    main(
        [
            *command,
            "--ckpt_path",
            "last",
            f"{FED}workers",
            "2",
            "--data.init_args.domains.alpha.init_args.eval_batch_size",
            "9",
        ]
    )
    after = contents(folder)
    assert {k: v for k, v in after.items() if k != "config.yaml"} == {
        k: v for k, v in before.items() if k != "config.yaml"
    }


def test_what_may_change_changes_neither_the_settings_nor_the_hash_of_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def parsed(*more: str) -> SFUBMCLI:
        return SFUBMCLI(args=["--config", str(SYNTHETIC), "--trainer.accelerator", "cpu", *more], run=False)

    alpha, bars = "--data.init_args.domains.alpha.init_args.", "lightning.pytorch.callbacks."
    free = ["--trainer.default_root_dir", "elsewhere", "--trainer.logger", "false", "--trainer.log_every_n_steps", "3"]
    free += ["--trainer.max_epochs", "9", "--data.root", "there"]
    free += [f"{FED}workers", "2", f"{FED}keep_messages", "true", f"{alpha}eval_batch_size", "9"]
    free += ["--trainer.callbacks+", bars + "RichProgressBar", "--trainer.callbacks+", bars + "LearningRateMonitor"]
    free += ["--experiment.init_args.methods", "[popularity]", "--experiment.init_args.title", "other words"]
    plain, changed = parsed(), parsed(*free)
    assert difference(plain.lasting_settings, changed.lasting_settings) == ""
    assert plain._config_hash() == changed._config_hash()
    rows = parsed("--experiment.init_args.llm_epochs", "3")
    assert difference(plain.lasting_settings, rows.lasting_settings) == ""
    assert plain._config_hash() != rows._config_hash()
    rounds = parsed(f"{FED}rounds", "7")
    assert difference(plain.lasting_settings, rounds.lasting_settings) == ""  # checked where they are run
    assert plain._config_hash() != rounds._config_hash()
    for flag, value in (("--model.init_args.lr", "0.5"), (f"{FED}patience", "7"), ("--trainer.fast_dev_run", "true")):
        other = parsed(flag, value)
        assert difference(plain.lasting_settings, other.lasting_settings), flag
        assert plain._config_hash() != other._config_hash(), flag


def test_rows_are_of_the_prompts_that_a_template_file_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", str(SYNTHETIC), "--trainer.accelerator", "cpu"]
    arguments += ["--experiment.init_args.templates", "{alpha: words.yaml}"]
    hashes = []
    for noun in ("film", "book", "film"):
        Path("words.yaml").write_text(f"noun: {noun}\n")
        hashes.append(SFUBMCLI(args=arguments, run=False)._config_hash())
    assert hashes[0] == hashes[2] != hashes[1]


def test_rows_are_of_the_weights_that_a_folder_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    llm = "--experiment.init_args.llm"
    arguments = ["--config", str(SYNTHETIC), "--trainer.accelerator", "cpu"]
    arguments += [llm, "lightning_sfubm.modules.llm_head.LLMHead", f"{llm}.init_args.llm", "mine"]
    hashes = []
    for seed in (1, 2, 1):
        shutil.rmtree("mine", ignore_errors=True)
        write_tiny_llm("mine", seed=seed)
        hashes.append(SFUBMCLI(args=arguments, run=False)._config_hash())
    assert hashes[0] == hashes[2] != hashes[1]


def test_secrets_may_move_and_not_be_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whether they are the same is told by their hash; states of an earlier version name their folder."""
    monkeypatch.chdir(tmp_path)

    def parsed(*more: str) -> SFUBMCLI:
        return SFUBMCLI(args=["--config", str(SYNTHETIC), "--trainer.accelerator", "cpu", *more], run=False)

    none, here, there = parsed(), *(parsed("--trainer.callbacks.secret_dir", folder) for folder in ("a", "b"))
    assert difference(here.lasting_settings, there.lasting_settings) == ""
    assert here._config_hash() == there._config_hash() != none._config_hash()
    key = "trainer.callbacks.0.init_args.secret_dir"
    assert difference(none.lasting_settings, here.lasting_settings) == f"{key} was None and is 'a folder'"
    assert difference({**none.lasting_settings, key: "a"}, there.lasting_settings) == ""


def test_a_run_goes_on_with_secrets_that_were_moved_and_no_others(
    federated_data: Any, federated_trainer: Any, tmp_path: Path
) -> None:
    def run(folder: str, **flags: Any) -> None:
        callback = {"class_path": "PrivacyNoise", "init_args": {"secret_dir": folder}}
        noise = PrivacyNoise(0.05, str(tmp_path / folder))
        trainer = federated_trainer(callbacks=[noise], rounds=0, local_max_epochs=1)
        trainer.settings = lasting_settings({"trainer": {"callbacks": [callback]}})
        trainer.fit(small_distiller(), datamodule=federated_data(num_users=30), **flags)

    run("here")
    (tmp_path / "here").rename(tmp_path / "there")
    run("there", ckpt_path="last")
    (tmp_path / "there/alpha.key").write_bytes(bytes(32))
    with pytest.raises(
        PrivacyError, match=r"secrets of \['alpha'\] in .*/there are not those .* set secret_dir to where"
    ):
        run("there", ckpt_path="last")


class _DiesAtOnce(FederatedCallback):
    """After the first message has left, before there is a state."""

    def on_upload(self, loop: Any, client: str, kind: str, tensors: Any) -> Any:
        if client == "beta":
            raise KeyboardInterrupt
        return tensors


def test_a_run_without_a_state_goes_on_with_the_secrets_of_what_has_left(
    federated_data: Any, federated_trainer: Any, tmp_path: Path
) -> None:
    """With others the same vectors would leave under independent noise, of which two have a mean with less."""

    def run(secret_dir: str | None, *more: Any, **flags: Any) -> Any:
        noise = PrivacyNoise(0.05, None if secret_dir is None else str(tmp_path / secret_dir))
        trainer = federated_trainer(callbacks=[noise, *more], rounds=0, local_max_epochs=1)
        trainer.fit(small_distiller(), datamodule=federated_data(num_users=30), **flags)
        return trainer

    def sent() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "run/ledger.jsonl").read_text().splitlines()]

    with pytest.raises(KeyboardInterrupt):
        run("keys", _DiesAtOnce())
    (first,) = sent()
    before = contents(tmp_path / "run")
    for other in ("others", None):
        with pytest.raises(
            PrivacyError, match=r"secrets of \['alpha', 'beta'\] in .* are not those that this run was begun"
        ):
            run(other, ckpt_path="last")
    (tmp_path / "run/secret_hashes.json").unlink()
    with pytest.raises(
        PrivacyError, match=r"ledger\.jsonl: messages have left that were not keyed by the secrets in .*others"
    ):
        run("others", ckpt_path="last")
    (tmp_path / "run/secret_hashes.json").write_bytes(before["secret_hashes.json"])
    assert contents(tmp_path / "run") == before

    (tmp_path / "keys").rename(tmp_path / "moved")
    run("moved", ckpt_path="last")
    assert sent()[0] == first
    assert sent()[1]["content_sha256"] == first["content_sha256"]
    assert sent()[1]["resent"]

    run(None)  # anew
    assert not (tmp_path / "run/secret_hashes.json").exists()


def test_data_of_equal_shape_are_told_apart_without_a_configuration(
    federated_data: Any, federated_trainer: Any
) -> None:
    federated_trainer(rounds=1).fit(small_distiller(), datamodule=federated_data(num_candidates=10))
    for action in ("fit", "test"):
        other = federated_data(num_candidates=10)
        for domain in other.domains.values():
            domain.reader.seed += 1
        with pytest.raises(CheckpointError, match="other data"):
            getattr(federated_trainer(rounds=1), action)(small_distiller(), datamodule=other, ckpt_path="last")


def test_schedules_are_told_apart_by_the_names_of_their_settings() -> None:
    federation = Federation(rounds=1, client_epochs={"a": 2})
    assert schedule_difference(federation.schedule(1), federation.schedule(1)) == ""
    changed = Federation(rounds=3, client_epochs={"a": 3, "b": 1})
    assert schedule_difference(federation.schedule(1), changed.schedule(2)) == (
        "seed_everything was 1 and is 2; trainer.federation.client_epochs.a was 2 and is 3; "
        "trainer.federation.client_epochs.b was None and is 1"
    )
