"""The rules, one by one, with their counts; the k-core against a naive one; what the domain is made of."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lightning_sfubm.datamodules.card import DataCard
from lightning_sfubm.datamodules.preprocess import PreprocessSettings, build_domain, k_core
from lightning_sfubm.datamodules.readers.base import RawDomain
from lightning_sfubm.errors import ConfigError, DataError

NO_CORE = PreprocessSettings(k_core=0)


def test_rules_and_their_counts(raw_domain) -> None:
    rows = [
        ("u1", "a", 30), ("u1", "b", 10), ("u1", "b", 10), ("u1", "b", 20),
        ("u2", "a", 5), ("u2", "ghost", 6), ("u3", "ghost", 1), (None, "a", 1), ("u2", None, 1), ("u2", "a", None),
    ]  # fmt: skip
    raw = raw_domain(rows, {"b": "Beta", "a": "  ", "c": "Never used"})
    items = pa.concat_tables([raw.items, pa.table({"item": ["b"], "title": ["Second line"]})])
    domain = build_domain(RawDomain(raw.interactions, items, "timestamp", {"left_out": 4}), "x", NO_CORE)
    assert domain.user_keys == ["u1", "u2"]
    assert domain.item_keys == ["", "a", "b"]
    assert domain.titles == ["", "untitled a", "Beta"]
    assert domain.sequence(0).tolist() == [2, 2, 1]
    assert domain.times.tolist() == [10, 20, 30, 5]
    assert domain.card.rules == {
        "left_out": 4,
        "items_listed_twice": 1,
        "rows_without_id_or_order": 3,
        "unknown_items": 2,
        "users_sorted": 1,
        "duplicates": 1,
        "users_without_interactions": 1,
        "kcore_users": 0,
        "kcore_items": 0,
        "kcore_interactions": 0,
        "items_without_interactions": 1,
        "titles_missing": 1,
    }
    assert domain.card.before.interactions == 7
    assert domain.card.after.interactions == 4
    assert domain.card.repeat_share == 0.25


def test_ties_keep_source_order_and_numbering_ignores_row_order(raw_domain) -> None:
    rows = [(7, 3, 1), (7, 1, 1), (7, 2, 1), (10, 2, 4), (10, 3, 2)]
    domain = build_domain(raw_domain(rows), "x", NO_CORE)
    assert domain.user_keys == ["7", "10"]  # numeric, not by letters
    assert domain.sequence(0).tolist() == [3, 1, 2]
    swapped = build_domain(raw_domain([*rows[3:], *rows[:3]]), "x", NO_CORE)
    assert swapped.fingerprint == domain.fingerprint


def test_the_fingerprint_follows_all_that_a_domain_is_made_of(raw_domain) -> None:
    """Caches, candidate lists and checkpoints are told apart by it."""
    rows, titles = [("u", "a", 1), ("u", "b", 2), ("v", "a", 3)], {"a": "Alien", "b": "Heat"}
    renamed = [(user, {"a": "c"}.get(item, item), order) for user, item, order in rows]
    raws = [
        raw_domain(rows, titles),
        raw_domain([("u", "b", 1), ("u", "a", 2), ("v", "a", 3)], titles),
        raw_domain([("u", "a", 1), ("u", "b", 2), ("v", "a", 4)], titles),
        raw_domain([("u", "a", 1), ("u", "b", 2), ("w", "a", 3)], titles),
        raw_domain(renamed, {"b": "Heat", "c": "Alien"}),
        raw_domain(rows, titles | {"b": "Up"}),
        raw_domain(rows, titles, brand=["x", "y"]),
    ]
    prints = [build_domain(raw, "x", NO_CORE).fingerprint for raw in raws]
    assert len(set(prints)) == len(prints)
    assert build_domain(raws[0], "another name", NO_CORE).fingerprint == prints[0]
    assert build_domain(raws[0], "x", PreprocessSettings(k_core=1)).fingerprint != prints[0]


@pytest.mark.parametrize("order", [[float("inf"), 0.0], [2.0**63, 0.0]])
def test_order_beyond_64_bits_is_refused(raw_domain, order: list[float]) -> None:
    with pytest.raises(DataError, match="in row 1, which is beyond 64-bit integers"):
        build_domain(raw_domain([("u", "a", order[0]), ("u", "b", order[1])]), "x", NO_CORE)


def test_unit_of_whole_second_times_changes_nothing(raw_domain) -> None:
    rows = [("u", "a", 30), ("u", "b", -10), ("u", "b", -10), ("v", "b", 20)]
    raw = raw_domain(rows)
    expected = build_domain(raw, "x", NO_CORE)
    for kind in (pa.float64(), pa.timestamp("s"), pa.timestamp("ms"), pa.timestamp("ns", "UTC")):
        order = raw.interactions.column("order").cast(pa.timestamp("s") if pa.types.is_timestamp(kind) else kind)
        table = raw.interactions.set_column(2, "order", order.cast(kind))
        domain = build_domain(RawDomain(table, raw.items, "timestamp"), "x", NO_CORE)
        assert (domain.fingerprint, domain.card) == (expected.fingerprint, expected.card)


def test_times_within_a_second_keep_their_order_and_are_told_rounded_down(raw_domain) -> None:
    rows = [("u", "a", 1999), ("u", "b", 1500), ("u", "b", 1501), ("u", "c", -500), ("v", "a", 7), ("v", "b", 7)]
    raw = raw_domain(rows)
    table = raw.interactions.set_column(2, "order", raw.interactions.column("order").cast(pa.timestamp("ms")))
    domain = build_domain(RawDomain(table, raw.items, "timestamp"), "x", NO_CORE)
    assert [domain.item_keys[item] for item in domain.sequence(0)] == ["c", "b", "b", "a"]
    assert domain.times.tolist() == [-1, 1, 1, 1, 0, 0]
    assert domain.card.rules["duplicates"] == 0
    assert domain.card.tied_share == 1 / 6  # of the second user's alone


def test_position_order_is_sorted_and_times_are_absent(raw_domain) -> None:
    domain = build_domain(raw_domain([("u", "b", 1), ("u", "a", 0), ("u", "b", 1)], order="position"), "x", NO_CORE)
    assert domain.sequence(0).tolist() == [1, 2]
    assert domain.times is None
    assert domain.card.after.first is None


@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=60),
    st.integers(0, 4),
)
@settings(derandomize=True, deadline=None)
def test_k_core_is_the_largest_fixed_point(pairs: list[tuple[int, int]], k: int) -> None:
    naive = list(range(len(pairs)))
    while True:
        users, items = [pairs[i][0] for i in naive], [pairs[i][1] for i in naive]
        kept = [i for i in naive if users.count(pairs[i][0]) >= k and items.count(pairs[i][1]) >= k]
        if len(kept) == len(naive):
            break
        naive = kept
    array = np.array(pairs, dtype=np.int32).reshape(-1, 2)
    assert np.flatnonzero(k_core(array[:, 0], array[:, 1], k)).tolist() == naive


def test_max_users_is_a_seeded_nested_subset(raw_domain) -> None:
    raw = raw_domain([(user, item, item) for user in range(40) for item in range(6)])
    drawn = {
        (count, seed): set(build_domain(raw, "x", PreprocessSettings(5, None, count, seed)).user_keys)
        for count in (5, 10, 99)
        for seed in (1, 2)
    }
    assert [len(drawn[c, 1]) for c in (5, 10, 99)] == [5, 10, 40]
    assert drawn[5, 1] < drawn[10, 1]
    assert drawn[5, 1] != drawn[5, 2]


def test_user_range_comes_before_the_core(raw_domain) -> None:
    raw = raw_domain([(user, item, item) for user in range(10) for item in range(5)])
    domain = build_domain(raw, "x", PreprocessSettings(k_core=5, user_range=(2, 8)))
    assert domain.user_keys == ["2", "3", "4", "5", "6", "7"]
    assert domain.card.rules["users_out_of_range"] == 4
    with pytest.raises(DataError, match="no interaction is left"):
        build_domain(raw, "x", PreprocessSettings(k_core=5, user_range=(2, 4)))
    with pytest.raises(DataError, match="within user_range"):
        build_domain(raw, "x", PreprocessSettings(k_core=0, user_range=(50, 60)))
    with pytest.raises(DataError, match="integer user ids, but found 'u1'"):
        build_domain(raw_domain([("u1", "a", 1)]), "x", PreprocessSettings(user_range=(0, 3)))


def test_an_empty_core_says_what_was_dropped_before(raw_domain) -> None:
    rows = [(user, item, item) for user in range(10) for item in range(8)]
    with pytest.raises(
        DataError,
        match=r"the 5-core \(40 before it\); lower k_core or check the source \(dropped before: "
        r"40 interactions with items that are not in the items table\)$",
    ):
        build_domain(raw_domain(rows, {item: f"t{item}" for item in range(4)}), "x", PreprocessSettings(k_core=5))
    with pytest.raises(DataError, match=r"check the source$"):
        build_domain(raw_domain(rows[:32]), "x", PreprocessSettings(k_core=5))


def test_user_range_speaks_of_users_that_have_interactions(raw_domain) -> None:
    """An id of rows that are left out (no item, say) is nobody's."""
    rows = [(str(user), item, 1) for user in range(4) for item in "ab"]
    raw = raw_domain([*rows, ("guest", None, 1), ("77", None, 1)], {"a": "A", "b": "B"})
    domain = build_domain(raw, "x", PreprocessSettings(k_core=0, user_range=(1, 3)))
    assert domain.user_keys == ["1", "2"]
    assert domain.card.rules["users_out_of_range"] == 2
    raw = raw_domain([*rows, ("guest", "a", 1)], {"a": "A", "b": "B"})
    with pytest.raises(DataError, match="integer user ids, but found 'guest'"):
        build_domain(raw, "x", PreprocessSettings(k_core=0, user_range=(1, 3)))


