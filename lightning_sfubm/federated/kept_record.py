"""The record of what left: which files of a run's folder it is, and where it goes when another run begins there."""

import logging
import re
from pathlib import Path

from lightning_sfubm.federated.ledger import Ledger
from lightning_sfubm.federated.recording import FOLDER

#: what was found out of the messages of a run
_AUDIT = ("audit.json", "privacy_curve.json", "privacy_report.html", "privacy_report.json")
_LEDGER = "ledger.jsonl"
#: what tells of a run beside its results
_RECORD = (FOLDER, *_AUDIT, "privacy.json", "run.json", "report.html", "report.json", "data", _LEDGER)
_ASIDE = "record-of-the-run-before"
log = logging.getLogger(__name__)


def set_record_aside(run_dir: Path) -> None:
    """Move what tells of an earlier run in this folder out of the way, and say so. What was set aside before it stays.

    A process killed on the way leaves a part in a hidden folder, where the next one moves the rest: each record is in a folder
    of its own only once it is whole.
    """
    moving = run_dir / f".{_ASIDE}"
    for path in (run_dir / name for name in _RECORD):
        if _tells(path):
            # Of a run before this one, which was killed while it moved the record of another.
            if (moving / path.name).exists():
                moving.replace(_next_aside(run_dir))
            moving.mkdir(exist_ok=True)
            path.replace(moving / path.name)
    (run_dir / _LEDGER).unlink(missing_ok=True)  # it has no line
    if moving.exists():
        aside = _next_aside(run_dir)
        moving.replace(aside)
        messages = Ledger(aside / _LEDGER).messages()
        log.warning("%s holds an earlier run: the record of its %d messages is in %s now", run_dir, messages, aside)


def remove_audit(run_dir: Path) -> None:
    """Remove what was found out of the messages that were sent so far; they and their ledger stay."""
    for name in _AUDIT:
        (run_dir / name).unlink(missing_ok=True)


def _next_aside(run_dir: Path) -> Path:
    """Where the next record goes: without a number, then from 2 on, above all that are there."""
    matches = (re.fullmatch(rf"{_ASIDE}(?:-(\d+))?", path.name) for path in run_dir.iterdir())
    number = 1 + max((int(match[1] or 1) for match in matches if match), default=0)
    return run_dir / (_ASIDE if number == 1 else f"{_ASIDE}-{number}")


def _tells(path: Path) -> bool:
    """Whether an entry of :data:`_RECORD` is there; a folder ``data`` with more than data cards is not the run's."""
    if not path.is_dir():
        return path.is_file() and (path.name != _LEDGER or Ledger(path).messages() > 0)
    files = list(path.iterdir())
    return bool(files) and (path.name == FOLDER or all(file.suffix == ".json" for file in files))
