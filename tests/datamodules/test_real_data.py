"""The real domains against the statistics their sources state. Needs SFUBM_DATA_ROOT."""

import os

import pytest

from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.readers.table import TableReader

ROOT = os.environ.get("SFUBM_DATA_ROOT")
pytestmark = [pytest.mark.data, pytest.mark.skipif(not ROOT, reason="SFUBM_DATA_ROOT is not set")]

#: users, items, interactions, mean (2 digits), median, max length, first day, last day of the source as it is.
SOURCES = {
    "beauty": (22332, 12086, 198215, 8.88, 6, 204, "2002-06-12", "2014-07-23"),
    "health": (38329, 18427, 343831, 8.97, 6, 292, "2000-12-09", "2014-07-23"),
    "books": (38234, 38519, 517167, 13.53, 7, 1491, "1997-03-25", "2014-07-22"),
    "food": (14870, 8661, 98316, 6.61, 5, 112, None, None),
    "kitchen": (38191, 27117, 265817, 6.96, 6, 78, None, None),
    "movielens-small": (671, 3496, 90072, 134.24, 66, 1449, "1995-01-09", "2016-10-16"),
}
#: users, items, interactions after the 5-core, where the source is no 5-core yet.
CORES = {"food": (7128, 3680, 57327), "kitchen": (25002, 11601, 171161)}


@pytest.mark.parametrize("name", SOURCES)
def test_cards_agree_with_the_sources(name: str) -> None:
    data = DomainDataModule(name, TableReader(name), root=ROOT)
    data.setup()
    before, after = data.data_card.before, data.data_card.after
    users, items, interactions, mean, median, longest, first, last = SOURCES[name]
    assert (before.users, before.items, before.interactions) == (users, items, interactions)
    assert (round(before.mean_length, 2), before.median_length, before.max_length) == (mean, median, longest)
    assert (before.first, before.last) == (first, last)
    assert before.density == pytest.approx(interactions / users / items)
    assert (after.users, after.items, after.interactions) == CORES.get(name, (users, items, interactions))
    assert min(after.min_length, after.min_item_count) >= 5


def test_disjoint_people_cut() -> None:
    ranges = {"health": (0, 18_398), "beauty": (11_612, 10**9)}
    found = {}
    for name, bounds in ranges.items():
        data = DomainDataModule(name, TableReader(name), root=ROOT, user_range=bounds)
        data.setup()
        found[name] = data.domain.num_users
    assert found == {"health": 11_614, "beauty": 5_817}
