"""The command line: lazy help, one-sentence errors, explicit flags win, train-then-test (T12), defaults (T20)."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_sfubm.__main__ import main
from lightning_sfubm.experiment import Experiment

SYNTHETIC = str(Path(__file__).resolve().parent.parent / "configs/debug/synthetic.yaml")
DEMO = str(Path(__file__).resolve().parent.parent / "configs/experiment/demo.yaml")


@pytest.fixture
def sequential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a small single-domain run."""
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    config = {
        "seed_everything": 5,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": str(tmp_path / "run"),
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "run")}},
        },
        "model": {
            "class_path": "lightning_sfubm.modules.sequential.SequentialRecommender",
            "init_args": {
                "encoder": {
                    "class_path": "lightning_sfubm.modules.encoders.sasrec.SASRec",
                    "init_args": {"hidden_dim": 16, "num_layers": 1, "max_length": 16},
                }
            },
        },
        "data": {
            "class_path": "lightning_sfubm.datamodules.domain_datamodule.DomainDataModule",
            "init_args": {
                "name": "alpha",
                "reader": {
                    "class_path": "lightning_sfubm.datamodules.synthetic.SyntheticReader",
                    "init_args": {"num_users": 60},
                },
                "k_core": 0,
                "max_length": 16,
            },
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path)]


def checkpoint(folder: Path) -> str:
    return str(next(folder.rglob("*.ckpt")))


