"""``lightning-sfubm flower-silo``: a SuperNode that runs nothing but the ClientApp that is installed here.

In Flower a run is code: whoever may start one on the SuperLink has it executed by every SuperNode. That would undo all that a
silo checks. A SuperNode starts its task processes by name (``flwr-clientapp``), so this command puts a folder of its own in
front of the search path: there ``flwr-clientapp`` is Flower's own process with the app of this package in the place of
whatever a run carries, which is neither unpacked nor imported, and every other kind of task is refused.
"""

import argparse
import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from lightning_sfubm.errors import ConfigError, SFUBMError
from lightning_sfubm.federated.flower_app import QUIET
from lightning_sfubm.quiet import quiet_command_line

_TASK = "flwr-clientapp"
_REFUSED = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation")


def flower_silo(argv: Sequence[str]) -> NoReturn:
    """Entry point: becomes the SuperNode.

    Raises:
        ConfigError: Flower is not installed, neither certificates nor ``--insecure`` are given, or the configuration is wrong.
    """
    quiet_command_line(fitting=False)
    parser = argparse.ArgumentParser(
        "lightning-sfubm flower-silo",
        description="Start a silo of a federation across machines: Flower's SuperNode, which runs the ClientApp that is "
        "installed here and no code that a run carries. Needs the extra 'flower'.",
    )
    parser.add_argument("--silo", required=True, metavar="NAME", help="name of this silo")
    parser.add_argument(
        "--config",
        required=True,
        action="append",
        type=Path,
        help="this silo's configuration; may be repeated, later files win. They are read here and never sent",
    )
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT", help="address of the SuperLink")
    parser.add_argument(
        "--root-certificates", type=Path, metavar="CA.CRT", help="who signed the SuperLink's certificate"
    )
    parser.add_argument(
        "--key", type=Path, help="private key of this silo; its public key is registered at the SuperLink"
    )
    parser.add_argument("--insecure", action="store_true", help="no TLS and no key; for trials on one machine")
    parser.add_argument("--port", type=int, default=9094, help="local port of the SuperNode's own processes (9094)")
    options = parser.parse_args(argv)
    paths = [str(path.absolute()) for path in options.config]
    missing = [path for path in paths if not Path(path).is_file()]
    if missing or any(":" in path or '"' in path for path in paths):
        raise ConfigError(f"--config: {missing or paths} must be files whose paths hold neither ':' nor '\"'")
    if options.insecure == bool(options.root_certificates and options.key):
        raise ConfigError("give --root-certificates and --key, or --insecure alone for a trial on one machine")
    trust = ["--insecure"]
    if not options.insecure:
        trust = ["--root-certificates", str(options.root_certificates)]
        trust += ["--auth-supernode-private-key", str(options.key)]
    _check(paths, options.silo)  # as a task would, but now and not in the log of the first round
    environment = silo_environment(write_commands())
    command = shutil.which("flower-supernode", path=environment["PATH"])
    if command is None:
        raise ConfigError(
            "flower-supernode is not there: install 'lightning-sfubm[flower]' in an environment of its own"
        )
    node = f'silo="{options.silo}" config="{":".join(paths)}"'
    link = ["--superlink", options.superlink, "--port", str(options.port)]
    os.execve(command, [command, *link, *trust, "--node-config", node], environment)


def _check(configs: Sequence[str], silo: str) -> None:
    """Refuse a configuration that no task could open: an unknown setting, no such domain, what is for one process only."""
    from lightning_sfubm.federated.envelopes import check_across_machines
    from lightning_sfubm.federated.silo import read_silo

    _, federation = read_silo(configs, silo)
    check_across_machines(federation)


def write_commands() -> Path:
    """The folder of commands that a SuperNode's processes are started by."""
    from lightning_sfubm.access import own_cache
    from lightning_sfubm.assets import cache_dir

    folder = cache_dir() / "flower-silo" / hashlib.sha256(sys.executable.encode()).hexdigest()[:16]
    texts = dict.fromkeys(_REFUSED, "echo 'refused: this silo runs rounds of lightning-sfubm only' >&2\nexit 1\n")
    texts[_TASK] = f"exec '{sys.executable}' -m lightning_sfubm.federated.flower_silo \"$@\"\n"
    with own_cache(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, text in texts.items():
            temporary = folder / f".{name}.{os.getpid()}"
            temporary.write_text("#!/bin/sh\n" + text)
            temporary.chmod(stat.S_IRWXU)
            temporary.replace(folder / name)
    return folder


def silo_environment(commands: Path, inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of the SuperNode: those commands first, then the ones beside this interpreter; nothing reaches out."""
    inherited = os.environ if inherited is None else inherited
    search = [str(commands), str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)]
    return {**inherited, **QUIET, "PATH": os.pathsep.join(search)}


def _own_app(*of_the_run: object) -> Any:
    """The ClientApp of this package.

    Imported only when a task is at work, with its heartbeats running: on a busy machine the import takes as long as Flower
    waits for a first one, and a task that is given up and started again makes the machine busier still.
    """
    from lightning_sfubm.federated.flower import client_app

    return client_app


def run_task() -> None:
    """``flwr-clientapp`` with the ClientApp of this package, whatever the run carries.

    Raises:
        SFUBMError: this Flower is built otherwise; then nothing runs.
    """
    from flwr.supernode.cli import flwr_clientapp

    worker = import_module("flwr.supernode.runtime.run_clientapp")
    replaced = {
        "install_from_fab": lambda *args, **kwargs: None,
        "get_load_client_app_fn": lambda *args, **kwargs: _own_app,
    }
    for name, replacement in replaced.items():
        if not hasattr(worker, name):
            raise SFUBMError(
                f"this Flower has no {name} to replace: install the version that lightning-sfubm[flower] names"
            )
        setattr(worker, name, replacement)
    flwr_clientapp()


if __name__ == "__main__":
    run_task()
