"""Entry points `lightning-sfubm`, `python -m lightning_sfubm`, `lightning`. Imports stay lazy, for a quick `--help`."""

import os
import sys
from typing import NoReturn

_HELP = """usage: lightning-sfubm COMMAND [options]

Federated, semantics-enhanced next-item recommendation across data silos.

commands
  fit       train; with an experiment config: federated rounds, LLM stage, evaluation and report
  validate  evaluate a checkpoint on validation data
  test      evaluate a checkpoint on test data
  predict   items each user has not had, best first after all they have, from a checkpoint
  report    build report.html and privacy_report.html (with .json) again from a finished run folder
  audit     check a run's recorded messages against its ledger, attack them, refresh the privacy report
  results   run a grid of pairs, methods and seeds, and build its tables; can be stopped and given again
  flower-app    write the Flower app of a federation across machines, and the commands that start it
  flower-silo   start a silo of such a federation on this machine

examples
  lightning-sfubm fit --config configs/experiment/demo.yaml
  lightning-sfubm fit --config configs/experiment/health_beauty.yaml --data.root DIR
  lightning-sfubm fit --config configs/experiment/demo.yaml --ckpt_path last     (go on where it stopped)
  lightning-sfubm report runs/demo
  lightning-sfubm audit --run_dir runs/audit_demo      (of a run that has kept its messages, as docs/privacy.md makes it)
  lightning-sfubm results --grid configs/results/demo.yaml

'lightning-sfubm COMMAND --help' lists every option; any LightningModule and LightningDataModule can be named by
class path. Settings of the environment: SFUBM_CACHE moves the cache of models and prepared data.
"""

_LIGHTNING = ("fit", "validate", "test", "predict")
_OWN = ("report", "audit", "results", "flower-app", "flower-silo")


def main(argv: list[str] | None = None) -> None:
    """Run a command; user errors end with one sentence and exit code 2, an interruption with one line and 130."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return
    if argv[0] in ("-V", "--version"):
        from lightning_sfubm import __version__

        print(f"lightning-sfubm {__version__}")
        return
    from lightning_sfubm.errors import SFUBMError

    try:
        if argv[0] in _LIGHTNING:
            from lightning_sfubm.cli import run

            run(argv)
        elif argv[0] == "report":
            _report(argv[1:])
        elif argv[0] == "audit":
            from lightning_sfubm.audit.command import audit

            audit(argv[1:])
        elif argv[0] == "results":
            from lightning_sfubm.grid.command import results

            results(argv[1:])
        elif argv[0] == "flower-app":
            from lightning_sfubm.federated.flower_app import flower_app

            flower_app(argv[1:])
        elif argv[0] == "flower-silo":
            from lightning_sfubm.federated.flower_silo import flower_silo

            flower_silo(argv[1:])
        else:
            known = ", ".join((*_LIGHTNING, *_OWN))
            raise SFUBMError(f"unknown command '{argv[0]}': use one of {known}, or --help")
    except SFUBMError as error:
        if not getattr(error, "said_elsewhere", False):  # by another of the processes that train together
            print(f"lightning-sfubm: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        _interrupted(argv[0])
    except SystemExit as ending:  # what a Lightning trainer makes of it
        if isinstance(ending.__context__, KeyboardInterrupt):
            _interrupted(argv[0])
        raise


def _interrupted(command: str) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes that train together the first one says it
        how = "; the same command with --ckpt_path last goes on" if command == "fit" else ""
        print(f"\ninterrupted{how}", file=sys.stderr)
    raise SystemExit(130) from None


def main_lightning(argv: list[str] | None = None) -> None:
    """The ``lightning`` command: ours, and whatever else goes to lightning-sdk where that is installed."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in (*_LIGHTNING, *_OWN, "-h", "--help", "-V", "--version"):
        main(argv)
        return
    from importlib.metadata import entry_points

    for entry in entry_points(group="console_scripts", name="lightning"):
        if entry.dist is not None and entry.dist.name != "lightning-sfubm":
            entry.load()()
            return
    main(argv)


def _report(argv: list[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser("lightning-sfubm report", description="Build the reports of a finished run again.")
    parser.add_argument("run_dir", help="folder of the run, for instance runs/demo")
    arguments = parser.parse_args(argv)
    from pathlib import Path

    from lightning_sfubm.audit.report import build_privacy_report
    from lightning_sfubm.evaluation.report import build_report

    print(build_report(Path(arguments.run_dir)))
    if (Path(arguments.run_dir) / "ledger.jsonl").is_file():
        print(build_privacy_report(Path(arguments.run_dir)))


if __name__ == "__main__":
    main()
