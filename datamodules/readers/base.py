"""What a reader gives: two Arrow tables, checked once, whatever the files looked like."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc

from lightning_sfubm.access import unreadable
from lightning_sfubm.errors import DataError

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@dataclass(frozen=True)
class RawDomain:
    """One domain as its source has it, before any rule is applied.

    Attributes:
        interactions: columns ``user`` and ``item`` (integer, string or dictionary-encoded string) and, optionally,
            ``order`` (integer, float, date or timestamp). Rows with equal order keep the order they have here.
        items: columns ``item``, ``title`` and any further text columns, in the order in which they are to be read.
        order_kind: ``"timestamp"`` (numbers are seconds since 1970), ``"position"`` or ``"none"`` (row order is the
            order).
        notes: what the reader itself left out, by rule name; shown in the data card.
    """

    interactions: pa.Table
    items: pa.Table
    order_kind: str
    notes: dict[str, int] = field(default_factory=dict)


@runtime_checkable
class Reader(Protocol):
    """Reads one domain. Any object with these two methods can be named by ``class_path`` in a config.

    Example:
        >>> raw = TableReader("beauty").read(Path("data"))
        >>> raw.interactions.column_names
        ['user', 'item', 'order']
    """

    def read(self, root: Path | None) -> RawDomain:
        """Read the domain; ``root`` is the folder that relative paths of the reader start from."""
        ...

    def fingerprint(self, root: Path | None) -> str:
        """Hash of the source content and of every setting that changes what :meth:`read` returns."""
        ...


def resolve(root: Path | None, *parts: str) -> Path:
    """Join ``root`` (or the working directory) and relative parts; an absolute part wins."""
    return Path(root or ".").expanduser().joinpath(*(Path(part).expanduser() for part in parts))


def is_there(path: Path) -> bool:
    """Whether ``path`` is a file.

    Raises:
        DataError: this account may not look for it.
    """
    try:
        return path.is_file()
    except PermissionError as error:
        raise unreadable(path, error) from error


def existing(path: Path, what: str) -> Path:
    """Return ``path`` if it is a file.

    Raises:
        DataError: there is no such file, or this account may not look for it.
    """
    if not is_there(path):
        raise DataError(f"{path}: there is no such {what}; {check_root(path.parent)} and the reader's file settings")
    return path


def check_root(folder: Path) -> str:
    """Advice where a file is missing: of a relative folder that is not there, from where it is looked for."""
    if folder.is_absolute() or folder.is_dir():
        return "check the data root"
    return "a relative data root starts from the folder that the command is run in (for an audit, where fit was run): check it"


def listed(names: Sequence[str]) -> str:
    """Names of columns for a message; bytes that are no text of the file's encoding are escaped, so that it can be printed."""
    return ", ".join(names).encode("utf-8", "backslashreplace").decode()


def check_columns(path: Path, columns: Sequence[str], present: Sequence[str], options: Mapping[str, str]) -> None:
    """Refuse a table that lacks a column, or has it twice: which one is meant would be a guess.

    Args:
        path: of the table.
        columns: those that are wanted.
        present: those of the table.
        options: setting of the reader that names a column, by column; of others no setting is told.

    Raises:
        DataError: naming file and column.
    """
    for column in columns:
        option = f"name another one by reader.init_args.{options[column]}" if column in options else ""
        if column not in present:
            found = f"{listed(present)[:200]}{option and f'; {option}'}" if present else "no columns"
            raise DataError(f"{path}: no column '{column}'; the file has {found}")
        if (times := present.count(column)) > 1:
            way_out = f"rename all but one{option and f', or {option}'}"
            raise DataError(f"{path}: {times} columns are called '{column}'; {way_out}")


def fingerprint_files(paths: list[Path], settings: dict[str, Any]) -> str:
    """sha256 over the bytes of ``paths`` and the JSON form of ``settings``.

    Raises:
        DataError: a file may not be read.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for path in paths:
        try:
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except PermissionError as error:
            raise unreadable(path, error) from error
        digest.update(b"\x00")
    return digest.hexdigest()


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values, encoded by a dictionary or not."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text_type(kind: pa.DataType) -> bool:
    """Whether a type holds text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_id_type(kind: pa.DataType) -> bool:
    """Whether :func:`dictionary_ids` takes a column of this type."""
    return pa.types.is_integer(value_type(kind)) or is_text_type(value_type(kind))


