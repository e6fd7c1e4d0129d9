"""Prepared domains on disk: Arrow files under the cache folder, memory-mapped when they are read.

An entry is named by a hash of the source files and of every setting that shapes the result, written into a temporary
folder and renamed as a whole: it is complete or absent, and a second run reads it without parsing the source.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from lightning_sfubm.access import own_cache
from lightning_sfubm.assets import cache_dir
from lightning_sfubm.datamodules.card import DataCard
from lightning_sfubm.datamodules.domain import Domain
from lightning_sfubm.datamodules.preprocess import PreprocessSettings, build_domain
from lightning_sfubm.datamodules.readers.base import Reader
from lightning_sfubm.errors import DataError

#: Part of every entry's name; raised whenever a rule or the layout changes.
FORMAT = 3


def prepared_domain(reader: Reader, root: Path | None, name: str, settings: PreprocessSettings) -> Domain:
    """The domain a reader and settings lead to: from the cache, or read, prepared and stored.

    Raises:
        DataError: the source cannot be used, or the cache entry is damaged or another account's.
    """
    key = json.dumps({"format": FORMAT, "source": reader.fingerprint(root), **settings.described()}, sort_keys=True)
    entry = cache_dir() / "domains" / hashlib.sha256(key.encode()).hexdigest()[:32]
    with own_cache(entry):
        stored = entry.is_dir()
    if not stored:
        domain = build_domain(reader.read(root), name, settings)
        with own_cache(entry):
            save_domain(domain, entry)
    with own_cache(entry):
        return load_domain(entry, name)


def save_domain(domain: Domain, entry: Path) -> None:
    """Write a domain into a folder that does not exist yet; a process that was faster keeps its copy."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".writing-"))
    try:
        lengths = np.diff(domain.offsets)
        _write(scratch / "users.arrow", {"key": pa.array(domain.user_keys, pa.string()), "length": pa.array(lengths)})
        columns = {"item": pa.array(domain.items)}
        if domain.times is not None:
            columns["time"] = pa.array(domain.times)
        _write(scratch / "interactions.arrow", columns)
        texts = {"key": domain.item_keys, "title": domain.titles, "text": domain.texts}
        _write(scratch / "items.arrow", {name: pa.array(values, pa.string()) for name, values in texts.items()})
        about = {"fingerprint": domain.fingerprint, "card": domain.card.to_dict()}
        (scratch / "domain.json").write_text(json.dumps(about, indent=1))
        try:
            os.rename(scratch, entry)
        except OSError:
            if not entry.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load_domain(entry: Path, name: str) -> Domain:
    """Map a stored domain into memory and call it ``name``.

    Raises:
        DataError: a file of the entry is missing or damaged.
        PermissionError: the entry is another account's.
    """
    try:
        about = json.loads((entry / "domain.json").read_text())
        interactions = _map(entry / "interactions.arrow")
        users, items = _map(entry / "users.arrow"), _map(entry / "items.arrow")
        lengths = users["length"].to_numpy()
        return Domain(
            name=name,
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            items=_array(interactions["item"]),
            times=_array(interactions["time"]) if "time" in interactions else None,
            titles=items["title"].to_pylist(),
            texts=items["text"].to_pylist(),
            user_keys=users["key"].to_pylist(),
            item_keys=items["key"].to_pylist(),
            fingerprint=about["fingerprint"],
            card=replace(DataCard.from_dict(about["card"]), name=name),
        )
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{entry}: damaged cache entry ({error}); delete the folder, it will be made again") from error


def _write(path: Path, columns: Mapping[str, pa.Array]) -> None:
    """One record batch a file, so that a column of numbers is one piece of mapped memory."""
    batch = pa.record_batch(dict(columns))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _map(path: Path) -> dict[str, pa.ChunkedArray]:
    """Columns of an Arrow file, memory-mapped by ``datasets``."""
    from datasets import Dataset

    table = Dataset.from_file(str(path)).data
    return {name: table.column(name) for name in table.column_names}


def _array(column: pa.ChunkedArray) -> np.ndarray:
    return column.chunk(0).to_numpy(zero_copy_only=True)
