"""Flower on loopback, with TLS and node authentication: the weights of the run in one process, whoever dies (T30)."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_sfubm.federated.checkpoint import find_state, read_loop
from lightning_sfubm.federated.flower_app import flower_app
from lightning_sfubm.federated.ledger import read_ledger
from tests.federated.flower_fleet import ROOT, Fleet, free_port, wait_for, write_certificates

pytestmark = pytest.mark.slow
SILOS = ["action", "drama"]
#: what lets a process act for a task: 128 bytes in hexadecimal (the word stands in Flower's message of one that has expired)
TASK_TOKEN = re.compile(r"[0-9a-f]{256}")
HOOKS = '''
"""In one process the client is away; on its own machine it hangs in that round until somebody pulls the plug."""
import pathlib, time
from lightning_sfubm.federated.hooks import ClientDropped, FederatedCallback

class Away(FederatedCallback):
    def on_client_start(self, loop, client, round):
        if (client, round) == ("drama", 2):
            raise ClientDropped("away")

class Hang(FederatedCallback):
    def __init__(self, marker: str) -> None:
        self.marker = pathlib.Path(marker)

    def on_client_start(self, loop, client, round):
        if (client, round) == ("drama", 2):
            self.marker.touch()
            time.sleep(600)
'''

#: a run of somebody who could reach the SuperLink: its code writes down where it was executed
FOREIGN = """
import pathlib, sys
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

HERE = pathlib.Path(FOLDER)
(HERE / pathlib.Path(sys.argv[0]).name).touch()
client_app = ClientApp()
server_app = ServerApp()

@client_app.train()
def train(message, context):
    (HERE / "trained").touch()

@server_app.main()
def main(grid, context):
    content = RecordDict({"fields": ConfigRecord({"action": "hello"}), "payloads": ArrayRecord()})
    messages = [Message(content, node, "train") for node in grid.get_node_ids()]
    for reply in grid.send_and_receive(messages, timeout=180):
        print("answer:", dict(reply.content["fields"]), flush=True)
"""


@pytest.fixture
def setting(tmp_path: Path) -> "Setting":
    pytest.importorskip("cryptography")
    return Setting(tmp_path)


class Setting:
    """The demo's stage 1, small: configuration files of the federation and of each silo, generated data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        demo = yaml.safe_load((ROOT / "configs/experiment/demo.yaml").read_text())
        both = yaml.safe_load((ROOT / "configs/federated/both.yaml").read_text())
        trainer = demo["trainer"]
        self.noise = trainer.pop("callbacks")
        self.noise[0]["init_args"]["secret_dir"] = str(folder / "secrets")
        trainer.pop("default_root_dir")
        trainer |= {"accelerator": "cpu", "enable_progress_bar": False}
        schedule = trainer["federation"]["init_args"]
        schedule |= both["trainer"]["federation"]["init_args"]
        schedule |= {"rounds": 2, "local_max_epochs": 2, "local_min_epochs": 1, "patience": 1}
        self.shared: dict[str, Any] = {"seed_everything": 3, "trainer": trainer, "model": demo["model"]}
        self.domains = demo["data"]["init_args"]["domains"]
        for index, domain in enumerate(self.domains.values()):
            domain["init_args"] |= {
                "reader": {
                    "class_path": "lightning_sfubm.datamodules.synthetic.SyntheticReader",
                    "init_args": {"domain_index": index, "num_users": 80, "num_items": 60, "mean_length": 10},
                },
                "text_encoder": {"class_path": "lightning_sfubm.datamodules.synthetic.HashingTextEncoder"},
                "k_core": 0,
            }
        self.modules = folder / "modules"
        self.modules.mkdir()
        (self.modules / "hooks_of_this_test.py").write_text(HOOKS)

    def write(self, name: str, domains: list[str], run_dir: Path, callbacks: Any = ()) -> str:
        """A configuration file of some domains."""
        data = {
            "class_path": "lightning_sfubm.datamodules.federated_datamodule.FederatedDataModule",
            "init_args": {"domains": {domain: self.domains[domain] for domain in domains}},
        }
        trainer = {"default_root_dir": str(run_dir), "callbacks": [*self.noise, *callbacks]}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"trainer": trainer, "data": data}))
        return str(path)

    def write_shared(self, **schedule: Any) -> str:
        self.shared["trainer"]["federation"]["init_args"] |= schedule
        path = self.folder / "federation.yaml"
        path.write_text(yaml.safe_dump(self.shared))
        return str(path)

    def in_one_process(self, callbacks: Any = ()) -> Path:
        """Run the same federation as one process; its folder."""
        own = self.write("together", SILOS, self.folder / "together", callbacks)
        command = [sys.executable, "-m", "lightning_sfubm", "fit", "--config", self.write_shared(), "--config", own]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{self.modules}", "OMP_NUM_THREADS": "1"}
        environment.pop("PL_GLOBAL_SEED", None)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return self.folder / "together"

    def fleet(self, **schedule: Any) -> Fleet:
        """A SuperLink that knows both silos; nothing else runs yet."""
        port, app = free_port(), self.folder / "app"
        arguments = ["--config", self.write_shared(**schedule), "--silos", *SILOS, "--out", str(app)]
        keys = self.folder / "fleet/keys"
        where = ["--superlink", f"127.0.0.1:{port}", "--certificates", str(keys)]
        flower_app([*arguments, *where, "--start-s", "240", "--round-s", "240", "--finish-s", "240"])
        fleet = Fleet(self.folder / "fleet", app, port, str(self.modules))
        write_certificates(keys, SILOS)
        return fleet

    def node(self, fleet: Fleet, silo: str, callbacks: Any = ()) -> None:
        own = self.write(silo, [silo], self.folder / silo, callbacks)
        fleet.supernode(silo, str(self.folder / "federation.yaml"), own)