def is_order_type(kind: pa.DataType) -> bool:
    """Whether :func:`order_values` takes a column of this type."""
    is_time = pa.types.is_date(kind) or pa.types.is_timestamp(kind)
    return is_time or pa.types.is_integer(kind) or pa.types.is_floating(kind)


def dictionary_ids(column: pa.ChunkedArray, name: str) -> pa.DictionaryArray:
    """Turn an id column into one dictionary array of strings, so that every source is keyed in the same way.

    Args:
        column: integers, strings, or dictionary-encoded strings.
        name: how the column is called in the error.

    Returns:
        ``dictionary<int32, string>``, each string once; nulls and empty strings, which name nobody, as null indices.

    Raises:
        DataError: the column has another type.
    """
    kind = value_type(column.type)
    if not is_id_type(kind):
        raise DataError(f"column '{name}' holds {kind}, but ids must be integers or strings; convert the column")
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.string())
    if column.num_chunks == 0:
        column = pa.chunked_array([pa.array([], type=kind)])
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    single = column.unify_dictionaries().combine_chunks() if column.num_chunks > 1 else column.chunk(0)
    if isinstance(single, pa.ChunkedArray):
        single = single.chunk(0)
    names = single.dictionary.cast(pa.string())
    ids = pa.DictionaryArray.from_arrays(single.indices.cast(pa.int32()), names)
    if names.null_count or pc.count_distinct(names).as_py() < len(names) or pc.any(pc.equal(names, "")).as_py():
        plain = ids.cast(pa.string())
        ids = pc.if_else(pc.equal(plain, ""), pa.scalar(None, pa.string()), plain).dictionary_encode()
    return ids


def order_values(column: pa.ChunkedArray) -> tuple[pa.Array, int]:
    """Turn an order column into numbers, in its own resolution.

    Args:
        column: integers, floats, dates or timestamps (UTC where they have no zone).

    Returns:
        int64 or float64 with nulls for what is missing, and how many units make a second.

    Raises:
        DataError: the column has another type, or holds a number beyond 64-bit integers.
    """
    if not is_order_type(column.type):
        raise DataError(f"the order column holds {column.type}, but must be a number or a time; convert the column")
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s"), safe=False)
    per_second = 1
    if pa.types.is_timestamp(column.type):
        per_second = _PER_SECOND[column.type.unit]
        column = column.cast(pa.int64())
    if (row := row_out_of_range(column)) is not None:
        raise DataError(f"the order column holds {column[row]} in row {row + 1}, which is beyond 64-bit integers")
    if pa.types.is_floating(column.type):
        values = column.combine_chunks().cast(pa.float64())
        return pc.if_else(pc.is_nan(values), None, values), per_second
    return column.combine_chunks().cast(pa.int64()), per_second


def row_out_of_range(column: pa.ChunkedArray) -> int | None:
    """Row, from 0, of the first number of an order column that no 64-bit integer can hold (infinity, say)."""
    if not (pa.types.is_floating(column.type) or pa.types.is_uint64(column.type)):
        return None
    row: int = pc.index(pc.greater_equal(pc.abs(column.cast(pa.float64(), safe=False)), 2.0**63), True).as_py()
    return row if row >= 0 else None


def check_schema(raw: RawDomain) -> None:
    """Refuse a raw domain whose tables do not have the columns every later step relies on.

    Raises:
        DataError: a column is missing, the order column is no number, or a table is empty.
    """
    for table, columns, what in (
        (raw.interactions, ("user", "item"), "interactions"),
        (raw.items, ("item", "title"), "items"),
    ):
        for column in columns:
            if column not in table.column_names:
                raise DataError(f"the {what} table has no column '{column}'; it has {', '.join(table.column_names)}")
        if table.num_rows == 0:
            raise DataError(f"the {what} table holds no rows; check the source file")
    if (raw.order_kind != "none") != ("order" in raw.interactions.column_names):
        raise DataError(f"order kind '{raw.order_kind}' does not fit the columns of the interactions table")
