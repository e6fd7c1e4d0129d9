"""The generic reader: a folder with one interactions table and one items table, CSV or Parquet."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from lightning_sfubm.datamodules.readers.base import (
    RawDomain,
    check_root,
    existing,
    fingerprint_files,
    is_there,
    listed,
    resolve,
)
from lightning_sfubm.datamodules.readers.delimited import Dialect, read_delimited, read_header
from lightning_sfubm.datamodules.readers.parquet import read_names, read_parquet
from lightning_sfubm.errors import ConfigError, DataError

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
        interactions: file in the folder; ``None`` looks for ``interactions`` with a suffix of :data:`SUFFIXES`, of which
            one may be there.
        items: the same for the items.
        user_column: name of the user column.
        item_column: name of the item column, in both tables.
        title_column: name of the title column.
        order_column: time or position; ``None`` takes ``timestamp``, ``pos`` or ``position``, whichever is there, and
            else the row order. Numbers in a column of another name than ``pos`` and ``position`` are read as seconds
            since 1970; of milliseconds the order is right, but the data card shows numbers for dates.
        text_columns: further columns that are language, in reading order; ``None`` takes those of
            :data:`USUAL_TEXT_COLUMNS` that are there, ``[]`` none.

    Raises:
        ConfigError: a column is named twice.
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
        if order_column is not None:
            _distinct(("user_column", [user_column]), ("item_column", [item_column]), ("order_column", [order_column]))
        _distinct(("title_column", [title_column]), ("text_columns", text_columns or []))
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
        taken = (self.user_column, self.item_column)
        usual = (name for name in USUAL_ORDER_COLUMNS if name in present and name not in taken)
        order = self.order_column or next(usual, None)
        options = {self.user_column: "user_column", self.item_column: "item_column"}
        options |= {order: "order_column"} if order else {}
        interactions = _read(interactions_path, [self.user_column, self.item_column], [], order, options)
        interactions = interactions.rename_columns(["user", "item", *(["order"] if order else [])])
        if order is None:
            log.warning(
                "%s has no column %s: the order of its rows is taken for that of time. Its columns are %s; if one of them is "
                "the time, name it by reader.init_args.order_column",
                interactions_path,
                ", ".join(USUAL_ORDER_COLUMNS),
                listed(present),
            )

        present = _columns(items_path)
        texts = self.text_columns
        if texts is None:
            texts = [name for name in USUAL_TEXT_COLUMNS if name in present and name != self.title_column]
        options = {
            **dict.fromkeys(texts, "text_columns"),
            self.title_column: "title_column",
            self.item_column: "item_column",
        }
        items = _read(items_path, [self.item_column], [self.title_column, *texts], None, options)
        kept = [f"{name} (text)" if name in ("item", "title") else name for name in texts]  # those two have a place
        items = items.rename_columns(["item", "title", *kept])
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
    found = [path for suffix in SUFFIXES if is_there(path := folder / f"{stem}{suffix}")]
    if not found:
        raise DataError(
            f"{folder}: no {stem} file here (looked for {stem} with {', '.join(SUFFIXES)}); {check_root(folder)}"
        )
    if len(found) > 1:  # one may be the other as it was before it was written anew
        raise DataError(
            f"{folder}: holds {' and '.join(path.name for path in found)}; name the one to be read by "
            f"reader.init_args.{stem}, or remove the others"
        )
    return found[0]


def _dialect(path: Path, multiline: bool) -> Dialect:
    return Dialect(delimiter="\t" if ".tsv" in path.suffixes else ",", multiline=multiline)


def _columns(path: Path) -> list[str]:
    return read_names(path) if path.suffix == ".parquet" else read_header(path, _dialect(path, False))


def _read(path: Path, ids: list[str], texts: list[str], order: str | None, options: dict[str, str]) -> pa.Table:
    if path.suffix == ".parquet":
        return read_parquet(path, ids=ids, texts=texts, order=order, options=options)
    # Line breaks are expected in item texts alone; without them Arrow cuts the file into blocks and reads in parallel.
    dialect = _dialect(path, bool(texts))
    return read_delimited(path, ids=ids, texts=texts, order=order, dialect=dialect, options=options)


def _distinct(*given: tuple[str, Sequence[str]]) -> None:
    """Refuse a column that is named twice.

    Args:
        given: settings and the columns each of them names.

    Raises:
        ConfigError: naming the setting and the column.
    """
    taken: dict[str, str] = {}
    for setting, columns in given:
        for column in columns:
            if column in taken:
                again = "a second time" if taken[column] == setting else f"which {taken[column]} names already"
                raise ConfigError(
                    f"{setting} of the table reader names column '{column}', {again}; leave it out or give another one"
                )
            taken[column] = setting
