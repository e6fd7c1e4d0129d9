"""Amazon reviews (UCSD releases of 2014, 2018 and 2023): JSON lines, streamed, plain or gzipped."""

import ast
import gzip
import html
import json
import re
import reprlib
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from lightning_sfubm.access import unreadable
from lightning_sfubm.datamodules.readers.base import RawDomain, existing, fingerprint_files, resolve
from lightning_sfubm.errors import ConfigError, DataError

Version = Literal["2014", "2018", "2023"]
#: Years 1 to 9999 in seconds since 1970: first, and first beyond.
_TIMES = (-62_135_596_800, 253_402_300_800)
#: A tag or comment; "<" before anything but a name is a sign ("I <3 you").
_TAG = re.compile(r"</?[A-Za-z!][^>]{0,200}>")


@dataclass(frozen=True)
class _Fields:
    """Names of the fields of one release; ``scale`` divides its time into seconds."""

    user: str
    item: str
    time: str
    texts: tuple[str, ...]
    scale: int = 1


_FIELDS = {
    "2014": _Fields("reviewerID", "asin", "unixReviewTime", ("brand", "categories")),
    "2018": _Fields("reviewerID", "asin", "unixReviewTime", ("brand", "category")),
    "2023": _Fields("user_id", "parent_asin", "timestamp", ("store", "categories"), scale=1000),
}


class AmazonReader:
    """Reads a category's reviews and metadata; every review counts as an interaction, whatever its rating.

    Metadata of items nobody reviewed is skipped while streaming. Titles are HTML-unescaped and stripped of tags. The
    2014 metadata comes as Python literals, one a line; these are read with :func:`ast.literal_eval`, never ``eval``.

    Args:
        version: release, which decides the field names.
        reviews: reviews file, relative to the data root.
        metadata: metadata file, relative to the data root.
    """

    def __init__(self, version: Version, reviews: str, metadata: str) -> None:
        if version not in _FIELDS:
            raise ConfigError(f"version must be one of {', '.join(_FIELDS)}, not {version!r}")
        self.version = version
        self.reviews = reviews
        self.metadata = metadata

    def read(self, root: Path | None) -> RawDomain:
        """Stream both files.

        Raises:
            DataError: a file is missing, closed to this account or no readable gzip; a line is no JSON object, lacks a
                field, or holds a time outside the years 1 to 9999 or an id with half a surrogate pair.
        """
        fields = _FIELDS[self.version]
        users: dict[str, int] = {}
        items: dict[str, int] = {}
        user_codes, item_codes, times = array("i"), array("i"), array("d")
        first, beyond = (bound * fields.scale for bound in _TIMES)
        path = resolve(root, self.reviews)
        for number, record in _records(path):
            user = _field(record, fields.user, str, path, number)
            item = _field(record, fields.item, str, path, number)
            time = _field(record, fields.time, (int, float), path, number)
            if not first <= time < beyond:
                raise DataError(
                    f"{path}, line {number}: field '{fields.time}' holds {time}, which lies outside the years 1 to "
                    "9999; is this the right release of the data?"
                )
            times.append(time)
            user_codes.append(users.setdefault(user, len(users)))
            item_codes.append(items.setdefault(item, len(items)))
        interactions = pa.table(
            {
                "user": _dictionary(user_codes, users),
                "item": _dictionary(item_codes, items),
                "order": pa.array(np.array(times) / fields.scale),
            }
        )

        columns: dict[str, list[str | None]] = {name: [] for name in ("item", "title", *fields.texts)}
        skipped = 0
        path = resolve(root, self.metadata)
        for number, record in _records(path):
            item = _field(record, fields.item, str, path, number)
            if item not in items:
                skipped += 1
                continue
            columns["item"].append(item)
            for name in ("title", *fields.texts):
                columns[name].append(clean(record.get(name)))
        table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
        return RawDomain(interactions, table, "timestamp", {"metadata_of_items_without_reviews": skipped})

    def fingerprint(self, root: Path | None) -> str:
        """sha256 of both files and the release."""
        paths = [existing(resolve(root, name), "file") for name in (self.reviews, self.metadata)]
        return fingerprint_files(paths, {"reader": "amazon", "version": self.version})


def clean(value: Any) -> str | None:
    """Plain text of a metadata value: HTML unescaped, tags removed, (nested) lists joined with commas.

    Half a surrogate pair, where a text was cut off within an emoji, is dropped: it is no character.
    """
    if isinstance(value, (list, tuple)):
        flat: dict[str, None] = {}
        stack = list(reversed(value))
        while stack:
            head = stack.pop()
            if isinstance(head, (list, tuple)):
                stack.extend(reversed(head))
            elif text := clean(head):
                flat[text] = None
        return ", ".join(flat) or None
    if not isinstance(value, str):
        return None
    if not value.isascii():
        value = value.encode("utf-8", "ignore").decode()
    return " ".join(_TAG.sub(" ", html.unescape(value)).split()) or None


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each non-empty line."""
    existing(path, "file")
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line := line.strip():
                    yield number, _parse(line, path, number)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error, f"{path}, after line {number}") from error


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except RecursionError:
        raise DataError(
            f"{path}, line {number}: lists or objects nested too deeply to be a review or an item"
        ) from None
    except ValueError:
        try:
            record = ast.literal_eval(line.decode())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise DataError(f"{path}, line {number}: no complete JSON object (is the file truncated?)") from None
    if not isinstance(record, dict):
        raise DataError(f"{path}, line {number}: a {type(record).__name__} where a JSON object is expected")
    return record


def _field(record: dict[str, Any], name: str, kind: type | tuple[type, ...], path: Path, number: int) -> Any:
    value = record.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = (
            f"holds {reprlib.repr(value)}"
            if name in record
            else f"is missing (fields: {', '.join(map(str, record))[:200]})"
        )
        raise DataError(f"{path}, line {number}: field '{name}' {found}; is this the right release of the data?")
    return _checked(value, name, path, number) if isinstance(value, str) else value


def _checked(text: str, name: str, path: Path, number: int) -> str:
    """The text, if it can be written as UTF-8."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{path}, line {number}: field '{name}' holds half a surrogate pair, which is no character "
                f"({reprlib.repr(text)}); mend or drop the line"
            ) from None
    return text


def _dictionary(codes: "array[int]", keys: dict[str, int]) -> pa.DictionaryArray:
    indices = np.frombuffer(codes, dtype=np.int32) if codes else np.empty(0, np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(list(keys), pa.string()))
