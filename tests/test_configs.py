"""Every shipped YAML parses, instantiates and takes one fast step; its header holds the command that runs it (T10)."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_sfubm.cli import SFUBMCLI
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.evaluation import report_plots
from lightning_sfubm.modules.llm.tiny import write_tiny_llm

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "results")  # grids: tests/grid
QUICK = {
    "synthetic": {
        "class_path": "lightning_sfubm.datamodules.synthetic.SyntheticReader",
        "init_args": {"num_users": 40},
    },
    "hashing": {"class_path": "lightning_sfubm.datamodules.synthetic.HashingTextEncoder", "init_args": {"dim": 32}},
}


def command(config: Path) -> list[str]:
    line = config.read_text().splitlines()[0]
    found = re.match(r"#\s+lightning-sfubm (fit .+)$", line) or re.match(
        r"#\s+lightning-sfubm (fit .+)$", config.read_text().splitlines()[1]
    )
    assert found, f"{config}: the first lines must hold the command"
    return shlex.split(found[1])


def generated(value: Any, index: int = 0, mean_length: int = 8) -> Any:
    """The same configuration with generated data in the place of files, and small."""
    if isinstance(value, dict):
        changed = {}
        for place, (key, entry) in enumerate(value.items()):
            if key == "reader":
                changed[key] = {
                    **QUICK["synthetic"],
                    "init_args": {
                        **{"num_users": 60, "num_items": max(60, 4 * mean_length), "mean_length": mean_length},
                        "domain_index": index,
                    },
                }
            elif key == "k_core":
                changed[key] = 0
            elif key == "text_encoder":
                changed[key] = QUICK["hashing"]
            elif key == "text_layers":  # the generated vectors are of one layer
                changed[key] = 1
            elif key == "expected_batch_size":  # of 20 users, where a configuration has them young
                changed[key] = min(entry, 16)
            else:
                changed[key] = generated(entry, place if key != "init_args" else index, mean_length)
        return changed
    if isinstance(value, list):
        return [generated(entry, index, mean_length) for entry in value]
    return value


def prepared(config: Path, folder: Path) -> list[str]:
    """The header's command with every config rewritten for generated data."""
    arguments = command(config)
    assert any(Path(a).name == config.name for a in arguments), f"{config}: its command does not use it"
    out, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument.startswith("--data.") and argument.endswith("root"):
            skip = True
        elif argument.endswith(".yaml"):
            assert (ROOT / argument).exists(), f"{config}: names {argument}, which is not there"
            rewritten = folder / argument.replace("/", "_")
            length = 60 if config.name == "differential_privacy.yaml" else 8  # users of several windows, as in the demo
            content = generated(yaml.safe_load((ROOT / argument).read_text()), mean_length=length)
            rewritten.write_text(yaml.safe_dump(content))
            out.append(str(rewritten))
        else:
            out.append(argument)
    return out


@pytest.mark.parametrize("config", CONFIGS, ids=[str(c.relative_to(ROOT / "configs")) for c in CONFIGS])
def test_config_runs_a_fast_step(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.chdir(tmp_path)
    if config.name != "demo.yaml":  # drawing is the larger part of a small experiment, and no config says how
        monkeypatch.setattr(report_plots, "svg_uri", lambda figure: "data:image/svg+xml,")
        monkeypatch.setattr(report_plots, "figures", lambda facts: {})
    arguments = prepared(config, tmp_path)
    if config.parent.name == "trainer":  # on several processes: tests/e2e/test_ddp.py, test_sharded.py
        arguments += ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    text = "".join(Path(a).read_text() for a in arguments if a.endswith(".yaml"))
    arguments += ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.limit_train_batches", "2"]
    arguments += ["--trainer.enable_progress_bar", "false"]
    if "federation" in text:
        federation = "--trainer.federation.init_args."
        for name, value in {"rounds": 1, "local_max_epochs": 1, "local_min_epochs": 1, "patience": 1}.items():
            arguments += [f"{federation}{name}", str(value)]
        if "experiment:" in text:
            arguments += ["--experiment.init_args.methods", "[popularity, stage1]"]
    else:
        arguments += ["--trainer.max_epochs", "1", "--trainer.min_epochs", "1"]
        if "llm:" in text:
            arguments += ["--model.init_args.llm", str(write_tiny_llm(tmp_path / "llm"))]
        if "shots:" in text:
            arguments += ["--data.init_args.shots", "16"]
        if "num_layers:" in text and "LLMHead" in text:
            arguments += ["--model.init_args.num_layers", "null"]
    if "FILE" in arguments:
        arguments[arguments.index("FILE")] = stage1_checkpoint(tmp_path)
    cli = SFUBMCLI(args=arguments)
    if "WandbLogger" in text:
        import wandb

        wandb.finish()  # a run left open would be that of every later logger in this process
        wandb.teardown()
    if "federation" in text:
        assert cli.trainer.loop is not None
        assert cli.trainer.loop.counters.round == 1
        if "experiment:" in text:
            assert (tmp_path / "run" / "report.html").exists()
    else:
        assert cli.trainer.global_step in (1, 2)  # a generated domain may fill one batch


def stage1_checkpoint(folder: Path) -> str:
    """A stage-1 module trained for a step on the same generated data."""
    arguments = prepared(ROOT / "configs" / "fkd" / "one_domain.yaml", folder)
    fast = ["--trainer.max_epochs", "1", "--trainer.min_epochs", "1", "--trainer.limit_train_batches", "1"]
    held_out = ["--data.init_args.stage2_positions", "1"]
    SFUBMCLI(args=[*arguments, *held_out, *fast, "--trainer.default_root_dir", str(folder / "stage1")])
    return str(next((folder / "stage1").rglob("*.ckpt")))


def test_every_group_of_the_design_is_there() -> None:
    groups = {c.parent.name for c in CONFIGS}
    assert {"domain", "encoder", "llm", "federated", "privacy", "trainer", "logger", "debug", "experiment"} <= groups


def test_predict_refuses_a_model_that_ranks_what_it_is_given(tmp_path: Path) -> None:
    arguments = prepared(ROOT / "configs" / "llm" / "text_only.yaml", tmp_path)
    llm = ["--model.init_args.llm", str(write_tiny_llm(tmp_path / "llm")), "--model.init_args.num_layers", "null"]
    with pytest.raises(ConfigError, match="LLMHead ranks the candidates it is given: predict with a stage-1 model"):
        SFUBMCLI(args=["predict", *arguments[1:], *llm, "--trainer.default_root_dir", str(tmp_path / "run")])
