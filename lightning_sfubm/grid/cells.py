"""One JSON for every cell (pair, domain, method, seed): everything a table needs, and each user's result."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lightning_sfubm.errors import DataError
from lightning_sfubm.evaluation.facts import domain_facts, plain
from lightning_sfubm.evaluation.forms import integer, nullable, number, read_json, record, text
from lightning_sfubm.evaluation.results import COLUMNS, PerUserResults, ResultMeta, write_atomically

FORMAT = 1
Json = dict[str, Any]
METRICS = ("hit@1", "ndcg@10", "full_ndcg@10", "valid_ratio")  #: of a table
SLICES = ("cold target", "short history", "long history")  #: of a table
_ESTIMATE = record({"value": nullable(number)})
#: what tables and figures read without asking whether it is there
_FORM = record(
    {
        **dict.fromkeys(("pair", "domain", "method", "label", "group", "candidate_hash"), text),
        **dict.fromkeys(("seed", "num_candidates", "users"), integer),
        "trainable_params": nullable(integer),
        "metrics": record(dict.fromkeys(METRICS, _ESTIMATE)),
        "slices": record(dict.fromkeys(SLICES, record({"hit@1": _ESTIMATE}))),
    }
)
_META = ("candidate_hash", "data_fingerprint", "split", "ties", "num_candidates", "num_items")


def cell_path(out: Path, pair: str, domain: str, method: str, seed: int) -> Path:
    """Where a cell is stored."""
    return out / "cells" / pair / domain / method / f"seed{seed}.json"


def write_cell(path: Path, result: PerUserResults, about: Json) -> None:
    """Write the cell of a result, atomically.

    Args:
        path: see :func:`cell_path`.
        result: per-user results of the row.
        about: pair, method, run, grid hash, commit, hardware, versions and the like.
    """
    row = domain_facts(result.meta.domain, [result])["rows"][0]
    columns = {name: plain(getattr(result, name).tolist()) for name in COLUMNS}
    meta = {name: getattr(result.meta, name) for name in _META}
    cell = {"format": FORMAT, **row, **meta, "domain": result.meta.domain, **about, "per_user": columns}
    write_atomically(path, json.dumps(plain(cell)).encode(), mode=0o600)  # with what each user took


def read_cell(path: Path) -> Json | None:
    """A cell, or ``None`` where it is missing, torn or of another format: it is then computed again."""
    cell = read_published(path)
    return cell if cell is not None and "per_user" in cell else None


def read_published(path: Path) -> Json | None:
    """As :func:`read_cell`, also where the cell was published without per-user results."""
    try:
        cell = read_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    right = isinstance(cell, dict) and cell.get("format") == FORMAT and _FORM(cell, "") is None
    return cell if right else None


def results_of(cell: Json) -> PerUserResults:
    """The per-user results of a cell.

    Raises:
        DataError: columns are missing or do not fit.
    """
    meta = ResultMeta(
        method=cell["method"],
        domain=cell["domain"],
        seed=cell["seed"],
        label=cell["label"],
        group=cell["group"],
        **{name: cell[name] for name in _META},
    )
    try:
        columns = {
            name: np.array([np.nan if value is None else value for value in cell["per_user"][name]], dtype=dtype)
            for name, dtype in COLUMNS.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the cell of '{cell['method']}' in '{cell['domain']}' lacks per-user results: {error}"
        ) from error
    return PerUserResults(meta, **columns)


def without_users(cell: Json) -> Json:
    """The cell as it may be published, without per-user results."""
    return {key: value for key, value in cell.items() if key != "per_user"}


def all_cells(out: Path, published: Path | None = None) -> list[Json]:
    """Every whole cell below an output folder, then every published one: a cell that both have is there twice.

    Args:
        out: output folder of a grid.
        published: folder that cells without per-user results were published to.

    Raises:
        DataError: a published cell cannot be read: what computed it is not at hand to make it again.
    """
    cells = [cell for path in _cells_below(out) if (cell := read_published(path)) is not None]
    for path in [] if published is None else _cells_below(published):
        if (cell := read_published(path)) is None:
            raise DataError(f"{path} is no cell of format {FORMAT}, or not a whole one; restore it or delete it")
        cells.append(cell)
    return cells


def _cells_below(folder: Path) -> list[Path]:
    return sorted((folder / "cells").glob("*/*/*/seed*.json"))
