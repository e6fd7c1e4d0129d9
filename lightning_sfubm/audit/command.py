"""``lightning-sfubm audit``: check the recorded messages of a run against its ledger, attack them, refresh its report."""

import argparse
import json
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_sfubm.audit.attack import AuditSettings, attack
from lightning_sfubm.audit.check import Schemas, check_run
from lightning_sfubm.audit.curve import curve_points
from lightning_sfubm.audit.facts import CURVE
from lightning_sfubm.cli import SFUBMCLI
from lightning_sfubm.errors import ConfigError, PrivacyError
from lightning_sfubm.evaluation.environment import environment
from lightning_sfubm.evaluation.results import write_atomically
from lightning_sfubm.federated.checkpoint import read_loop, stored_states
from lightning_sfubm.federated.loop import FederatedLoop
from lightning_sfubm.federated.recording import FOLDER, MessageStore
from lightning_sfubm.federated.secure_kmeans import SecureKMeans
from lightning_sfubm.federated.settings import difference, schedule_difference
from lightning_sfubm.federated.trainer import FederatedTrainer
from lightning_sfubm.privacy.secret import secret_path
from lightning_sfubm.quiet import quiet_command_line


class _Parsed(SFUBMCLI):
    """Parses and builds; nothing is trained or written."""

    def before_fit(self) -> None:
        """Nothing is written."""

    def fit(self, **kwargs: Any) -> None:
        """Nothing is run."""


def audit(argv: list[str]) -> None:
    """Entry point.

    Raises:
        ConfigError: there is no such run folder, or neither a configuration nor a run folder with one is given.
        DataError: a run to be shown beside this one has no audit.
        PrivacyError: nothing was recorded, or ledger and messages do not agree.
        SystemExit: with code 3, after the audit, where the end of the ledger could not be checked.
    """
    quiet_command_line(fitting=False)
    defaults = AuditSettings()
    parser = argparse.ArgumentParser(
        "lightning-sfubm audit",
        description="Check the messages that a run has recorded (trainer.federation.init_args.keep_messages) against "
        "its ledger, attack them, and write audit.json, privacy_report.html and privacy_report.json into the run folder. "
        "Further options are those of fit and must describe the run as it was; where its data root is a relative path, audit "
        "in the folder in which fit was run, or give --data.root. Exit code 2: nothing was attacked, for something is missing "
        "or does not agree; 3: attacked, but the end of the ledger could not be checked.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", default=[], help="as of fit; by default RUN_DIR/config.yaml")
    parser.add_argument(
        "--run_dir", type=Path, help="folder of the run; by default trainer.default_root_dir of the config"
    )
    parser.add_argument(
        "--shadows",
        type=int,
        default=defaults.shadows,
        help="shadow models a domain, even; 0 = none (default %(default)s)",
    )
    parser.add_argument(
        "--max_users", type=int, default=defaults.max_users, help="users a domain (default %(default)s)"
    )
    parser.add_argument(
        "--max_items", type=int, default=defaults.max_items, help="items that are linked (default %(default)s)"
    )
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        type=Path,
        metavar="RUN_DIR",
        help="another audited run, of another epsilon or sigma: the report shows the curve over all of them; may be repeated",
    )
    options, rest = parser.parse_known_args(argv)
    if options.shadows < 0 or options.shadows % 2 or options.max_users < 2 or options.max_items < 2:
        raise ConfigError("audit: --shadows must be even, --max_users and --max_items at least 2")
    run_dir: Path | None = options.run_dir
    if run_dir is not None and not run_dir.is_dir():
        raise ConfigError(
            f"{run_dir}: there is no such run folder; give --config, or --run_dir of a run with a config.yaml"
        )
    configs = list(options.config)
    if not configs:
        stored = None if run_dir is None else run_dir / "config.yaml"
        if stored is None or not stored.is_file():
            raise ConfigError("audit: give --config, or --run_dir of a run with a config.yaml")
        configs = [str(stored)]
    arguments = ["fit", *(part for config in configs for part in ("--config", config)), *rest, "--experiment", "null"]
    if run_dir is not None:
        arguments += ["--trainer.default_root_dir", str(run_dir)]
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended.*")
    cli = _Parsed(args=[*arguments, "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"])
    trainer: FederatedTrainer = cli.trainer  # type: ignore[assignment]
    if trainer.federation is None:
        raise ConfigError("audit: the configuration has no trainer.federation, so nothing was exchanged")
    settings = AuditSettings(options.shadows, options.max_users, options.max_items, seed=trainer.seed)
    _recorded_or_raise(trainer.run_dir)
    curve_points(options.beside)  # refused now, not after the attacks, when this run's earlier audit is gone
    trainer.settings = cli.lasting_settings
    _secrets_or_raise(trainer, getattr(cli.datamodule, "domains", {}))
    report = audit_run(trainer, trainer.build_loop(cli.model, cli.datamodule), settings, "audit " + " ".join(argv))
    if options.beside:
        report = write_curve(trainer.run_dir, options.beside)
    print(report)
    if unchecked := json.loads((trainer.run_dir / "audit.json").read_text())["check"]["unchecked"]:
        print(f"lightning-sfubm: not checked: {'; '.join(unchecked)}", file=sys.stderr)
        raise SystemExit(3)


