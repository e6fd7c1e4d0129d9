"""From raw tables to a :class:`Domain`: stated rules, each counted, all vectorised."""

import hashlib
import json
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_sfubm.datamodules.card import DataCard, Statistics
from lightning_sfubm.datamodules.domain import Domain
from lightning_sfubm.datamodules.readers.base import RawDomain, check_schema, dictionary_ids
from lightning_sfubm.errors import ConfigError, DataError
from lightning_sfubm.evaluation.candidates import normalise_title
from lightning_sfubm.seeds import numpy_generator

LONG_TITLE = 200


@dataclass(frozen=True)
class PreprocessSettings:
    """What decides which interactions remain.

    Attributes:
        k_core: every user and item keeps at least this many interactions; 0 = off.
        user_range: keep users whose source id, an integer, lies in ``[low, high)``; applied before the k-core.
        max_users: size of a seeded subset of users, drawn after the k-core; ``None`` = all.
        seed: of that subset.
    """

    k_core: int = 5
    user_range: tuple[int, int] | None = None
    max_users: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if self.k_core < 0:
            raise ConfigError(f"k_core must be 0 (off) or more, not {self.k_core}")
        if self.max_users is not None and self.max_users < 1:
            raise ConfigError(f"max_users must be at least 1, not {self.max_users}")
        if self.user_range is not None and not self.user_range[0] < self.user_range[1]:
            raise ConfigError(f"user_range must be (low, high) with low < high, not {tuple(self.user_range)}")


def build_domain(raw: RawDomain, name: str, settings: PreprocessSettings) -> Domain:
    """Apply the rules of :data:`lightning_sfubm.datamodules.card.RULES` in their order.

    Raises:
        DataError: a column is missing or has a wrong type, or no interaction is left.
    """
    check_schema(raw)
    rules = dict(raw.notes)

    item_table, item_keys = _items_by_key(raw.items, rules)
    user_codes, item_codes, order, user_keys = _encode(raw, item_keys, rules)
    before = Statistics.of(user_codes, item_codes, order if raw.order_kind == "timestamp" else None)
    num_source_users = before.users

    known = item_codes < len(item_keys)
    rules["unknown_items"] = int(len(known) - known.sum())
    if not known.any():
        raise DataError(f"domain '{name}': none of the interactions' items is in the items table; compare the item ids")
    keep = known
    if settings.user_range is not None:
        inside = _in_range(user_keys, settings.user_range, name)
        rules["users_out_of_range"] = int(len(inside) - inside.sum())
        num_source_users = int(inside.sum())
        keep = known & inside[user_codes]
    if not keep.all():
        user_codes, item_codes = user_codes[keep], item_codes[keep]
        order = order[keep] if order is not None else None

    user_codes, item_codes, order, rules["users_sorted"] = _sort(user_codes, item_codes, order)
    unique = _first_of_duplicates(user_codes, item_codes, order)
    rules["duplicates"] = int(len(unique) - unique.sum())
    if rules["duplicates"]:
        user_codes, item_codes, order = user_codes[unique], item_codes[unique], order[unique]
    rules["users_without_interactions"] = num_source_users - np.count_nonzero(np.bincount(user_codes))

    keep = k_core(user_codes, item_codes, settings.k_core)
    for rule, codes in (("kcore_users", user_codes), ("kcore_items", item_codes)):
        rules[rule] = int(np.count_nonzero(np.bincount(codes)) - np.count_nonzero(np.bincount(codes[keep])))
    rules["kcore_interactions"] = int(len(keep) - keep.sum())
    if not keep.any():
        raise DataError(
            f"domain '{name}': no interaction is left after the rules and the {settings.k_core}-core "
            f"({len(keep):,} before it); lower k_core or check the source"
        )
    if settings.max_users is not None:
        keep, rules["users_not_drawn"] = _draw_users(user_codes, keep, settings.max_users, settings.seed)
    if not keep.all():
        user_codes, item_codes = user_codes[keep], item_codes[keep]
        order = order[keep] if order is not None else None

    users, user_codes = np.unique(user_codes, return_inverse=True)
    counts = np.bincount(item_codes, minlength=len(item_keys))
    used_items = np.flatnonzero(counts)
    rules["items_without_interactions"] = len(item_keys) - len(used_items) - rules["kcore_items"]
    renumber = np.zeros(len(item_keys), dtype=np.int32)
    renumber[used_items] = np.arange(1, len(used_items) + 1)

    items = renumber[item_codes]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user_codes, minlength=len(users)))]).astype(np.int64)
    times = order.astype(np.int64) if raw.order_kind == "timestamp" and order is not None else None
    kept_keys = item_keys.take(pa.array(used_items))
    titles, texts, rules["titles_missing"] = _texts(item_table.take(pa.array(used_items)), kept_keys.to_pylist())
    card = DataCard(
        name=name,
        order=raw.order_kind,
        k_core=settings.k_core,
        rules={rule: int(count) for rule, count in rules.items()},
        before=before,
        after=Statistics.of(user_codes, items, times),
        tied_share=_tied_share(user_codes, times),
        repeat_share=_repeat_share(user_codes, items, len(used_items)),
        **_title_statistics(titles),
    )
    keys = [user_keys.take(pa.array(users)).to_pylist(), ["", *kept_keys.to_pylist()]]
    fingerprint = _fingerprint(settings, offsets, items, times, ["", *titles], ["", *texts], *keys)
    return Domain(name, offsets, items, times, ["", *titles], ["", *texts], *keys, fingerprint, card)


