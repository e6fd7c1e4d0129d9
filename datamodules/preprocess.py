"""From raw tables to a :class:`Domain`: stated rules, each counted, all vectorised."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_sfubm.datamodules.card import DataCard, Statistics, dropped
from lightning_sfubm.datamodules.domain import Domain
from lightning_sfubm.datamodules.item_texts import item_texts, title_statistics
from lightning_sfubm.datamodules.readers.base import RawDomain, check_schema, dictionary_ids, order_values
from lightning_sfubm.errors import ConfigError, DataError
from lightning_sfubm.seeds import numpy_generator


@dataclass(frozen=True)
class PreprocessSettings:
    """What decides which interactions remain.

    Attributes:
        k_core: every user and item keeps at least this many interactions; 0 = off.
        user_range: keep users whose source id, an integer, lies in ``[low, high)``; applied before the k-core.
        user_fold: ``(i, n)``: keep users whose id hashes into fold i of n; folds are disjoint. Before the k-core.
        item_share: keep this share of the items, drawn by a hash of item id and fold: two folds of one source are then
            two shops of a kind, with users of their own and catalogues that overlap. Before the k-core.
        max_users: size of a seeded subset of users, drawn after the k-core; ``None`` = all.
        seed: of that subset.
    """

    k_core: int = 5
    user_range: tuple[int, int] | None = None
    max_users: int | None = None
    seed: int = 1
    user_fold: tuple[int, int] | None = None
    item_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("user_range", "user_fold"):  # a list of two means the same, and has to name the same domain
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.k_core < 0:
            raise ConfigError(f"k_core must be 0 (off) or more, not {self.k_core}")
        if self.max_users is not None and self.max_users < 1:
            raise ConfigError(f"max_users must be at least 1, not {self.max_users}")
        if self.user_range is not None and not self.user_range[0] < self.user_range[1]:
            raise ConfigError(f"user_range must be (low, high) with low < high, not {tuple(self.user_range)}")
        if self.user_fold is not None and not 0 <= self.user_fold[0] < self.user_fold[1]:
            raise ConfigError(f"user_fold must be (i, n) with 0 <= i < n, not {tuple(self.user_fold)}")
        if not 0 < self.item_share <= 1:
            raise ConfigError(f"item_share must lie in (0, 1], not {self.item_share}")

    def described(self) -> dict[str, Any]:
        """The settings as plain values; those that split a source are left out where they are off."""
        values = asdict(self)
        off = {"user_fold": None, "item_share": 1.0}
        return {name: value for name, value in values.items() if name not in off or value != off[name]}


def build_domain(raw: RawDomain, name: str, settings: PreprocessSettings) -> Domain:
    """Apply the rules of :data:`lightning_sfubm.datamodules.card.RULES` in their order.

    Raises:
        DataError: a column is missing or has a wrong type, or no interaction is left.
    """
    rules = dict(raw.notes)
    try:
        check_schema(raw)
        item_table, item_keys = _items_by_key(raw.items, rules)
        rows, user_keys = _encode(raw, item_keys, rules)
    except DataError as error:  # they know of no domain
        raise DataError(f"domain '{name}': {error}") from error
    before = rows.statistics(raw.order_kind)

    if settings.user_range is not None:
        present = np.unique(rows.users)
        inside = np.zeros(len(user_keys), dtype=bool)
        inside[present] = _in_range(user_keys.take(pa.array(present)), settings.user_range, name)
        rules["users_out_of_range"] = int(len(present) - inside.sum())
        rows = rows.where(inside[rows.users])
    if settings.user_fold is not None:
        inside = _in_fold(user_keys, settings.user_fold)
        rules["users_out_of_fold"] = int(np.isin(np.flatnonzero(~inside), rows.users).sum())
        rows = rows.where(inside[rows.users])
    if len(rows.users) == 0:
        raise DataError(
            f"domain '{name}': no interaction has a user, an item and an order (within user_range and user_fold, if set)"
        )
    source_users, known = rows.count("users"), rows.items < len(item_keys)
    rules["unknown_items"] = int(len(known) - known.sum())
    if not known.any():
        raise DataError(f"domain '{name}': none of the interactions' items is in the items table; compare the item ids")
    rows = rows.where(known)
    if settings.item_share < 1:
        sold = _hashed(item_keys, f"items {settings.user_fold}") < settings.item_share
        rules["items_not_sold"] = int((~sold[rows.items]).sum())
        rows = rows.where(sold[rows.items])
        if len(rows.users) == 0:
            raise DataError(f"domain '{name}': item_share {settings.item_share} leaves no interaction; raise it")
    rows, rules["users_sorted"] = rows.sorted()
    rows, rules["duplicates"] = rows.without_duplicates()
    rules["users_without_interactions"] = source_users - rows.count("users")

    keep = k_core(rows.users, rows.items, settings.k_core)
    core = rows.where(keep)
    lost = dropped(rules)
    rules["kcore_users"] = rows.count("users") - core.count("users")
    rules["kcore_items"] = rows.count("items") - core.count("items")
    rules["kcore_interactions"] = len(keep) - len(core.users)
    if len(core.users) == 0:
        raise DataError(
            f"domain '{name}': no interaction is left after the rules and the {settings.k_core}-core "
            f"({len(keep):,} before it); lower k_core or check the source{lost}"
        )
    rows = core
    if settings.max_users is not None:
        rows = rows.where(_drawn_users(rows.users, settings.max_users, settings.seed))
        rules["users_not_drawn"] = core.count("users") - rows.count("users")

    users, user_codes = np.unique(rows.users, return_inverse=True)
    used, item_codes = np.unique(rows.items, return_inverse=True)
    rules["items_without_interactions"] = len(item_keys) - len(used) - rules["kcore_items"]
    rows = rows._replace(users=user_codes, items=(item_codes + 1).astype(np.int32))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(user_codes))]).astype(np.int64)
    seconds = rows.seconds() if raw.order_kind == "timestamp" else None
    times = (seconds // 1).astype(np.int64) if seconds is not None else None
    kept_users, kept_items = user_keys.take(pa.array(users)).to_pylist(), item_keys.take(pa.array(used)).to_pylist()
    titles, texts, rules["titles_missing"] = item_texts(item_table.take(pa.array(used)), kept_items)
    card = DataCard(
        name=name,
        order=raw.order_kind,
        k_core=settings.k_core,
        rules={rule: int(count) for rule, count in rules.items()},
        before=before,
        after=rows.statistics(raw.order_kind),
        tied_share=_tied_share(user_codes, rows.order if times is not None else None),
        repeat_share=_repeat_share(rows, len(used)),
        titles=title_statistics(titles),
    )
    content = (offsets, rows.items, times, ["", *titles], ["", *texts], kept_users, ["", *kept_items])
    return Domain(name, *content, fingerprint=_fingerprint(settings, content), card=card)


class _Rows(NamedTuple):
    """Interactions as parallel arrays (M,); ``order`` is missing where the row order is the order.

    Times keep the resolution of the source in ``order``, ``per_second`` units a second.
    """

    users: np.ndarray
    items: np.ndarray
    order: np.ndarray | None
    per_second: int = 1

    def where(self, selection: np.ndarray) -> "_Rows":
        """The rows a mask (M,) or an index array picks."""
        if selection.dtype == bool and selection.all():
            return self
        order = self.order[selection] if self.order is not None else None
        return _Rows(self.users[selection], self.items[selection], order, self.per_second)

    def seconds(self) -> np.ndarray | None:
        """The order in seconds, integers rounded down."""
        return self.order if self.order is None or self.per_second == 1 else self.order // self.per_second

    def count(self, column: Literal["users", "items"]) -> int:
        """Number of distinct users or items."""
        return int(np.count_nonzero(np.bincount(getattr(self, column))))

    def statistics(self, order_kind: str) -> Statistics:
        return Statistics.of(self.users, self.items, self.seconds() if order_kind == "timestamp" else None)

    def sorted(self) -> tuple["_Rows", int]:
        """By user, then order, ties as in the source; and the number of users whose rows were out of order."""
        rows = self
        if np.any(rows.users[1:] < rows.users[:-1]):
            rows = rows.where(np.argsort(rows.users, kind="stable"))
        if rows.order is None:
            return rows, 0
        backwards = (rows.order[1:] < rows.order[:-1]) & (rows.users[1:] == rows.users[:-1])
        if not backwards.any():
            return rows, 0
        unsorted = len(np.unique(rows.users[1:][backwards]))
        return rows.where(np.lexsort((rows.order, rows.users))), unsorted

    def without_duplicates(self) -> tuple["_Rows", int]:
        """Of sorted rows equal in user, item and order the first; and the number of rows dropped.

        Without an order column two equal rows are two interactions, so nothing is dropped.
        """
        if self.order is None or len(self.users) < 2:
            return self, 0
        tied = (self.users[1:] == self.users[:-1]) & (self.order[1:] == self.order[:-1])
        rows = np.flatnonzero(np.concatenate([tied, [False]]) | np.concatenate([[False], tied]))
        run = np.cumsum(np.concatenate([[True], ~tied]))[rows].astype(np.int64)
        _, first = np.unique(run * (int(self.items.max()) + 1) + self.items[rows], return_index=True)
        keep = np.ones(len(self.users), dtype=bool)
        keep[rows] = False
        keep[rows[first]] = True
        return self.where(keep), int(len(keep) - keep.sum())


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


def _encode(raw: RawDomain, item_keys: pa.StringArray, rules: dict[str, int]) -> tuple[_Rows, pa.StringArray]:
    """The interactions with users and items as codes in key order, and the user keys.

    Items outside ``item_keys`` get codes from ``len(item_keys)`` on.
    """
    users = dictionary_ids(raw.interactions.column("user"), "user")
    items = dictionary_ids(raw.interactions.column("item"), "item")
    order, per_second = None, 1
    if "order" in raw.interactions.column_names:
        order, per_second = order_values(raw.interactions.column("order"))
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
    rows = _Rows(
        user_rank[user_indices.to_numpy()],
        position[item_indices.to_numpy()],
        order.to_numpy() if order is not None else None,
        per_second,
    )
    return rows, user_keys


def _in_range(user_keys: pa.StringArray, bounds: tuple[int, int], name: str) -> np.ndarray:
    try:
        numbers = user_keys.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
        stranger = next(key for key in user_keys if not _is_integer(key)).as_py()
        raise DataError(f"domain '{name}': user_range needs integer user ids, but found {stranger!r}") from None
    return (numbers >= bounds[0]) & (numbers < bounds[1])


def _is_integer(key: pa.StringScalar) -> bool:
    try:
        key.cast(pa.int64())
    except pa.ArrowInvalid:
        return False
    return True


def _hashed(keys: pa.StringArray, salt: str) -> np.ndarray:
    """A number in [0, 1) for each key, the same on every machine."""
    digests = (hashlib.sha256(f"{salt}\0{key}".encode()).digest() for key in keys.to_pylist())
    return np.array([int.from_bytes(digest[:8], "big") for digest in digests], dtype=np.uint64) / 2.0**64


def _in_fold(user_keys: pa.StringArray, fold: tuple[int, int]) -> np.ndarray:
    """Mask of the user keys that hash into fold i of n."""
    return np.floor(_hashed(user_keys, "users") * fold[1]).astype(np.int64) == fold[0]


def _drawn_users(users: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Mask of the rows of a seeded subset of users; a larger count contains a smaller one."""
    drawn = np.zeros(int(users.max()) + 1, dtype=bool)
    drawn[numpy_generator(seed, "max_users").permutation(np.unique(users))[:count]] = True
    return drawn[users]


def _tied_share(users: np.ndarray, times: np.ndarray | None) -> float:
    if times is None:
        return 0.0
    return float(np.sum((users[1:] == users[:-1]) & (times[1:] == times[:-1])) / len(users))


def _repeat_share(rows: _Rows, num_items: int) -> float:
    pairs = np.sort(rows.users.astype(np.int64) * (num_items + 1) + rows.items)
    return float(np.sum(pairs[1:] == pairs[:-1]) / len(pairs))


def _fingerprint(settings: PreprocessSettings, content: tuple[np.ndarray | list[str] | None, ...]) -> str:
    digest = hashlib.sha256(json.dumps(settings.described(), sort_keys=True).encode())
    for part in content:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        else:
            digest.update(json.dumps(part).encode())
    return digest.hexdigest()
