"""``lightning-sfubm flower-app``: write the Flower app of a federation, and the commands that start it."""

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lightning_sfubm import __version__
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.evaluation.results import write_atomically
from lightning_sfubm.federated.membership import Patience
from lightning_sfubm.federated.run_config import RunConfig, Value, run_config
from lightning_sfubm.names import path_part
from lightning_sfubm.quiet import quiet_command_line

FLOWER = "1.41"
#: nothing is sent to Flower's makers, and no run fetches packages
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
_PYPROJECT = """\
# Written by lightning-sfubm {version}. No code travels: both components are what is installed on each machine.
[project]
name = "{name}"
version = "1.0.0"
description = "A federation of lightning-sfubm"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>={flower}.0,<{next_flower}", "lightning-sfubm"]

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.flwr.app]
publisher = "{publisher}"
fab-format-version = 1
flwr-version-target = "{flower}.0"

[tool.flwr.app.components]
serverapp = "lightning_sfubm.federated.flower:server_app"
clientapp = "lightning_sfubm.federated.flower:client_app"

# Only the schedule. "flwr run . {connection} --run-config 'rounds=3'" changes a value; silos refuse more than they agreed to.
[tool.flwr.app.config]
{config}
"""
_LICENSE = """\
This app holds no code: it names two objects of lightning-sfubm, which is under the Apache License, Version 2.0
(https://www.apache.org/licenses/LICENSE-2.0), and the schedule of a federation.
"""


def flower_app(argv: Sequence[str]) -> None:
    """Entry point.

    Raises:
        ConfigError: the configuration holds no federation, or one that cannot be carried across machines.
    """
    quiet_command_line(fitting=False)
    parser = argparse.ArgumentParser(
        "lightning-sfubm flower-app",
        description="Write the Flower app of a federation: the app itself, the connection for 'flwr run', and the commands "
        "that start a SuperLink, SuperNodes and a run (README.md). Needs no Flower. See docs/how-to/"
        "federate-across-machines.md.",
    )
    parser.add_argument(
        "--config",
        required=True,
        action="append",
        type=Path,
        help="what all silos share: seed_everything, trainer.federation, model; may be repeated, later files win",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--silos", nargs="+", metavar="NAME", help="names of the silos; by default those of data.domains"
    )
    parser.add_argument("--name", default="sfubm-federation", help="of the app")
    parser.add_argument("--publisher", default="federation", help="of the app")
    parser.add_argument("--run-dir", type=Path, help="the server's states, on the machine of the SuperLink; OUT/server")
    parser.add_argument("--superlink", default="127.0.0.1:9091", metavar="HOST:PORT", help="address of the SuperLink")
    parser.add_argument("--connection", default="federation", help="name of the connection for 'flwr run'")
    parser.add_argument(
        "--certificates",
        type=Path,
        default=Path("certificates"),
        help="folder of ca.crt, server.pem, server.key and the silos' public keys",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="no TLS and no node authentication; for trials on one machine"
    )
    parser.add_argument("--min-silos", type=int, default=0, help="silos without which a run does not start; 0 = all")
    patience = Patience()
    for name, value, what in (
        ("start", patience.start_s, "for the silos to come"),
        ("round", patience.round_s, "for a round; who has not answered then has dropped out of it"),
        ("finish", patience.finish_s, "for the local phases"),
    ):
        parser.add_argument(f"--{name}-s", type=float, default=value, metavar="SECONDS", help=f"{what} ({value:g})")
    options = parser.parse_args(argv)
    shared = _load(options.config)
    settings = _federation_settings(shared, options.config)
    seed = _seed(shared, options.config)
    silos = options.silos or _domains(shared, options.config)
    if not silos:
        raise ConfigError("flower-app: give the names of the silos (--silos), or data.domains in the configuration")
    for silo in silos:
        if "," in path_part(silo, "--silos"):
            raise ConfigError(
                f"flower-app: the silo '{silo}' has a comma in its name, which parts the names in a run config"
            )
    config = run_config(
        settings,
        seed,
        sorted(silos),
        options.run_dir or options.out / "server",
        options.min_silos,
        Patience(options.start_s, options.round_s, options.finish_s),
    )
    check(config)
    try:
        for path, text in files(config, options).items():
            write_atomically(options.out / path, text.encode())
    except OSError as error:
        raise ConfigError(
            f"{options.out} cannot be written into ({error.strerror}); give another folder by --out"
        ) from None
    print(f"{options.out / 'README.md'}: the commands that start it")


def check(config: Mapping[str, Value]) -> None:
    """Read a run config as the ServerApp will, and refuse now what it would refuse then.

    Raises:
        ConfigError: see :class:`~lightning_sfubm.federated.coordinator.Coordinator`.
    """
    from lightning_sfubm.federated.coordinator import Coordinator

    class Nobody:
        def nodes(self) -> Mapping[int, str]:
            return {}

        def ask(self, requests: Mapping[int, Any], deadline_s: float) -> Mapping[int, Any]:
            return {}

        def send(self, requests: Mapping[int, Any], deadline_s: float) -> None: ...

        def arrived(self) -> Mapping[int, Any]:
            return {}

    read = RunConfig.read(config)
    Coordinator(read.federation, read.silos, Nobody(), Path(read.run_dir), read.seed, read.min_silos, read.patience)


