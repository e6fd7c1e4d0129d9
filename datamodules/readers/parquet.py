"""Parquet tables into Arrow, with the types that later steps take: bytes become text, times written as text are parsed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_sfubm.access import unreadable
from lightning_sfubm.datamodules.readers.base import (
    check_columns,
    existing,
    is_id_type,
    is_order_type,
    is_text_type,
    row_out_of_range,
    value_type,
)
from lightning_sfubm.datamodules.readers.delimited import ORDER_TYPES, fits, misfit
from lightning_sfubm.errors import DataError


def read_parquet(
    path: Path,
    *,
    ids: Sequence[str],
    texts: Sequence[str] = (),
    order: str | None = None,
    options: Mapping[str, str] = MappingProxyType({}),
) -> pa.Table:
    """Read some columns of a Parquet file.

    Args:
        path: of the file.
        ids: columns of keys, integers or strings.
        texts: columns of free text; bytes are read as UTF-8, also within lists.
        order: column of numbers, dates or times, or of text that :func:`read_delimited` takes for these.
        options: setting of the reader that names a column, by column, for the error.

    Returns:
        Table with the named columns.

    Raises:
        DataError: the file is closed to this account or damaged, lacks a column or has it twice, or a column has a type
            or a cell that cannot be used (file, column and row are named).
    """
    existing(path, "file")
    names = read_names(path)
    columns = [*ids, *texts, *([order] if order else [])]
    check_columns(path, columns, names, options)
    try:
        table = pq.read_table(path, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: damaged Parquet file ({error}); fetch it again") from error
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        _name_bad_text(table, path)
        raise DataError(f"{path}: damaged Parquet file ({error}); fetch it again") from error
    for place, name in enumerate(columns):
        column = table.column(place)
        if place < len(ids):
            if not is_id_type(column.type):
                raise DataError(
                    f"{path}: column '{name}' holds {column.type}, but ids must be integers or strings; convert the column"
                )
        elif place < len(ids) + len(texts):
            column = _texts(column, name, path)
        else:
            column = _order(column, name, path)
        table = table.set_column(place, name, column)
    return table


def read_names(path: Path) -> list[str]:
    """Column names of a Parquet file.

    Raises:
        DataError: the file is closed to this account or no Parquet file.
    """
    try:
        return list(pq.read_schema(path).names)
    except PermissionError as error:
        raise unreadable(path, error) from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error


def _texts(column: pa.ChunkedArray, name: str, path: Path) -> pa.ChunkedArray:
    """The column with plain text where it has bytes or views."""
    kind = _with_text(column.type)
    if kind == column.type:
        return column
    try:
        return column.cast(kind)
    except pa.ArrowInvalid as error:
        row = next(row for row, cell in enumerate(column.to_pylist(), start=1) if not _is_utf8(cell))
        raise DataError(
            f"{path}, row {row}: column '{name}' holds bytes that are not valid utf-8; convert the column to text"
        ) from error


def _with_text(kind: pa.DataType) -> pa.DataType:
    """The type with plain text where it has bytes or views, itself where it has none."""
    if pa.types.is_large_binary(kind):
        return pa.large_string()
    is_bytes = pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind) or pa.types.is_binary_view(kind)
    if is_bytes or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = _with_text(kind.value_type)
        if inner != kind.value_type:
            if pa.types.is_dictionary(kind):
                return inner
            return pa.large_list(inner) if pa.types.is_large_list(kind) else pa.list_(inner)
    return kind


def _is_utf8(cell: Any) -> bool:
    if isinstance(cell, list):
        return all(map(_is_utf8, cell))
    if isinstance(cell, bytes):
        try:
            cell.decode()
        except UnicodeDecodeError:
            return False
    return True


def _order(column: pa.ChunkedArray, name: str, path: Path) -> pa.ChunkedArray:
    """The column as numbers or times within 64 bits; text is parsed as that of a CSV is."""
    if is_text_type(value_type(column.type)):
        column = _parsed(column, name, path)
    if not is_order_type(column.type):
        raise DataError(
            f"{path}: column '{name}' holds {column.type}, but must be a number or a time; convert the column"
        )
    if (row := row_out_of_range(column)) is not None:
        raise DataError(
            f"{path}, row {row + 1}: column '{name}' holds {column[row]}, which is no number within 64 bits"
        )
    return column


def _parsed(column: pa.ChunkedArray, name: str, path: Path) -> pa.ChunkedArray:
    cells = column.cast(pa.string())
    cells = pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells)
    for kind in ORDER_TYPES:
        try:
            return cells.cast(kind)
        except pa.ArrowInvalid:
            continue
    kinds: Sequence[pa.DataType] = ORDER_TYPES
    for row, cell in enumerate(cells.to_pylist(), start=1):
        kinds = [kind for kind in kinds if cell is None or fits(cell, kind)]
        if not kinds:
            raise DataError(f"{path}, row {row}: column '{name}' holds {cell[:60]!r}, which is {misfit(cell)}")
    raise DataError(f"{path}: column '{name}' holds text that is neither numbers nor ISO times; convert the column")


def _name_bad_text(table: pa.Table, path: Path) -> None:
    """Raise for the first cell of each column that is no UTF-8: Parquet does not check it."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        for row, cell in enumerate(column, start=1):
            try:
                cell.as_py()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, row {row}: column '{name}' holds text that is not valid utf-8") from error
