"""The generated app, the silo's command, and a silo opened from configuration files; none of it needs Flower (T25, T31)."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from lightning_sfubm.__main__ import main
from lightning_sfubm.cli import SFUBMCLI
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.federated.aggregation import KMeans
from lightning_sfubm.federated.coordinator import Coordinator
from lightning_sfubm.federated.envelopes import read_shapes
from lightning_sfubm.federated.flower_app import QUIET, flower_app
from lightning_sfubm.federated.flower_silo import _own_app, flower_silo, run_task, silo_environment, write_commands
from lightning_sfubm.federated.robust import TrimmedMean
from lightning_sfubm.federated.run_config import RunConfig
from lightning_sfubm.federated.silo import open_silo

ROOT = Path(__file__).resolve().parent.parent.parent
SCHEDULE: dict[str, Any] = {
    "rounds": 7,
    "local_epochs": 2,
    "exchange": "both",
    "aggregator": {"class_path": "lightning_sfubm.federated.aggregation.KMeans", "init_args": {"num_clusters": 9}},
    "weights": {"class_path": "lightning_sfubm.federated.robust.TrimmedMean", "init_args": {"share": 0.3}},
    "weighting": "examples",
    "participation": 0.9,
    "min_updates": 2,
    "max_items": 5000,
    "client_epochs": {"b": 3},
    "joins": {"c": 2},
    "leaves": {"a": 5},
    "local_max_epochs": 9,
}


SECURE = {"class_path": "lightning_sfubm.federated.secure.SecureAggregation"}


def shared(folder: Path, schedule: dict[str, Any] | None = None, **more: Any) -> Path:
    federation = {"class_path": "lightning_sfubm.federated.loop.Federation", "init_args": schedule or SCHEDULE}
    path = folder / "federation.yaml"
    path.write_text(yaml.safe_dump({"seed_everything": 11, "trainer": {"federation": federation}, **more}))
    return path


def generate(folder: Path, *arguments: str, schedule: dict[str, Any] | None = None) -> Path:
    config = shared(folder, schedule)
    silos = ["--silos", "c", "a", "b", "d", "e"]
    flower_app(["--config", str(config), "--out", str(folder / "out"), *silos, *arguments])
    return folder / "out"


def app_config(out: Path) -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")
    return dict(tomllib.loads((out / "app/pyproject.toml").read_text())["tool"]["flwr"]["app"])


def test_the_server_app_reads_the_schedule_that_the_configuration_holds(tmp_path: Path) -> None:
    app = app_config(generate(tmp_path, "--min-silos", "4", "--round-s", "90"))
    assert all(isinstance(value, (str, int, float, bool)) for value in app["config"].values())  # what Flower carries
    read = RunConfig.read(app["config"])
    federation = read.federation
    assert (read.silos, read.seed, read.min_silos) == (["a", "b", "c", "d", "e"], 11, 4)
    assert (read.patience.round_s, read.patience.finish_s) == (90.0, 86400.0)
    assert read.run_dir == str(tmp_path / "out/server")
    for name in ("rounds", "weighting", "min_updates", "max_items"):
        assert getattr(federation, name) == SCHEDULE[name]
    expected = {**SCHEDULE, "seed": 11, "secure_aggregation": False}  # secure sums do not cross machines
    for name, value in federation.schedule(11).items():
        assert value == expected[name]
    assert isinstance(federation.aggregator, KMeans)
    assert federation.aggregator.num_clusters == 9
    assert isinstance(federation.weights, TrimmedMean)
    assert federation.weights.share == 0.3
    changed = RunConfig.read({**app["config"], "rounds": 3})  # flwr run --run-config 'rounds=3'
    assert changed.federation.rounds == 3


def test_classes_may_be_named_by_their_path_alone(tmp_path: Path) -> None:
    named = {key: SCHEDULE[key]["class_path"] for key in ("aggregator", "weights")}
    app = app_config(generate(tmp_path, schedule={**SCHEDULE, **named}))
    federation = RunConfig.read(app["config"]).federation
    assert (type(federation.aggregator), type(federation.weights)) == (KMeans, TrimmedMean)


def test_the_demo_config_makes_an_app_that_holds_nothing_of_its_data(tmp_path: Path) -> None:
    demo = str(ROOT / "configs/experiment/demo.yaml")
    flower_app(["--config", demo, "--config", str(ROOT / "configs/federated/both.yaml"), "--out", str(tmp_path)])
    app = app_config(tmp_path)
    assert app["config"]["silos"] == "action,drama"
    assert app["config"]["exchange"] == "both"
    text = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    for word in ("MovieLens", "recbole", "genres", "sasrec", "minilm", "sigma"):
        assert word.lower() not in text.lower()


def test_the_components_are_objects_of_the_installed_package(tmp_path: Path) -> None:
    components = app_config(generate(tmp_path))["components"]
    tree = ast.parse((ROOT / "lightning_sfubm/federated/flower.py").read_text())
    assigned = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    assert {value.split(":")[0] for value in components.values()} == {"lightning_sfubm.federated.flower"}
    assert {value.split(":")[1] for value in components.values()} <= assigned
    assert {p.name for p in (tmp_path / "out/app").iterdir()} == {"pyproject.toml", "LICENSE"}  # no code travels


def test_connection_and_commands_use_tls_and_keys_unless_told_not_to(tmp_path: Path) -> None:
    tomllib = pytest.importorskip("tomllib")
    where = ["--superlink", "fed.example.org:9091", "--certificates", str(tmp_path / "keys")]
    out = generate(tmp_path, *where)
    connection = tomllib.loads((out / "home/config.toml").read_text())["superlink"]["federation"]
    assert connection == {"address": "fed.example.org:9091", "root-certificates": str(tmp_path / "keys/ca.crt")}
    commands = (out / "README.md").read_text()
    assert "--enable-supernode-auth" in commands
    assert commands.count("flwr supernode register") == commands.count("--key ") == 5
    assert "--insecure" not in commands
    out = generate(tmp_path, *where, "--insecure")
    assert tomllib.loads((out / "home/config.toml").read_text())["superlink"]["federation"]["insecure"] is True


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"secure_aggregation": SECURE, "weights": None}, "secure_aggregation"),
        ({"joins": {"z": 2}}, "names 'z'"),
        ({"rounds": -1}, "rounds"),
        ({"number_of_rounds": 3}, "number_of_rounds"),
        ({"weights": {"class_path": "no.such.Thing"}}, "weights"),
    ],
)
def test_a_schedule_that_cannot_be_carried_is_refused_and_nothing_is_written(
    change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=problem):
        generate(tmp_path, schedule={**SCHEDULE, **change})
    assert not (tmp_path / "out").exists()


def test_incomplete_configurations_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.yaml"
    empty.write_text("seed_everything: 1\n")
    for path, problem in ((empty, "trainer.federation is missing"), (tmp_path / "none.yaml", "cannot be read")):
        with pytest.raises(SystemExit):
            main(["flower-app", "--config", str(path), "--out", str(tmp_path / "out")])
        assert problem in capsys.readouterr().err
    with pytest.raises(ConfigError, match="names of the silos"):
        flower_app(["--config", str(shared(tmp_path)), "--out", str(tmp_path / "out")])
    config = app_config(generate(tmp_path))["config"]
    with pytest.raises(ConfigError, match="absolute"):
        RunConfig.read({**config, "run-dir": "runs"})
    with pytest.raises(ConfigError, match="lacks 'round-s'"):
        RunConfig.read({key: value for key, value in config.items() if key != "round-s"})


LOOP = "lightning_sfubm.federated.loop.Federation"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed_everything: null", "seed_everything must be an integer from 0 on, the same for all silos, not None"),
        ("seed_everything: true", "seed_everything must be an integer from 0 on, the same for all silos, not True"),
        ("seed_everything: x", "seed_everything must be an integer from 0 on, the same for all silos, not 'x'"),
        ("seed_everything: ${nope}", "cannot be read: Interpolation key 'nope' not found"),
        ("trainer: [1]", "trainer must be a mapping of settings, not [1]"),
        ("trainer: {federation: abc}", "trainer.federation must be a mapping of settings, not 'abc'"),
        (
            f"trainer: {{federation: {{class_path: {LOOP}, init_args: 5}}}}",
            "trainer.federation.init_args must be a mapping",
        ),
        ("trainer: {federation: {init_args: {1: 2}, 3: 4}}", "trainer.federation has no setting 3"),
        ("trainer: {federation: null}", "trainer.federation is missing"),
        ("data: 5", "data must be a mapping of settings, not 5"),
        ("data: {init_args: [1]}", "data.init_args must be a mapping of settings, not [1]"),
        ("data: {init_args: {domains: abc}}", "data.domains must be a mapping of settings, not 'abc'"),
        ("data: {init_args: {domains: {1: null}}}", "data.domains: the name 1 is no text; write it in quotes"),
        ("data: {init_args: {domains: {../a: null}}}", "data.domains: the name '../a' cannot be a file name"),
        ("data: {init_args: {domains: null}}", "give the names of the silos (--silos), or data.domains"),
        ("data: {init_args: {domains: {'a,b': null}}}", "the silo 'a,b' has a comma in its name"),
        ("- a", "cannot be read"),
        ("seed_everything: 2020-99-99", "seed_everything must be an integer from 0 on"),
        ("\udcff", "cannot be read"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_one_sentence_that_names_it(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(text + "\n", encoding="utf-8", errors="surrogateescape")
    base = [] if text.startswith("trainer") else ["--config", str(shared(tmp_path))]
    with pytest.raises(SystemExit) as exit:
        main(["flower-app", *base, "--config", str(bad), "--out", str(tmp_path / "out")])
    assert exit.value.code == 2
    (message,) = capsys.readouterr().err.strip().splitlines()
    assert words in message
    assert "bad.yaml" in message or "silo" in message
    assert not (tmp_path / "out").exists()


def test_references_within_the_schedule_are_read_as_the_command_line_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of other settings may hold on the silos' machines alone."""
    schedule = {**SCHEDULE, "patience": 2, "min_updates": "${.patience}", "rounds": "${seed_everything}"}
    elsewhere = {"class_path": "x.Y", "init_args": {"domains": dict.fromkeys("abcde", "${oc.env:ONLY_THERE}")}}
    config = str(shared(tmp_path, schedule, data=elsewhere))
    flower_app(["--config", config, "--out", str(tmp_path / "out")])
    values = app_config(tmp_path / "out")["config"]
    assert (values["min-updates"], values["rounds"], values["silos"]) == (2, 11, "a,b,c,d,e")
    broken = str(shared(tmp_path, {**SCHEDULE, "min_updates": "${.nope}"}))
    with pytest.raises(SystemExit):
        main(["flower-app", "--config", broken, "--out", str(tmp_path / "none")])
    assert "cannot be read: Interpolation key" in capsys.readouterr().err