@pytest.mark.parametrize("values", [{"k_core": -1}, {"max_users": 0}, {"user_range": (5, 5)}])
def test_bad_settings(values: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        PreprocessSettings(**values)


def test_titles_of_all_kinds_survive(raw_domain) -> None:
    titles = {"a": "x" * 2000, "b": "新しい 本", "c": "Tab\there\x00", "d": "naïve Ünïcode", "e": "می‌خواهم"}
    domain = build_domain(raw_domain([("u", key, 1) for key in titles], titles), "x", NO_CORE)
    assert domain.titles[1:] == ["x" * 2000, "新しい 本", "Tab here", "naïve Ünïcode", "می‌خواهم"]
    assert domain.card.titles.max_length == 2000
    assert domain.card.titles.long_share == 0.2
    assert domain.card.titles.non_latin_share == 0.4


def test_texts_join_title_and_columns_and_skip_what_is_missing(raw_domain) -> None:
    raw = raw_domain(
        [("u", "a", 1), ("u", "b", 2), ("u", "c", 3)], {"a": "Alpha", "b": None, "c": None},
        brand=["Acme", "Bolt", None], category=["Home|Garden", None, None],
    )  # fmt: skip
    domain = build_domain(raw, "x", NO_CORE)
    assert domain.texts == ["", "Alpha. Acme. Home, Garden", "Bolt", "untitled c"]


def retyped(raw: RawDomain, column: str, kind: pa.DataType) -> pa.Table:
    place = raw.interactions.column_names.index(column)
    return raw.interactions.set_column(place, column, raw.interactions.column(column).cast(kind))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: RawDomain(raw.interactions.drop_columns(["user"]), raw.items, raw.order_kind), "no column 'user'"),
        (
            lambda raw: RawDomain(raw.interactions, raw.items.drop_columns(["title"]), raw.order_kind),
            "no column 'title'",
        ),
        (lambda raw: RawDomain(raw.interactions, raw.items, "none"), "order kind 'none'"),
        (lambda raw: RawDomain(retyped(raw, "user", pa.float64()), raw.items, raw.order_kind), "'user' holds double"),
        (
            lambda raw: RawDomain(retyped(raw, "order", pa.string()), raw.items, raw.order_kind),
            "order column holds string",
        ),
        (lambda raw: RawDomain(raw.interactions[:0], raw.items, raw.order_kind), "interactions table holds no rows"),
    ],
)
def test_schema_is_checked(raw_domain, change, words: str) -> None:
    with pytest.raises(DataError, match=f"domain 'x': .*{words}"):
        build_domain(change(raw_domain([("1", "a", 1)])), "x", NO_CORE)