def files(config: Mapping[str, Value], options: argparse.Namespace) -> dict[str, str]:
    """Texts of the files, by path below the output folder."""
    major, minor = FLOWER.split(".")
    pyproject = _PYPROJECT.format(
        version=__version__,
        name=options.name,
        publisher=options.publisher,
        flower=FLOWER,
        next_flower=f"{major}.{int(minor) + 1}",
        connection=options.connection,
        config="\n".join(f"{key} = {json.dumps(value)}" for key, value in config.items()),  # JSON scalars are TOML's
    )
    certificate = options.certificates.absolute() / "ca.crt"
    trust = "insecure = true" if options.insecure else f"root-certificates = {json.dumps(str(certificate))}"
    connection = f"[superlink.{options.connection}]\naddress = {json.dumps(options.superlink)}\n{trust}\n"
    return {
        "app/pyproject.toml": pyproject,
        "app/LICENSE": _LICENSE,
        "home/config.toml": connection,
        "README.md": _commands(config, options),
    }


def _commands(config: Mapping[str, Value], options: argparse.Namespace) -> str:
    """The commands, to be copied; those of a silo run in a folder with what it was given."""
    silos = [shlex.quote(name) for name in str(config["silos"]).split(",")]
    _, _, port = options.superlink.rpartition(":")
    keys = shlex.quote(str(options.certificates.absolute()))
    home, app = (shlex.quote(str((options.out / part).absolute())) for part in ("home", "app"))
    given = " ".join(f"--config {shlex.quote(path.name)}" for path in options.config)
    link, trust = "--insecure", ["--insecure" for _ in silos]
    if not options.insecure:
        link = f"--ssl-ca-certfile {keys}/ca.crt --ssl-certfile {keys}/server.pem --ssl-keyfile {keys}/server.key"
        link += " --enable-supernode-auth"
        trust = [f"--root-certificates ca.crt --key {silo}.key" for silo in silos]
    lines = [
        f"# {options.name}: {len(silos)} silos, {config['rounds']} rounds",
        "",
        "## Server",
        "",
        f"    export {' '.join(f'{key}={value}' for key, value in QUIET.items())}",
        f"    export FLWR_HOME={home}",
        f"    flower-superlink --host 0.0.0.0 --port {port} --disable-runtime-dependency-installation {link}",
        "",
    ]
    if not options.insecure:
        lines += [
            "Once for each silo, in another shell with the same variables, with the public key that the silo sent:",
            "",
        ]
        name = options.connection
        lines += [f"    flwr supernode register {keys}/{silo}.key.pub {name} --name {silo}" for silo in silos]
        lines.append("")
    lines += ["## Silos", ""]
    for silo, trusted in zip(silos, trust, strict=True):
        own = f"{given} --config {silo}.yaml"
        lines.append(f"    lightning-sfubm flower-silo --silo {silo} {own} --superlink {options.superlink} {trusted}")
    run = f"    flwr run {app} {options.connection} --stream"
    again = "Given again, it goes on after the last complete round, where it was cut off."
    return "\n".join([*lines, "", "## Run, on the server", "", run, "", again, ""])


def _load(paths: Sequence[Path]) -> dict[str, Any]:
    try:
        merged = OmegaConf.merge(*(OmegaConf.load(path) for path in paths))
        wanted = {}
        if isinstance(merged, DictConfig):
            wanted = {key: _plain(merged.get(key)) for key in ("seed_everything", "trainer", "data") if key in merged}
            trainer = merged.get("trainer")
            # of the rest, references may hold on the silos' machines alone
            if isinstance(trainer, DictConfig) and "federation" in trainer:
                wanted["trainer"]["federation"] = _plain(trainer.get("federation"), resolve=True)
    # what YAML, a reference in it, or files that do not go together may raise
    except (OSError, ValueError, TypeError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{_names(paths)}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(merged, DictConfig):
        raise ConfigError(f"{paths[0]}: not a configuration")
    return wanted


def _plain(value: Any, resolve: bool = False) -> Any:
    return OmegaConf.to_container(value, resolve=resolve) if OmegaConf.is_config(value) else value


def _federation_settings(shared: Mapping[str, Any], paths: Sequence[Path]) -> dict[str, Any]:
    federation = _mapping(_mapping(shared, "trainer", paths), "federation", paths, "trainer.")
    if not federation:
        raise ConfigError(f"{_names(paths)}: trainer.federation is missing: it is the schedule of the rounds")
    settings = (
        _mapping(federation, "init_args", paths, "trainer.federation.") if "class_path" in federation else federation
    )
    if strange := [key for key in settings if not isinstance(key, str)]:
        raise ConfigError(f"{_names(paths)}: trainer.federation has no setting {strange[0]!r}")
    return dict(settings)


def _domains(shared: Mapping[str, Any], paths: Sequence[Path]) -> list[str]:
    """Names of the domains in ``data``, which are those of the silos; none where there are no data."""
    data = _mapping(_mapping(shared, "data", paths), "init_args", paths, "data.")
    names = [path_part(name, f"{_names(paths)}: data.domains") for name in _mapping(data, "domains", paths, "data.")]
    return sorted(names)


def _seed(shared: Mapping[str, Any], paths: Sequence[Path]) -> int:
    seed = shared.get("seed_everything", 1)
    if type(seed) is not int or seed < 0:
        raise ConfigError(
            f"{_names(paths)}: seed_everything must be an integer from 0 on, the same for all silos, not {seed!r}"
        )
    return seed


def _mapping(parent: Mapping[Any, Any], key: str, paths: Sequence[Path], where: str = "") -> Mapping[Any, Any]:
    """An entry of a configuration that holds further ones; empty where it is missing or null."""
    entry = parent.get(key)
    if not isinstance(entry, Mapping | None):
        raise ConfigError(f"{_names(paths)}: {where}{key} must be a mapping of settings, not {entry!r}")
    return entry or {}


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))