def test_silos_and_an_output_folder_that_cannot_be_are_refused(tmp_path: Path) -> None:
    config = str(shared(tmp_path))
    for name in ("../a", "", "a/b"):
        with pytest.raises(ConfigError, match=r"--silos: the name .* cannot be a file name"):
            flower_app(["--config", config, "--out", str(tmp_path / "out"), "--silos", name, "b"])
    assert not (tmp_path / "out").exists()
    values = app_config(generate(tmp_path))["config"]
    with pytest.raises(ConfigError, match=r"the run config, silos: the name '\.\.'"):
        RunConfig.read({**values, "silos": "a,.."})
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/out cannot be written into .*give another folder by --out"):
        flower_app(["--config", config, "--out", str(tmp_path / "file/out"), "--silos", "a", "b", "c", "d", "e"])


def test_a_silo_starts_no_task_but_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path))
    folder = write_commands()
    environment = silo_environment(folder, {"PATH": "/usr/bin", "FLWR_TELEMETRY_ENABLED": "1"})
    assert environment["PATH"].split(os.pathsep)[0] == str(folder)
    assert QUIET.items() <= environment.items()
    for name in ("flwr-agentapp", "flwr-serverapp", "flwr-connector", "flwr-model", "flwr-simulation"):
        done = subprocess.run([name], env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, "refused" in done.stderr) == (1, True)
    assert "lightning_sfubm.federated.flower_silo" in (folder / "flwr-clientapp").read_text()
    assert folder.stat().st_mode & 0o077 == 0