def audit_run(trainer: FederatedTrainer, loop: FederatedLoop, settings: AuditSettings, command: str = "") -> Path:
    """Audit a finished run.

    Args:
        trainer: with the run's configuration.
        loop: built from it, with untrained clients; their modules are changed.
        settings: how much is attacked.
        command: stated in the report.

    Returns:
        Path of the privacy report.

    Raises:
        ConfigError: the configuration is not that of the run.
        PrivacyError: nothing was recorded; or the secrets are not those of the run; or ledger and messages do not agree: then
            nothing is attacked, and audit.json and the report say what is wrong.
    """
    from lightning_sfubm.audit.report import build_privacy_report

    console, run_dir = Console(highlight=False, stderr=True), loop.run_dir
    _recorded_or_raise(run_dir)
    _same_run_or_raise(loop)
    check = check_run(run_dir, schemas(loop))
    facts: dict[str, Any] = {
        **{key: value for key, value in environment().items() if key in ("started", "versions", "commit")},
        "command": command,
        "settings": vars(settings),
        "check": check.facts(),
    }
    if not check.problems:
        console.print(
            "; ".join([f"{check.recorded} messages agree with {check.lines} lines of the ledger", *check.unchecked])
        )
        facts |= attack(trainer, loop, check.messages, check.entries, settings)
    write_atomically(run_dir / "audit.json", json.dumps(facts, indent=1, allow_nan=False).encode())
    report = build_privacy_report(run_dir)
    if check.problems:
        raise PrivacyError(
            f"the audit of {run_dir} stops here, for messages, ledger and configuration do not agree: {check.problems[0]}"
            + (f" (and {len(check.problems) - 1} more, see audit.json)" if len(check.problems) > 1 else "")
        )
    return report


def write_curve(run_dir: Path, beside: list[Path]) -> Path:
    """Put the curve over several audited runs into the privacy report of one of them; returns its path.

    Raises:
        DataError: one of them has no audit.
    """
    from lightning_sfubm.audit.report import build_privacy_report

    points = curve_points([run_dir, *beside])
    write_atomically(run_dir / CURVE, json.dumps(points, indent=1, allow_nan=False).encode())
    return build_privacy_report(run_dir)


def schemas(loop: FederatedLoop) -> Schemas:
    """Schemas of a run's messages by kind and direction."""
    server = loop.server
    known = {("semantics", "up"): server.semantics, ("semantics", "down"): server.semantics}
    if server.teacher is not None and server.broadcast_schema is not None:
        known |= {("teacher", "up"): server.teacher, ("teacher", "down"): server.broadcast_schema}
    if isinstance(loop.federation.aggregator, SecureKMeans):
        centroids = loop.federation.aggregator.schema(next(iter(loop.clients.values())).semantics().shape[1])
        known[centroids.kind, "down"] = centroids
    return known


def _same_run_or_raise(loop: FederatedLoop) -> None:
    """Weights begin as the seed says, members are the data's, noise and orders the secrets': with others attacks miss."""
    for state in stored_states(loop.checkpoints)[-1:]:
        stored = read_loop(state)["stored"]
        if changed := difference(stored.get("settings", {}), loop.settings):
            raise ConfigError(
                f"the run was made with other settings: {changed}; audit a run with its own configuration (--run_dir alone "
                "takes the one in the run folder)"
            )
        if changed := schedule_difference(
            stored["schedule"], json.loads(json.dumps(loop.federation.schedule(loop.seed)))
        ):
            raise ConfigError(
                f"the run was written by the schedule of another configuration: {changed}; audit a run with its own "
                "configuration (--run_dir alone takes the one in the run folder)"
            )
        if others := loop.changed_secrets(stored.get("secrets", {})):
            raise PrivacyError(
                f"the secrets of {others} in {loop.secret_places} are not those that the run was made with, so every attack "
                "would miss: run the audit in the folder that fit was run in, put the files back, or set secret_dir to where "
                "they are now"
            )


def _secrets_or_raise(trainer: FederatedTrainer, clients: Iterable[str]) -> None:
    """A secret made anew gives another order of items and another noise: every attack would miss, and the report would calm."""
    assert trainer.federation is not None
    for holder in (*trainer.callbacks, trainer.federation.aggregator):  # type: ignore[attr-defined]
        if folder := getattr(holder, "secret_dir", None):
            for path in (secret_path(folder, name) for name in clients):
                if not path.is_file():
                    raise PrivacyError(
                        f"{path.absolute()}, the secret the run was made with, is not there: run the audit in the folder that "
                        f"fit was run in, or set the secret_dir of {type(holder).__name__} to where it is now"
                    )


def _recorded_or_raise(run_dir: Path) -> None:
    if not (run_dir / "ledger.jsonl").is_file():
        raise PrivacyError(f"{run_dir} holds no run: there is no ledger.jsonl; give --run_dir or fit first")
    if not MessageStore(run_dir / FOLDER).names():
        raise PrivacyError(
            f"{run_dir}: no messages were recorded, only their hashes; run fit with "
            "--trainer.federation.init_args.keep_messages true to audit them"
        )