def test_card_prints_and_survives_json(raw_domain) -> None:
    card = build_domain(
        raw_domain([("u", "a", 1), ("u", "b", 1), ("v", "q", 9)], {"a": "A", "b": "B"}), "x", NO_CORE
    ).card
    assert DataCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(card)
    text = console.export_text()
    assert "items table: dropped" in text
    assert card.tied_share == 0.5
    assert card.rules["users_without_interactions"] == 1


def test_folds_are_disjoint_shops_with_overlapping_catalogues(raw_domain) -> None:
    rows = [(f"u{user}", f"i{(user * 7 + place * 3) % 60}", place) for user in range(200) for place in range(8)]
    raw = raw_domain(rows)
    shops = [build_domain(raw, "x", PreprocessSettings(0, user_fold=(i, 2), item_share=0.75)) for i in range(2)]
    users, items = [set(s.user_keys) for s in shops], [set(s.item_keys[1:]) for s in shops]
    assert not users[0] & users[1]
    assert len(users[0] | users[1]) > 190
    assert all(80 < len(part) < 120 for part in users)
    assert items[0] & items[1]
    assert items[0] - items[1]
    assert items[1] - items[0]
    assert all(30 <= len(part) < 60 for part in items)
    assert shops[0].card.rules["users_out_of_fold"] == 200 - sum(u in users[0] for u in (f"u{n}" for n in range(200)))
    assert shops[0].card.rules["items_not_sold"] > 0
    fold: Any = [0, 2]  # as a file of settings has it
    again = build_domain(raw, "x", PreprocessSettings(0, user_fold=fold, item_share=0.75))
    assert again.item_keys == shops[0].item_keys
    assert again.fingerprint == shops[0].fingerprint != shops[1].fingerprint


def test_settings_that_split_nothing_leave_the_fingerprint_as_it_was() -> None:
    assert set(PreprocessSettings().described()) == {"k_core", "user_range", "max_users", "seed"}
    assert PreprocessSettings(item_share=0.5).described()["item_share"] == 0.5


@pytest.mark.parametrize(
    ("changes", "words"), [({"user_fold": (2, 2)}, "user_fold"), ({"item_share": 0.0}, "item_share")]
)
def test_impossible_splits_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PreprocessSettings(**changes)