def test_help_answers_without_importing_torch() -> None:
    code = "import sys; from lightning_sfubm.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("fit", "validate", "test", "predict", "report", "SFUBM_CACHE"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("command", "said"),
    [("fit", "interrupted; the same command with --ckpt_path last goes on"), ("test", "interrupted")],
)
@pytest.mark.parametrize("by_lightning", [True, False])
def test_an_interruption_is_one_line(
    command: str,
    said: str,
    by_lightning: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Between trainings as within one, where Lightning ends the program by itself."""
    import lightning_sfubm.cli

    def run(argv: list[str]) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if by_lightning:
                sys.exit(1)
            raise

    monkeypatch.setattr(lightning_sfubm.cli, "run", run)
    with pytest.raises(SystemExit) as exit:
        main([command])
    assert exit.value.code == 130
    assert capsys.readouterr().err.split("\n") == ["", said, ""]


def test_another_end_keeps_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_sfubm.cli

    monkeypatch.setattr(lightning_sfubm.cli, "run", lambda argv: sys.exit(3))
    with pytest.raises(SystemExit) as exit:
        main(["fit"])
    assert exit.value.code == 3


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.startswith("lightning-sfubm 0.")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fly"], "unknown command 'fly'"),
        (["report", "no/such/run"], "no/such/run"),
        (["report", "."], "nothing to report"),
        (["fit", "--config", SYNTHETIC, "--experiment.init_args.methods", "[nonsense]"], "nonsense"),
        (["fit", "--config", SYNTHETIC, "--trainer.federation.init_args.rounds", "-1"], "rounds = -1"),
        (
            ["fit", "--config", SYNTHETIC, "--model.init_args.encoder", "mine.Nope"],
            "No module named 'mine'; a module of",
        ),
        (
            ["fit", "--config", SYNTHETIC, "--data.init_args.domains.alfa.init_args.k_core", "3"],
            "required: name, reader; a domain that the settings before do not have is a new one and given whole",
        ),
        (["fit", "--seed_everything", "x"], "error: seed_everything: Expected true/false or an integer, not x"),
        (
            ["fit", "--config", DEMO, "--experiment.init_args.llm.init_args.num_layers", "null"],
            "num_layers: null cannot be set by an option of a part within a part: set it in a YAML file, given by --config",
        ),
        (["fit", "--config", SYNTHETIC, "--trainer.max_epochs", "x"], "max_epochs: Expected an integer or null, not x"),
        (["fit", "--config", SYNTHETIC, "--trainer.callbacks", "3"], "Expected a list, a class path or null, not 3"),
        (["fit", "--config", SYNTHETIC, "--trainer.federation", "null"], "an experiment follows federated rounds"),
        (["test", "--config", SYNTHETIC, "--trainer.default_root_dir", "nowhere", "--ckpt_path", "last"], "nowhere"),
    ],
)
def test_user_errors_are_one_sentence_and_exit_code_2(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in message
    assert "Traceback" not in message
    assert message.count("is its name misspelt?") <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_trainer_that_the_machine_cannot_have_is_refused_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", SYNTHETIC, "--trainer.accelerator", "gpu"])
    assert exit.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        "lightning-sfubm: error: trainer: No supported gpu backend found!"
    )


def test_the_help_of_a_command_lists_what_can_be_configured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: lightning-sfubm [options] fit ")
    assert "lightning-sfubm fit --config configs/debug/synthetic.yaml" in " ".join(shown.split())
    listed = "".join(shown.split())
    for name in ("modules.fkd.FKDDistiller", "modules.llm_head.LLMHead", "modules.baselines.ffmsr.FFMSR"):
        assert f"lightning_sfubm.{name}" in listed
    for name in ("datamodules.federated_datamodule.FederatedDataModule", "callbacks.fedprox.FedProx"):
        assert f"lightning_sfubm.{name}" in listed


@pytest.mark.parametrize("flag", ["--model.init_args.nonsense=1", "--trainer.nonsense=1", "--nonsense=1"])
def test_unknown_keys_are_refused_by_name(flag: str, sequential: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["fit", *sequential, flag])
    assert exit.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_train_then_test_equals_test_from_the_checkpoint(sequential: list[str], tmp_path: Path) -> None:
    from lightning_sfubm.cli import SFUBMCLI

    fitted = SFUBMCLI(args=["fit", *sequential])
    live = fitted.trainer.test(fitted.model, datamodule=fitted.datamodule, verbose=False)
    path = checkpoint(tmp_path / "run")
    tested = SFUBMCLI(args=["test", *sequential, "--ckpt_path", path])
    stored = {k: float(v) for k, v in tested.trainer.callback_metrics.items()}
    assert live == [pytest.approx(stored)]
    assert 0 < stored["test/ndcg@10"] < 1


def test_explicit_flags_win_over_what_a_checkpoint_stored(sequential: list[str], tmp_path: Path) -> None:
    from lightning_sfubm.cli import SFUBMCLI

    SFUBMCLI(args=["fit", *sequential])
    path = checkpoint(tmp_path / "run")
    again = SFUBMCLI(args=["test", *sequential, "--model.init_args.lr", "0.5", "--ckpt_path", path])
    assert again.model.lr == 0.5


def test_a_checkpoint_of_another_model_is_refused(
    sequential: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", *sequential])
    path = checkpoint(tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["test", *sequential, "--data.init_args.reader.init_args.num_items", "60", "--ckpt_path", path])
    assert "num_items" in capsys.readouterr().err


def test_default_config_is_the_default_constructor() -> None:
    import inspect

    from lightning.pytorch.cli import LightningArgumentParser

    from lightning_sfubm.datamodules.ranking_datamodule import RankingDataModule
    from lightning_sfubm.federated.loop import Federation
    from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
    from lightning_sfubm.modules.encoders.sasrec import SASRec
    from lightning_sfubm.modules.llm_head import LLMHead

    for cls in (SASRec, GRU4Rec, Federation, LLMHead, RankingDataModule):
        parser = LightningArgumentParser()
        parser.add_class_arguments(cls, "x", skip={"source"})
        parsed = vars(parser.get_defaults().x)
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                assert parsed[name] == parameter.default, (cls.__name__, name)


def test_hyper_parameters_of_nested_modules_are_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_sfubm.cli import SFUBMCLI

    class Parsed(SFUBMCLI):
        """Stops before anything is trained."""

        def before_fit(self) -> None:
            """Nothing to write."""

        def fit(self, **kwargs: object) -> None:
            """Nothing to train."""

    monkeypatch.chdir(tmp_path)
    llm = "--experiment.init_args.llm"
    parsed = Parsed(
        args=[
            *("fit", "--config", SYNTHETIC, llm, "lightning_sfubm.modules.llm_head.LLMHead"),
            *(f"{llm}.init_args.history_length", "4", f"{llm}.init_args.llm", "folder"),
        ]
    )
    head = parsed.config_init["fit"]["experiment"].llm
    assert (head.hparams.llm, head.hparams.history_length) == ("folder", 4)
    assert parsed.model.hparams["encoder"]["init_args"]["hidden_dim"] == 32


def test_first_weights_of_a_baseline_do_not_depend_on_what_else_is_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ablation that gives the model another part, or a table with one row more, must not redraw the rows beside it."""
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(Experiment, "run", lambda self, *args, **kwargs: given.append(self.baselines))
    sasrec = {"class_path": "lightning_sfubm.modules.encoders.sasrec.SASRec", "init_args": {"hidden_dim": 8}}
    gru = {"class_path": "lightning_sfubm.modules.encoders.gru4rec.GRU4Rec", "init_args": {"hidden_dim": 8}}

    def row(encoder: dict[str, Any]) -> dict[str, Any]:
        name = "lightning_sfubm.modules.sequential.SequentialRecommender"
        return {"class_path": name, "init_args": {"encoder": encoder, "lr": 0.01}}

    for place, (baselines, seed) in enumerate(
        [
            ({"encoder": row(sasrec)}, 1),
            ({"gru4rec": row(gru), "encoder": row(sasrec)}, 1),
            ({"encoder": row(sasrec)}, 2),
        ]
    ):
        methods = list(baselines)
        overlay = {"seed_everything": seed, "experiment": {"init_args": {"methods": methods, "baselines": baselines}}}
        (tmp_path / f"{place}.yaml").write_text(yaml.safe_dump(overlay))
        run = str(tmp_path / "run")
        main(
            [
                "fit",
                "--config",
                SYNTHETIC,
                "--config",
                str(tmp_path / f"{place}.yaml"),
                "--trainer.default_root_dir",
                run,
            ]
        )
    first, beside, other = (baselines["encoder"].state_dict() for baselines in given)
    assert len(first) > 5
    assert all(torch.equal(first[name], beside[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(baselines["encoder"].lr == 0.01 for baselines in given)


def test_predict_writes_recommendations_a_user_has_not_had(sequential: list[str], tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from lightning_sfubm.cli import SFUBMCLI

    SFUBMCLI(args=["fit", *sequential])
    cli = SFUBMCLI(args=["predict", *sequential, "--ckpt_path", checkpoint(tmp_path / "run")])
    rows = pq.read_table(tmp_path / "run" / "predictions" / "alpha.parquet").to_pylist()
    domain = cli.datamodule.domain
    assert len({row["user"] for row in rows}) == domain.num_users
    for user in range(20):
        mine = [row for row in rows if row["user"] == domain.user_keys[user]]
        known = {domain.item_keys[i] for i in domain.sequence(user)}  # the newest among them
        assert [row["rank"] for row in mine] == list(range(1, len(mine) + 1))
        assert len(mine) == 10
        assert not known & {row["item"] for row in mine}
        assert [row["score"] for row in mine] == sorted((row["score"] for row in mine), reverse=True)
        assert all(row["title"] for row in mine)
    SFUBMCLI(args=["predict", *sequential, "--ckpt_path", checkpoint(tmp_path / "run"), "--top_k", "3"])
    shorter = pq.read_table(tmp_path / "run" / "predictions" / "alpha.parquet").to_pylist()
    assert shorter == [row for row in rows if row["rank"] <= 3]


def test_predict_of_a_federation_writes_a_table_for_each_domain(
    tmp_path: Path, federated_data: Any, federated_trainer: Any
) -> None:
    from lightning_sfubm.callbacks.prediction_writer import PredictionWriter
    from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
    from tests.conftest import small_distiller

    trainer = federated_trainer(rounds=1, callbacks=[PrivacyNoise(0.05), PredictionWriter()])
    trainer.fit(small_distiller(), datamodule=federated_data())
    answers = trainer.predict(small_distiller(), datamodule=federated_data(), top_k=4)
    assert {name: {batch["items"].shape[1] for batch in batches} for name, batches in answers.items()} == {
        "alpha": {4},
        "beta": {4},
    }
    assert {p.name for p in (trainer.run_dir / "predictions").iterdir()} == {"alpha.parquet", "beta.parquet"}
