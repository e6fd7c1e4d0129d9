"""The data card: what came in, which rule dropped or changed how much, what is left."""

from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from typing import Any

import numpy as np
from rich.table import Table

#: What each counted rule does, in the order in which the rules run. Readers add rules of their own.
RULES = {
    "rows_without_id_or_order": "interactions without user, item or order: dropped",
    "items_listed_twice": "items listed more than once: the first line is kept",
    "titles_missing": "items without a title: named 'untitled <source id>'",
    "unknown_items": "interactions with items that are not in the items table: dropped",
    "users_out_of_range": "users outside user_range: dropped",
    "duplicates": "rows equal in user, item and order: the first is kept",
    "users_sorted": "users whose rows were not in time order: sorted, ties keep source order",
    "kcore_users": "users under k interactions: dropped by the k-core",
    "kcore_items": "items under k interactions: dropped by the k-core",
    "kcore_interactions": "interactions dropped by the k-core",
    "users_not_drawn": "users not in the seeded subset max_users: dropped",
    "items_without_interactions": "items that nobody (left) has interacted with: dropped",
    "users_without_interactions": "users whose every interaction was dropped by the rules before the k-core: dropped",
}


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
        title_mean: mean title length, characters.
        title_max: longest title, characters.
        title_long_share: share of titles over 200 characters; prompts and text encoders cut them.
        title_shared_share: share of items whose normalised title another item has too.
        title_non_latin_share: share of titles with a letter outside Latin script.
    """

    name: str
    order: str
    k_core: int
    rules: dict[str, int]
    before: Statistics
    after: Statistics
    tied_share: float = 0.0
    repeat_share: float = 0.0
    title_mean: float = 0.0
    title_max: int = 0
    title_long_share: float = 0.0
    title_shared_share: float = 0.0
    title_non_latin_share: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DataCard":
        """Inverse of :meth:`to_dict`."""
        return cls(**{**values, "before": Statistics(**values["before"]), "after": Statistics(**values["after"])})

    def __rich__(self) -> Table:
        table = Table(title=f"Data card: {self.name} ({self.order} order, {self.k_core}-core)", title_justify="left")
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
        for name in ("tied_share", "repeat_share", "title_long_share", "title_shared_share", "title_non_latin_share"):
            table.add_row(name.replace("_", " "), "", f"{getattr(self, name):.1%}")
        table.add_row("title length, mean / max characters", "", f"{self.title_mean:.0f} / {self.title_max}")
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
