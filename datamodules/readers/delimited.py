"""Delimited text (CSV, TSV, ``::``), plain or gzipped, into Arrow: fast path in Arrow, slow path to name the bad line."""

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TextIO, TypeVar

import pyarrow as pa
import pyarrow.csv as pacsv

from lightning_sfubm.access import unreadable
from lightning_sfubm.datamodules.readers.base import check_columns, existing, row_out_of_range
from lightning_sfubm.errors import DataError

ID = pa.dictionary(pa.int32(), pa.string())
TEXT = pa.string()
T = TypeVar("T")
#: Types tried for an order column, in this order; the first that fits the whole column is taken.
ORDER_TYPES = (
    pa.int64(),
    pa.float64(),
    *(pa.timestamp(unit, zone) for zone in (None, "UTC") for unit in ("s", "us", "ns")),
)


@dataclass(frozen=True)
class Dialect:
    """How a delimited file is written.

    Attributes:
        delimiter: column separator; two characters (``::``) are allowed.
        names: column names of a file without a header line.
        encoding: text encoding.
        quoted: whether cells may be quoted with ``"``.
        multiline: whether quoted cells are expected to hold line breaks. Where they do unexpectedly, a file of several
            blocks is read twice.
    """

    delimiter: str = ","
    names: tuple[str, ...] | None = None
    encoding: str = "utf-8"
    quoted: bool = True
    multiline: bool = False


def read_delimited(
    path: Path,
    *,
    ids: Sequence[str],
    texts: Sequence[str] = (),
    order: str | None = None,
    dialect: Dialect = Dialect(),
    options: Mapping[str, str] = MappingProxyType({}),
) -> pa.Table:
    """Read some columns of a delimited file.

    Args:
        path: ``.gz`` is decompressed.
        ids: columns of keys, read as dictionary-encoded strings.
        texts: columns of free text; empty cells become null.
        order: column of integers, floats or ISO times. Times with ``Z`` or an offset become UTC; a column has one in
            every row or in none.
        dialect: how the file is written.
        options: setting of the reader that names a column, by column, for the error.

    Returns:
        Table with the named columns.

    Raises:
        DataError: the file is missing, closed to this account or no readable gzip, lacks a column or has it twice, holds
            no rows, or has a bad line or a quoted cell that does not close (the line is named).
    """
    existing(path, "file")
    columns = [*ids, *texts, *([order] if order else [])]
    header = read_header(path, dialect)
    alone = len(header) == 1  # another delimiter, not another name
    try:
        check_columns(path, columns, header, {} if alone else options)
    except DataError as error:
        _guard(path, partial(_drain, path, dialect))
        if _undecodable(header):
            raise DataError(f"{path}, line 1: text is not valid {dialect.encoding}") from None
        if alone:
            raise DataError(f"{error}; columns must be parted by {dialect.delimiter!r}") from None
        raise
    types: dict[str, pa.DataType] = {**dict.fromkeys(ids, ID), **dict.fromkeys(texts, TEXT)}
    failure: Exception | None = None
    for order_type in ORDER_TYPES if order else (None,):
        try:
            tried = types | ({order: order_type} if order else {})
            table, missing = _guard(path, partial(_read, path, dialect, tried, columns))
        except pa.ArrowInvalid as error:
            failure = error
            # A cell that is not of this type may be of the next one; a line of another shape fits none.
            if str(error).startswith("In CSV column"):
                continue
            break
        if order and row_out_of_range(table.column(order)) is not None:
            break
        if not table.num_rows:
            raise _no_rows(path)
        if missing:
            _guard(path, partial(_check_quotes, path, dialect, missing))
        return table
    if failure is not None and dialect.quoted and not dialect.multiline:
        # Where a quoted cell holds a line break, a block of the file may have ended within it.
        return read_delimited(
            path, ids=ids, texts=texts, order=order, dialect=replace(dialect, multiline=True), options=options
        )
    _guard(path, lambda: _name_bad_line(path, dialect, header, order))
    if "Empty CSV file" in str(failure):  # what Arrow calls a header that no line break ends
        raise _no_rows(path) from failure
    raise DataError(f"{path}: cannot be read as delimited text ({str(failure).splitlines()[0]})") from failure


def read_header(path: Path, dialect: Dialect) -> list[str]:
    """Column names of a delimited file.

    Raises:
        DataError: the file cannot be read or decompressed, or is written in UTF-16 where another encoding is expected.
    """
    if dialect.names:
        return list(dialect.names)

    def first_row() -> list[str]:
        with _open(path, dialect) as file:
            return next(_rows(file, path, dialect), (0, []))[1]

    header = _guard(path, first_row)
    start = "".join(header)
    # By its byte order mark, or by the empty byte of each letter.
    if start.startswith(("\udcff\udcfe", "\udcfe\udcff")) or "\0" in start:
        raise DataError(f"{path}: is not {dialect.encoding} text but looks like UTF-16; save it as {dialect.encoding}")
    return header


def _no_rows(path: Path) -> DataError:
    return DataError(f"{path}: holds no rows; check the source file")


def _undecodable(row: list[str]) -> bool:
    """Whether a row has bytes that are not valid in the encoding."""
    return any("\udc80" <= character <= "\udcff" for cell in row for character in cell)


def _guard(path: Path, action: Callable[[], T]) -> T:
    """Run an action on a file and turn failures to read or decompress it into one sentence."""
    try:
        return action()
    except (EOFError, zlib.error, OSError) as error:
        raise unreadable(path, error) from error


