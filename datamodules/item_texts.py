"""What an item is called and what is said of it, out of the cells of its row."""

import re
import unicodedata
from collections import Counter

import numpy as np
import pyarrow as pa

from lightning_sfubm.datamodules.card import LONG_TITLE, TitleStatistics
from lightning_sfubm.evaluation.parsing import normalise_title

#: Control characters and lone surrogates; joiners, which some scripts need, stay.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


def item_texts(items: pa.Table, keys: list[str]) -> tuple[list[str], list[str], int]:
    """Titles, texts and the number of items without a title. White space is collapsed, control characters removed.

    Args:
        items: the columns ``title`` and further ones, in reading order, of n items.
        keys: their n ids; an item without a title is called by it.
    """
    columns = {name: [_plain(cell) for cell in items.column(name).to_pylist()] for name in items.column_names}
    titles = columns.pop("title")
    missing = sum(not title for title in titles)
    names = [title or f"untitled {key}" for title, key in zip(titles, keys, strict=True)]
    others = zip(*columns.values(), strict=True) if columns else [()] * len(titles)
    texts = [". ".join(part for part in (title, *other) if part) for title, other in zip(titles, others, strict=True)]
    return names, [text or name for text, name in zip(texts, names, strict=True)], missing


def _plain(cell: object) -> str:
    """One line of text: lists joined by commas without what is missing, whole numbers without their ``.0``."""
    if isinstance(cell, (list, tuple)):
        text = ", ".join(_written(part) for part in cell if not _is_missing(part))
    else:
        text = "" if _is_missing(cell) else _written(cell)
    return " ".join(_CONTROL.sub(" ", text.replace("|", ", ")).split())


def _is_missing(value: object) -> bool:
    return value is None or value != value  # NaN, of whatever type


def _written(value: object) -> str:
    """The value as a person writes it: a year that a table of numbers holds as 1995.0 is 1995."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else str(value)


def title_statistics(titles: list[str]) -> TitleStatistics:
    """Lengths of titles, how many share one, and how many are in another script than Latin."""
    lengths = np.array([len(title) for title in titles])
    shared = Counter(map(normalise_title, titles))
    return TitleStatistics(
        mean_length=float(lengths.mean()),
        max_length=int(lengths.max()),
        long_share=float((lengths > LONG_TITLE).mean()),
        shared_share=sum(count for count in shared.values() if count > 1) / len(titles),
        non_latin_share=sum(map(_has_non_latin, titles)) / len(titles),
    )


def _has_non_latin(title: str) -> bool:
    """Whether a letter of the title belongs to a script other than Latin."""
    return not title.isascii() and any(c.isalpha() and "LATIN" not in unicodedata.name(c, "LATIN") for c in title)
