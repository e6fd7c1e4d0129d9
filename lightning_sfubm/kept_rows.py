"""Rows in a run's folder: which of them a run that goes on keeps, and what becomes of the others."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.results import PerUserResults
from lightning_sfubm.ranks import is_first

if TYPE_CHECKING:
    from lightning_sfubm.methods.base import DomainRun


def finished_row(path: Path, domain: "DomainRun", config_hash: str) -> bool:
    """Whether a row is there, computed with these settings on these data."""
    if not path.exists() or not config_hash:
        return False
    try:
        meta = PerUserResults.load(path).meta
    except DataError:  # cut off between its two files
        return False
    same_data = (meta.data_fingerprint, meta.candidate_hash) == domain.data_hashes
    return same_data and meta.extra.get("config_hash") == config_hash


def set_aside(results: Path, runs: Mapping[str, "DomainRun"], config_hash: str) -> None:
    """Move rows of other settings or data out of the results: one report holds one configuration.

    They are kept in ``results-of-other-settings``, which the next move into it replaces row by row.
    """
    aside = results.with_name("results-of-other-settings")
    for path in sorted(results.glob("*/*.parquet")):
        domain = runs.get(path.parent.name.removesuffix(", all users"))
        if config_hash and not (domain and finished_row(path, domain, config_hash)):
            (aside / path.parent.name).mkdir(parents=True, exist_ok=True)
            for file in (path, path.with_suffix(".json")):
                if file.exists():
                    file.replace(aside / path.parent.name / file.name)


def set_all_aside(results: Path) -> None:
    """Move the results of the run that lies here out of the way of one that begins anew, and say so; those before it go."""
    if any(results.glob("*/*.parquet")):
        aside = results.with_name("results-of-the-run-before")
        instead = ", in place of those of the run before it" if aside.exists() else ""
        shutil.rmtree(aside, ignore_errors=True)
        results.replace(aside)
        Console(highlight=False).print(
            f"Results of an earlier run lay here; they are in {aside} now{instead} (--ckpt_path last goes on with a run)"
        )


def place_rows(domain: "DomainRun", rows: Sequence[str]) -> None:
    """Give the rows that are kept their places in this run's table, where ``rows`` names all there may be in order."""
    if not is_first():
        return
    for order, key in enumerate(dict.fromkeys(rows)):
        for path in (domain.row_path(key), domain.row_path(key, all_users=True)):
            if key in domain.kept and path.exists():
                results = PerUserResults.load(path)
                if results.meta.order != order:  # the bytes by user stay the same, so a kill leaves one of the two
                    replace(results, meta=replace(results.meta, order=order)).save(path)


def save_row(results: PerUserResults, path: Path) -> None:
    """Write a row, in the first process alone."""
    if is_first():
        results.save(path)