@pytest.fixture
def fleets() -> Iterator[list[Fleet]]:
    started: list[Fleet] = []
    yield started
    for fleet in started:
        fleet.stop()


def assert_same_result(setting: Setting, together: Path) -> None:
    here = find_state(together / "checkpoints")
    for silo in SILOS:
        there = find_state(setting.folder / silo / "checkpoints")
        first, second = (torch.load(s / f"clients/{silo}.ckpt", weights_only=True) for s in (here, there))
        assert first["global_step"] == second["global_step"] > 0
        assert first["state_dict"].keys() == second["state_dict"].keys()
        for key, value in first["state_dict"].items():
            assert torch.equal(value, second["state_dict"][key]), f"{silo}: {key}"
    servers = (torch.load(s / "server.ckpt", weights_only=True) for s in (here, server_state(setting)))
    first, second = (server["global_teacher"] for server in servers)
    assert first
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def server_state(setting: Setting) -> Path:
    return find_state(setting.folder / "app/server/checkpoints")


def progress(setting: Setting) -> dict[str, Any]:
    if not any((setting.folder / "app/server/checkpoints").glob("state-*")):
        return {"round": 0}
    return dict(read_loop(server_state(setting))["stored"]["progress"])


@pytest.mark.timeout(1200)
def test_a_run_over_flower_gives_the_weights_of_one_process_and_brings_no_code(
    setting: Setting, fleets: list[Fleet]
) -> None:
    fleet = setting.fleet(rounds=1)
    fleets.append(fleet)
    fleet.superlink()
    for silo in SILOS:
        fleet.register(silo)
        setting.node(fleet, silo)
    fleet.run()
    together = setting.in_one_process()
    wait_for(lambda: "finished after 1 rounds" in fleet.log("run"), 300, "the run")
    assert_same_result(setting, together)
    said = {"up": 0, "down": 0}
    for silo in SILOS:
        mine = read_ledger(setting.folder / silo / "ledger.jsonl")
        servers = [e for e in read_ledger(setting.folder / "app/server/ledger.jsonl") if e["client"] == silo]
        assert {(e["direction"], e["sha256"]) for e in mine} <= {(e["direction"], e["sha256"]) for e in servers}
        for entry in mine:
            said[str(entry["direction"])] += 1
        assert not TASK_TOKEN.search(fleet.log(silo))
    assert said == {"up": 6, "down": 4}  # each: initial weights, item vectors, an update; mixed vectors, a teacher
    assert_no_code_of_a_run_is_executed(setting, fleet)


def assert_no_code_of_a_run_is_executed(setting: Setting, fleet: Fleet) -> None:
    seen, app = setting.folder / "seen", fleet.app / "app"
    seen.mkdir()
    project = (app / "pyproject.toml").read_text().replace("lightning_sfubm.federated.flower:", "foreign:")
    (app / "pyproject.toml").write_text(project)
    (app / "foreign.py").write_text(f"FOLDER = {str(seen)!r}\n{FOREIGN}")
    fleet.run("foreign")
    wait_for(lambda: fleet.log("foreign").count("answer:") == len(SILOS), 200, "answers of the silos")
    assert fleet.log("foreign").count("'error': 'MessageError'") == len(SILOS)
    assert [file.name for file in seen.iterdir()] == ["flwr-serverapp"]


@pytest.mark.timeout(1200)
def test_a_silo_and_the_server_may_die(setting: Setting, fleets: list[Fleet]) -> None:
    fleet = setting.fleet(rounds=3)
    fleets.append(fleet)
    hangs = setting.folder / "hangs"
    hang = {"class_path": "hooks_of_this_test.Hang", "init_args": {"marker": str(hangs)}}
    fleet.superlink()
    for silo in SILOS:
        fleet.register(silo)
        setting.node(fleet, silo, [hang])
    fleet.run()
    together = setting.in_one_process([{"class_path": "hooks_of_this_test.Away"}])
    wait_for(hangs.exists, 240, "round 2")
    fleet.kill("drama")
    wait_for(lambda: progress(setting)["round"] == 2, 200, "the end of round 2 without the silo")
    fleet.kill_server_app()
    assert progress(setting)["dropped"] == {"2": ["drama"]}
    setting.node(fleet, "drama", [hang])
    fleet.run("again")
    wait_for(lambda: "finished after 3 rounds" in fleet.log("again"), 300, "the run that goes on")
    assert "going on after round 2 of 3" in fleet.log("again")
    assert progress(setting)["dropped"] == {"2": ["drama"]}
    assert progress(setting)["finished"] == SILOS
    assert_same_result(setting, together)