def _open(path: Path, dialect: Dialect) -> TextIO:
    """Open for the slow path; bytes that are not valid in the encoding survive as surrogates and are found later."""
    binary = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # noqa: SIM115 - closed by callers
    encoding = "utf-8-sig" if dialect.encoding == "utf-8" else dialect.encoding
    return io.TextIOWrapper(binary, encoding=encoding, errors="surrogateescape", newline="")


def _drain(path: Path, dialect: Dialect) -> None:
    """Decompress to the end: a damaged gzip file shows in its checksum, not in the text that comes out of it."""
    with _open(path, dialect) as file:
        while file.read(1 << 20):
            pass


def _rows(file: TextIO, path: Path, dialect: Dialect) -> Iterator[tuple[int, list[str]]]:
    """Line number (of the row's last line) and cells."""
    delimiter = dialect.delimiter
    lines = (line.replace(delimiter, "\t") for line in file) if len(delimiter) > 1 else file
    rows = csv.reader(
        lines,
        delimiter="	" if len(delimiter) > 1 else delimiter,
        quoting=csv.QUOTE_MINIMAL if dialect.quoted else csv.QUOTE_NONE,
        strict=dialect.quoted,
    )
    start = 1
    try:
        for row in rows:
            yield rows.line_num, row
            start = rows.line_num + 1
    except csv.Error as error:
        advice = "; close the quoted cell of this row, and double any quote inside it" if dialect.quoted else ""
        raise DataError(f"{path}, line {start}: {error}{advice}") from error


def _check_quotes(path: Path, dialect: Dialect, missing: int) -> None:
    """Where empty lines do not account for the lines that became no row, walk the file and raise for the first row with a
    quoted cell that does not end where it should.
    """
    with _open(path, dialect) as file:
        if missing == sum(not line.strip("\r\n") for line in file):
            return
    longest = csv.field_size_limit(2**31 - 1)  # what is read otherwise has no limit
    try:
        with _open(path, dialect) as file:
            for _ in _rows(file, path, dialect):
                pass
    finally:
        csv.field_size_limit(longest)


class _Watched(io.RawIOBase):
    """A binary stream that counts its lines on the way and notes whether there are quotes."""

    def __init__(self, source: pa.NativeFile) -> None:
        self._source = source
        self._last = b"\n"
        self.lines = 0
        self.quotes = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._source.read(size)
        self.quotes = self.quotes or b'"' in data
        # The end of the stream ends its last line.
        self.lines += data.count(b"\n") if data else self._last != b"\n"
        self._last = data[-1:] or b"\n"
        return data


def _read(path: Path, dialect: Dialect, types: dict[str, pa.DataType], columns: list[str]) -> tuple[pa.Table, int]:
    """The columns, and, in a file with quotes, how many lines became no row.

    Arrow takes everything up to the next quote for one cell, so a quote left open swallows rows without an error.
    """
    delimiter = dialect.delimiter
    if len(delimiter) > 1:
        with _open(path, dialect) as file:
            source: pa.NativeFile = pa.BufferReader(
                file.read().replace(delimiter, "\t").encode("utf-8", errors="surrogateescape")
            )
        delimiter, encoding = "\t", "utf-8"
    else:
        source = pa.input_stream(str(path), compression="gzip" if path.suffix == ".gz" else None)
        encoding = dialect.encoding
    with source:
        watched = _Watched(source)
        table = pacsv.read_csv(
            watched,
            read_options=pacsv.ReadOptions(
                column_names=list(dialect.names) if dialect.names else None, encoding=encoding, block_size=8 << 20
            ),
            parse_options=pacsv.ParseOptions(
                delimiter=delimiter,
                quote_char='"' if dialect.quoted else False,
                newlines_in_values=dialect.multiline,
            ),
            convert_options=pacsv.ConvertOptions(
                column_types=types, include_columns=columns, null_values=[""], strings_can_be_null=True
            ),
        )
        rows = table.num_rows + (dialect.names is None)
        return table, watched.lines - rows if dialect.quoted and watched.quotes else 0


def _name_bad_line(path: Path, dialect: Dialect, header: list[str], order: str | None) -> None:
    """Walk the file row by row and raise for the first line that Arrow could not have taken."""
    kinds: Sequence[pa.DataType] = ORDER_TYPES
    with _open(path, dialect) as file:
        for number, row in islice(_rows(file, path, dialect), 0 if dialect.names else 1, None):
            where = f"{path}, line {number}"
            if row and len(row) != len(header):
                raise DataError(f"{where}: {len(row)} columns where the header has {len(header)}")
            if _undecodable(row):
                raise DataError(f"{where}: text is not valid {dialect.encoding}")
            if row and order and (cell := row[header.index(order)]):
                kinds = [kind for kind in kinds if fits(cell, kind)]
                if not kinds:
                    raise DataError(f"{where}: column '{order}' holds {cell[:60]!r}, which is {misfit(cell)}")


def misfit(cell: str) -> str:
    """Why a cell of an order column fits none of the types that those before it fit."""
    alone = any(fits(cell, kind) for kind in ORDER_TYPES)
    return "not written like those before it" if alone else "no ISO time and no number within 64 bits"


def fits(cell: str, kind: pa.DataType) -> bool:
    """Whether a cell can be read as a type of :data:`ORDER_TYPES`, within 64 bits."""
    try:
        return row_out_of_range(pa.chunked_array([[cell]]).cast(kind)) is None
    except pa.ArrowInvalid:
        return False
