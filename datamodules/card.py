"""The data card: what came in, which rule dropped or changed how much, what is left."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from typing import Any

import numpy as np
from rich.table import Table

#: Titles longer than this, in characters, are counted as long.
LONG_TITLE = 200

#: What each counted rule does, in the order in which the rules run. Readers add rules of their own.
RULES = {
    "rows_without_id_or_order": "rows without user, item or order: dropped",
    "items_listed_twice": "items listed more than once: the first line is kept",
    "users_out_of_range": "users outside user_range: dropped",
    "users_out_of_fold": "users outside user_fold: dropped",
    "items_not_sold": "interactions with items outside item_share: dropped",
    "unknown_items": "interactions with items that are not in the items table: dropped",
    "users_sorted": "users whose rows were not in time order: sorted, ties keep source order",
    "duplicates": "rows equal in user, item and order: the first is kept",
    "users_without_interactions": "users whose every interaction was dropped by the rules before the k-core: dropped",
    "kcore_users": "users under k interactions: dropped by the k-core",
    "kcore_items": "items under k interactions: dropped by the k-core",
    "kcore_interactions": "interactions dropped by the k-core",
    "users_not_drawn": "users not in the seeded subset max_users: dropped",
    "items_without_interactions": "items that nobody (left) has interacted with: dropped",
    "titles_missing": "items without a title: named 'untitled <source id>'",
}

#: those that drop nothing
_DROP_NOTHING = frozenset({"users_sorted", "titles_missing"})


def dropped(rules: Mapping[str, int]) -> str:
    """What the rules have dropped so far, as the end of an error that too little is left; empty where nothing was.

    Args:
        rules: count by rule, also of a reader's own, which only leave out.
    """
    counts = {rule: count for rule, count in rules.items() if count and rule not in _DROP_NOTHING}
    words = [f"{count:,} {RULES.get(rule, rule.replace('_', ' ')).partition(':')[0]}" for rule, count in counts.items()]
    return f" (dropped before: {'; '.join(words)})" if words else ""


@dataclass(frozen=True)
class Statistics:
    """Counts and shape of a set of interactions; lengths are interactions per user."""

    users: int
    items: int
    interactions: int
    density: float
    mean_length: float
    median_length: float
    max_length: int
    min_length: int
    min_item_count: int
    first: str | None = None
    last: str | None = None

    @classmethod
    def of(cls, users: np.ndarray, items: np.ndarray, times: np.ndarray | None) -> "Statistics":
        """Measure parallel arrays (M,) of user codes, item codes and, where known, times in seconds."""
        lengths, counts = np.bincount(users), np.bincount(items)
        lengths, counts = lengths[lengths > 0], counts[counts > 0]
        if len(lengths) == 0:
            return cls(0, 0, 0, 0.0, 0.0, 0.0, 0, 0, 0)
        return cls(
            users=len(lengths),
            items=len(counts),
            interactions=len(users),
            density=len(users) / (len(lengths) * len(counts)),
            mean_length=float(lengths.mean()),
            median_length=float(np.median(lengths)),
            max_length=int(lengths.max()),
            min_length=int(lengths.min()),
            min_item_count=int(counts.min()),
            first=_day(times.min()) if times is not None else None,
            last=_day(times.max()) if times is not None else None,
        )


@dataclass(frozen=True)
class TitleStatistics:
    """What the titles are like; shares are of items, lengths in characters."""

    mean_length: float
    max_length: int
    long_share: float
    shared_share: float
    non_latin_share: float


@dataclass(frozen=True)
class DataCard:
    """What stands behind a domain.

    Attributes:
        name: domain name.
        order: ``"timestamp"``, ``"position"`` or ``"none"``.
        k_core: k, 0 = off.
        rules: count by rule, see :data:`RULES`; rules of the reader come first.
        before: statistics of the source.
        after: statistics of what is used.
        tied_share: share of interactions that have the same time as the one before, within a user.
        repeat_share: share of interactions with an item the user had already interacted with.
        titles: lengths of the titles, and shares of those over 200 characters (prompts and text encoders cut them), of
            those another item has too, and of those with a letter outside Latin script.
    """

    name: str
    order: str
    k_core: int
    rules: dict[str, int]
    before: Statistics
    after: Statistics
    tied_share: float
    repeat_share: float
    titles: TitleStatistics

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataCard":
        """Inverse of :meth:`to_dict`."""
        parts = {
            "before": Statistics(**values["before"]),
            "after": Statistics(**values["after"]),
            "titles": TitleStatistics(**values["titles"]),
        }
        return cls(**{**values, **parts})

    def __rich__(self) -> Table:
        order = "in the order of its rows" if self.order == "none" else f"by {self.order}"
        table = Table(title=f"Data card: {self.name} ({order}, {self.k_core}-core)", title_justify="left")
        table.add_column("")
        table.add_column("source", justify="right")
        table.add_column("used", justify="right")
        for item in fields(Statistics):
            before, after = getattr(self.before, item.name), getattr(self.after, item.name)
            if before is not None:
                table.add_row(item.name.replace("_", " "), _cell(before), _cell(after))
        table.add_section()
        for rule, count in self.rules.items():
            if count:
                table.add_row(RULES.get(rule, rule.replace("_", " ")), _cell(count), "")
        table.add_section()
        shares = {
            "same time as the one before": self.tied_share,
            "item interacted with before": self.repeat_share,
            f"titles over {LONG_TITLE} characters": self.titles.long_share,
            "titles another item has too": self.titles.shared_share,
            "titles with letters outside Latin script": self.titles.non_latin_share,
        }
        for label, share in shares.items():
            table.add_row(label, "", f"{share:.1%}")
        table.add_row(
            "title length, mean / max characters", "", f"{self.titles.mean_length:.0f} / {self.titles.max_length}"
        )
        return table


def _day(seconds: Any) -> str:
    try:
        return datetime.fromtimestamp(int(seconds), tz=timezone.utc).date().isoformat()
    except (ValueError, OverflowError, OSError):  # not seconds since 1970: shown as it is
        return str(int(seconds))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6f}" if value < 0.1 else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
