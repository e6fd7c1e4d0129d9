"""The generic reader: a folder with one interactions table and one items table, CSV or Parquet."""

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_sfubm.access import unreadable
from lightning_sfubm.datamodules.readers.base import RawDomain, existing, fingerprint_files, resolve, row_out_of_range
from lightning_sfubm.datamodules.readers.delimited import Dialect, read_delimited, read_header
from lightning_sfubm.errors import DataError

log = logging.getLogger(__name__)
SUFFIXES = (".csv", ".csv.gz", ".parquet", ".tsv", ".tsv.gz")
#: Columns taken as item text where ``text_columns`` is not set; anything else (an ASIN, say) is no language.
USUAL_TEXT_COLUMNS = ("brand", "category", "categories", "attributes", "year", "genres")
#: Columns taken as order where ``order_column`` is not set, and what they mean.
USUAL_ORDER_COLUMNS = {"timestamp": "timestamp", "pos": "position", "position": "position"}


class TableReader:
    """Reads ``interactions`` (user, item, time or position) and ``items`` (item, title, text columns) of a folder.

    Args:
        folder: folder of the domain, relative to the data root.
        interactions: file in the folder; ``None`` looks for ``interactions`` with a suffix of :data:`SUFFIXES`.
        items: the same for the items.
        user_column: name of the user column.
        item_column: name of the item column, in both tables.
        title_column: name of the title column.
        order_column: time or position; ``None`` takes ``timestamp``, ``pos`` or ``position``, whichever is there, and
            else the row order.
        text_columns: further columns that are language, in reading order; ``None`` takes those of
            :data:`USUAL_TEXT_COLUMNS` that are there, ``[]`` none.
    """

    def __init__(
        self,
        folder: str,
        interactions: str | None = None,
        items: str | None = None,
        user_column: str = "user_id",
        item_column: str = "item_id",
        title_column: str = "title",
        order_column: str | None = None,
        text_columns: list[str] | None = None,
    ) -> None:
        self.folder = folder
        self.interactions = interactions
        self.items = items
        self.user_column = user_column
        self.item_column = item_column
        self.title_column = title_column
        self.order_column = order_column
        self.text_columns = text_columns

    def read(self, root: Path | None) -> RawDomain:
        """Read both tables.

        Raises:
            DataError: a file or column is missing, or a line cannot be read.
        """
        interactions_path, items_path = self._paths(root)
        present = _columns(interactions_path)
        order = self.order_column or next((name for name in USUAL_ORDER_COLUMNS if name in present), None)
        if order is None:
            log.warning(
                "%s has no column %s: the order of its rows is taken for that of time. Its columns are %s; if one of them is "
                "the time, name it by reader.init_args.order_column",
                interactions_path,
                ", ".join(USUAL_ORDER_COLUMNS),
                ", ".join(present),
            )
        interactions = _read(interactions_path, [self.user_column, self.item_column], [], order)
        interactions = interactions.rename_columns(["user", "item", *(["order"] if order else [])])

        present = _columns(items_path)
        texts = self.text_columns
        if texts is None:
            texts = [name for name in USUAL_TEXT_COLUMNS if name in present and name != self.title_column]
        items = _read(items_path, [self.item_column], [self.title_column, *texts], None)
        items = items.rename_columns(["item", "title", *texts])
        kind = USUAL_ORDER_COLUMNS.get(order, "timestamp") if order else "none"
        return RawDomain(interactions, items, kind)

    def fingerprint(self, root: Path | None) -> str:
        """sha256 of both files and the settings."""
        paths = self._paths(root)
        settings = {
            name: value for name, value in vars(self).items() if name not in ("folder", "interactions", "items")
        }
        return fingerprint_files(list(paths), {"reader": "table", "suffixes": [p.suffix for p in paths], **settings})

    def _paths(self, root: Path | None) -> tuple[Path, Path]:
        folder = resolve(root, self.folder)
        return _find(folder, "interactions", self.interactions), _find(folder, "items", self.items)


def _find(folder: Path, stem: str, name: str | None) -> Path:
    if name is not None:
        return existing(folder / name, f"{stem} file")
    for suffix in SUFFIXES:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise DataError(
        f"{folder}: no {stem} file here (looked for {stem} with {', '.join(SUFFIXES)}); check the data root"
    )


def _dialect(path: Path, multiline: bool) -> Dialect:
    return Dialect(delimiter="\t" if ".tsv" in path.suffixes else ",", multiline=multiline)


def _columns(path: Path) -> list[str]:
    return _parquet_schema(path).names if path.suffix == ".parquet" else read_header(path, _dialect(path, False))


def _parquet_schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except PermissionError as error:
        raise unreadable(path, error) from error
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error


def _read(path: Path, ids: list[str], texts: list[str], order: str | None) -> pa.Table:
    if path.suffix != ".parquet":
        # Only item texts may hold line breaks; without them Arrow cuts the file into blocks and reads in parallel.
        return read_delimited(path, ids=ids, texts=texts, order=order, dialect=_dialect(path, bool(texts)))
    schema = _parquet_schema(path)
    columns = [*ids, *texts, *([order] if order else [])]
    for column in columns:
        if column not in schema.names:
            raise DataError(f"{path}: no column '{column}'; the file has {', '.join(schema.names)}")
    try:
        table = pq.read_table(path, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: damaged Parquet file ({error}); fetch it again") from error
    if order and (row := row_out_of_range(table.column(order))) is not None:
        value = table.column(order)[row]
        raise DataError(f"{path}, row {row + 1}: column '{order}' holds {value}, which is no number within 64 bits")
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        _name_bad_text(table, path)
        raise DataError(f"{path}: damaged Parquet file ({error}); fetch it again") from error
    return table


def _name_bad_text(table: pa.Table, path: Path) -> None:
    """Raise for the first cell of each column that is no UTF-8: Parquet does not check it."""
    for name in table.column_names:
        for row, cell in enumerate(table.column(name), start=1):
            try:
                cell.as_py()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, row {row}: column '{name}' holds text that is not valid utf-8") from error