def test_a_silo_is_not_started_without_tls_by_mistake(tmp_path: Path) -> None:
    config = str(shared(tmp_path))
    start = ["--silo", "a", "--superlink", "127.0.0.1:9091", "--config"]
    with pytest.raises(ConfigError, match="--root-certificates and --key"):
        flower_silo([*start, config])
    with pytest.raises(ConfigError, match="--root-certificates and --key"):
        flower_silo([*start, config, "--insecure", "--root-certificates", "ca.crt", "--key", "a.key"])
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        flower_silo([*start, "missing.yaml", "--insecure"])


@pytest.mark.skipif(importlib.util.find_spec("flwr") is not None, reason="Flower is installed here")
def test_without_flower_the_error_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"lightning-sfubm\[flower\]"):
        import lightning_sfubm.federated.flower  # noqa: F401


def test_help_names_the_commands_and_imports_nothing_heavy() -> None:
    code = "import sys; from lightning_sfubm.__main__ import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "flower-app" in done.stdout
    assert "flower-silo" in done.stdout
    assert not {"'torch'", "'flwr'", "'lightning'"} & set(done.stdout.split(", "))


def test_a_silo_opens_from_its_own_configuration_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # restored afterwards: the configuration sets it
    synthetic = yaml.safe_load((ROOT / "configs/debug/synthetic.yaml").read_text())
    schedule = {**synthetic["trainer"]["federation"]["init_args"], "exchange": "both", "rounds": 1}
    common = shared(tmp_path, schedule, model=synthetic["model"])
    out = tmp_path / "out"
    flower_app(["--config", str(common), "--out", str(out), "--silos", "alpha", "beta"])
    alpha = synthetic["data"]["init_args"]["domains"]["alpha"]
    alpha["init_args"] |= {"k_core": 0, "num_candidates": 10}
    alpha["init_args"]["reader"]["init_args"]["num_users"] = 60
    own = tmp_path / "alpha.yaml"
    kept = {"sigma": 0.0, "secret_dir": str(tmp_path / "keys")}  # without noise a secret still decides the order
    noise = {"class_path": "lightning_sfubm.callbacks.privacy_noise.PrivacyNoise", "init_args": kept}
    trainer = {"default_root_dir": str(tmp_path / "run"), "accelerator": "cpu", "callbacks": [noise]}
    data = {"class_path": synthetic["data"]["class_path"], "init_args": {"domains": {"alpha": alpha}}}
    own.write_text(yaml.safe_dump({"trainer": trainer, "data": data}))

    read = RunConfig.read(app_config(out)["config"])

    class Nobody:
        def nodes(self) -> dict[int, str]:
            return {}

        def ask(self, requests: Any, deadline_s: float) -> dict[int, Any]:
            return {}

        def send(self, requests: Any, deadline_s: float) -> None: ...

        def arrived(self) -> dict[int, Any]:
            return {}

    request = Coordinator(read.federation, read.silos, Nobody(), tmp_path / "server", read.seed)._request("hello", 0)
    reply = open_silo([str(common), str(own)], "alpha").answer(request)
    assert reply.silo == "alpha"
    assert read_shapes(reply.shape)[0] == 64
    assert json.loads((tmp_path / "run/ledger.jsonl").read_text())["kind"] == "teacher"
    start = ["--config", str(common), "--config", str(own), "--superlink", "127.0.0.1:9091", "--insecure"]
    with pytest.raises(ConfigError, match="the domain 'beta'"):
        flower_silo([*start, "--silo", "beta"])  # before anything is started
    several = tmp_path / "several.yaml"
    several.write_text("trainer: {devices: 2}\n")
    with pytest.raises(
        ConfigError, match=r"several\.yaml: a silo trains in one process, .* asks for 2: set trainer\.devices"
    ):
        flower_silo([*start, "--config", str(several), "--silo", "alpha"])