def k_core(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """Mask (M,) of the largest subset in which every user and every item has at least ``k`` interactions.

    The subset is unique, whatever the order in which users and items are removed.
    """
    mask = np.ones(len(users), dtype=bool)
    if k <= 1:
        return mask
    alive = np.arange(len(users))
    while len(alive):
        keep = (np.bincount(users)[users] >= k) & (np.bincount(items)[items] >= k)
        if keep.all():
            break
        mask[alive[~keep]] = False
        alive, users, items = alive[keep], users[keep], items[keep]
    return mask


def _sorted_keys(keys: pa.StringArray) -> tuple[pa.StringArray, np.ndarray]:
    """Distinct keys in order (numeric where all are plain integers), and the sorting indices."""
    sortable = keys
    try:
        numbers = keys.cast(pa.int64())
        if numbers.cast(pa.string()).equals(keys):
            sortable = numbers
    except pa.ArrowInvalid:
        pass
    indices = pc.sort_indices(sortable)
    return keys.take(indices), indices.to_numpy()


def _items_by_key(items: pa.Table, rules: dict[str, int]) -> tuple[pa.Table, pa.StringArray]:
    """One row an item, in key order, and the keys. Rows without a key are dropped, of equal keys the first is kept."""
    ids = dictionary_ids(items.column("item"), "item")
    codes = ids.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    present = np.flatnonzero(codes >= 0)
    used, first = np.unique(codes[present], return_index=True)
    rules["items_listed_twice"] = len(present) - len(used)
    rules["rows_without_id_or_order"] = len(codes) - len(present)
    keys, indices = _sorted_keys(ids.dictionary.take(pa.array(used)))
    return items.drop_columns(["item"]).take(pa.array(present[first][indices])), keys


def _encode(
    raw: RawDomain, item_keys: pa.StringArray, rules: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, pa.StringArray]:
    """Integer codes of users and items, in key order, the order column, and the user keys.

    Items outside ``item_keys`` get codes from ``len(item_keys)`` on.
    """
    users = dictionary_ids(raw.interactions.column("user"), "user")
    items = dictionary_ids(raw.interactions.column("item"), "item")
    order = _order(raw.interactions)
    complete = pc.and_(users.indices.is_valid(), items.indices.is_valid())
    if order is not None:
        complete = pc.and_(complete, order.is_valid())
    incomplete = len(complete) - pc.sum(complete, min_count=0).as_py()
    rules["rows_without_id_or_order"] += incomplete
    user_indices, item_indices = users.indices, items.indices
    if incomplete:
        user_indices, item_indices = user_indices.filter(complete), item_indices.filter(complete)
        order = order.filter(complete) if order is not None else None

    user_keys, indices = _sorted_keys(users.dictionary)
    user_rank = np.empty(len(indices), dtype=np.int32)
    user_rank[indices] = np.arange(len(indices), dtype=np.int32)
    position = pc.index_in(items.dictionary, item_keys).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
    unknown = position < 0
    position[unknown] = len(item_keys) + np.arange(unknown.sum(), dtype=np.int32)
    return (
        user_rank[user_indices.to_numpy()],
        position[item_indices.to_numpy()],
        order.to_numpy() if order is not None else None,
        user_keys,
    )


def _order(interactions: pa.Table) -> pa.Array | None:
    """The order column as int64 or float64 with nulls for what is missing."""
    if "order" not in interactions.column_names:
        return None
    column = interactions.column("order").combine_chunks()
    if pa.types.is_temporal(column.type):
        column = column.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
    if pa.types.is_floating(column.type):
        return pc.if_else(pc.is_nan(column), None, column).cast(pa.float64())
    if not pa.types.is_integer(column.type):
        raise DataError(f"the order column holds {column.type}, but must be a number or a time; convert the column")
    return column.cast(pa.int64())


def _in_range(user_keys: pa.StringArray, bounds: tuple[int, int], name: str) -> np.ndarray:
    try:
        numbers = user_keys.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
        raise DataError(
            f"domain '{name}': user_range needs integer user ids, but found {user_keys[0].as_py()!r}"
        ) from None
    return (numbers >= bounds[0]) & (numbers < bounds[1])


def _sort(
    users: np.ndarray, items: np.ndarray, order: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, int]:
    """Rows by user, then order, ties as in the source; and the number of users whose rows were out of order."""
    if np.any(users[1:] < users[:-1]):
        indices = np.argsort(users, kind="stable")
        users, items = users[indices], items[indices]
        order = order[indices] if order is not None else None
    if order is None:
        return users, items, None, 0
    backwards = (order[1:] < order[:-1]) & (users[1:] == users[:-1])
    if not backwards.any():
        return users, items, order, 0
    unsorted = len(np.unique(users[1:][backwards]))
    indices = np.lexsort((order, users))
    return users[indices], items[indices], order[indices], unsorted


def _first_of_duplicates(users: np.ndarray, items: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Mask of rows to keep: of rows equal in user, item and order, the first. Rows are sorted by user and order.

    Without an order column two equal rows are two interactions, so nothing is dropped.
    """
    keep = np.ones(len(users), dtype=bool)
    if order is None or len(users) < 2:
        return keep
    tied = (users[1:] == users[:-1]) & (order[1:] == order[:-1])
    rows = np.flatnonzero(np.concatenate([tied, [False]]) | np.concatenate([[False], tied]))
    if len(rows) == 0:
        return keep
    run = np.cumsum(np.concatenate([[True], ~tied]))[rows].astype(np.int64)
    _, first = np.unique(run * (int(items.max()) + 1) + items[rows], return_index=True)
    keep[rows] = False
    keep[rows[first]] = True
    return keep


def _draw_users(users: np.ndarray, keep: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, int]:
    """Restrict ``keep`` to a seeded subset of users; a larger count contains a smaller one."""
    candidates = np.unique(users[keep])
    if count >= len(candidates):
        return keep, 0
    drawn = np.zeros(int(users.max()) + 1, dtype=bool)
    drawn[numpy_generator(seed, "max_users").permutation(candidates)[:count]] = True
    return keep & drawn[users], len(candidates) - count


def _texts(items: pa.Table, keys: list[str]) -> tuple[list[str], list[str], int]:
    """Titles, texts and the number of items without a title. White space is collapsed, control characters removed."""
    columns = {name: [_plain(cell) for cell in items.column(name).to_pylist()] for name in items.column_names}
    titles = columns.pop("title")
    missing = sum(not title for title in titles)
    names = [title or f"untitled {key}" for title, key in zip(titles, keys, strict=True)]
    others = zip(*columns.values(), strict=True) if columns else [()] * len(titles)
    texts = [". ".join(part for part in (title, *other) if part) for title, other in zip(titles, others, strict=True)]
    return names, [text or name for text, name in zip(texts, names, strict=True)], missing


def _plain(cell: object) -> str:
    if cell is None:
        return ""
    text = ", ".join(map(str, cell)) if isinstance(cell, (list, tuple)) else str(cell)
    return " ".join("".join(c if c.isprintable() else " " for c in text.replace("|", ", ")).split())


def _tied_share(users: np.ndarray, times: np.ndarray | None) -> float:
    if times is None:
        return 0.0
    return float(np.sum((users[1:] == users[:-1]) & (times[1:] == times[:-1])) / len(users))


def _repeat_share(users: np.ndarray, items: np.ndarray, num_items: int) -> float:
    pairs = np.sort(users.astype(np.int64) * (num_items + 1) + items)
    return float(np.sum(pairs[1:] == pairs[:-1]) / len(pairs))


def _title_statistics(titles: list[str]) -> dict[str, float | int]:
    lengths = np.array([len(title) for title in titles])
    shared = Counter(map(normalise_title, titles))
    non_latin = [
        any(
            c.isalpha() and not unicodedata.name(c, "LATIN").startswith(("LATIN", "FEMININE", "MASCULINE", "MICRO"))
            for c in t
        )
        if not t.isascii()
        else False
        for t in titles
    ]
    return {
        "title_mean": float(lengths.mean()),
        "title_max": int(lengths.max()),
        "title_long_share": float((lengths > LONG_TITLE).mean()),
        "title_shared_share": float(sum(n for n in shared.values() if n > 1) / len(titles)),
        "title_non_latin_share": float(np.mean(non_latin)),
    }


def _fingerprint(settings: PreprocessSettings, *content: np.ndarray | list[str] | None) -> str:
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for part in content:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        else:
            digest.update(json.dumps(part).encode())
    return digest.hexdigest()