def test_the_page_says_what_the_generated_commands_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/how-to/federate-across-machines.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # restored afterwards: the configuration sets it
    files = dict(re.findall(r"`(\w+\.yaml)`[^\n]*(?:\n[^\n`][^\n]*)*?:\n\n```yaml\n(.*?)```", page, re.DOTALL))
    assert sorted(files) == ["alpha.yaml", "federation.yaml"]
    for name, text in files.items():
        Path(name).write_text(text)
    shell = (
        "\n".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ").replace("$HOST", "127.0.0.1")
    )
    commands = [line.split() for line in shell.splitlines()]
    generator = next(words for words in commands if words[:2] == ["lightning-sfubm", "flower-app"])
    main(generator[1:])
    written = [line.split() for line in Path("flower/README.md").read_text().splitlines()]
    for start in (["flower-superlink"], ["flwr", "supernode"], ["lightning-sfubm", "flower-silo"], ["flwr", "run"]):
        shown = next(words for words in commands if words[: len(start)] == start)
        made = next(words for words in written if words[: len(start)] == start)
        assert sorted(word.removeprefix(f"{tmp_path}/") for word in made) == sorted(shown), start
    arguments = ["--config", "federation.yaml", "--config", "alpha.yaml"]
    assert SFUBMCLI(args=arguments, run=False).trainer.federation.rounds == 3  # type: ignore[attr-defined]


def test_heartbeats_of_a_task_begin_before_the_app_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import takes seconds, on a busy machine as long as Flower waits for a first sign of life."""
    app, imported = "lightning_sfubm.federated.flower", []
    modules = {name: ModuleType(name) for name in ("flwr", "flwr.supernode", "flwr.supernode.cli")}
    modules["flwr.supernode.runtime"] = ModuleType("flwr.supernode.runtime")
    worker = modules["flwr.supernode.runtime.run_clientapp"] = ModuleType("flwr.supernode.runtime.run_clientapp")
    vars(worker).update(install_from_fab=None, get_load_client_app_fn=None)
    vars(modules["flwr.supernode.cli"])["flwr_clientapp"] = lambda: imported.append(app in sys.modules)
    monkeypatch.delitem(sys.modules, app, raising=False)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    run_task()
    assert imported == [False]
    assert vars(worker)["get_load_client_app_fn"]() is _own_app
