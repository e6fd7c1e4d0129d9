"""A cache of its own for every test, and small sources."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lightning_sfubm.datamodules.domain import Domain
from lightning_sfubm.datamodules.preprocess import PreprocessSettings, build_domain
from lightning_sfubm.datamodules.readers.base import RawDomain


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("SFUBM_CACHE", str(folder))
    return folder


def make_raw(
    interactions: list[tuple], titles: dict | None = None, order: str = "timestamp", **columns: list
) -> RawDomain:
    """A raw domain from (user, item[, order]) tuples; titles by item, made up where not given."""
    names = ("user", "item", "order")[: len(interactions[0])]
    table = pa.table({name: list(column) for name, column in zip(names, zip(*interactions, strict=True), strict=True)})
    if titles is None:
        titles = {item: f"title {item}" for item in dict.fromkeys(row[1] for row in interactions)}
    items = pa.table({"item": list(titles), "title": pa.array(list(titles.values()), pa.string()), **columns})
    return RawDomain(table, items, order if len(names) == 3 else "none")


def make_domain(sequences: list[list[int]], name: str = "test") -> Domain:
    """A domain whose user u has exactly these items (1..N, every item must occur), without a k-core."""
    rows = [(user, item, place) for user, items in enumerate(sequences) for place, item in enumerate(items)]
    domain = build_domain(make_raw(rows, order="position"), name, PreprocessSettings(k_core=0))
    assert [domain.sequence(u).tolist() for u in range(domain.num_users)] == [s for s in sequences if s]
    return domain


@pytest.fixture
def write_tables(tmp_path: Path) -> Callable[..., Path]:
    """Write ``interactions`` and ``items`` files into a folder and return it."""

    def write(interactions: bytes, items: bytes, suffix: str = ".csv") -> Path:
        folder = tmp_path / "source"
        folder.mkdir(exist_ok=True)
        (folder / f"interactions{suffix}").write_bytes(interactions)
        (folder / f"items{suffix}").write_bytes(items)
        return folder

    return write


def make_csv(num_users: int = 30, num_items: int = 40, length: int = 8, seed: int = 0) -> tuple[bytes, bytes]:
    """Bytes of a small but sound source."""
    generator = np.random.default_rng(seed)
    lines = ["user_id,item_id,timestamp"]
    for user in range(num_users):
        for step, item in enumerate(generator.permutation(num_items)[:length]):
            lines.append(f"{user},{item},{1000 + step}")
    items = ["item_id,title,brand", *(f"{item},Title number {item},Brand {item % 3}" for item in range(num_items))]
    return "\n".join(lines).encode() + b"\n", "\n".join(items).encode() + b"\n"


@pytest.fixture(scope="session")
def raw_domain() -> Callable[..., RawDomain]:
    return make_raw


@pytest.fixture(scope="session")
def domain_of() -> Callable[..., Domain]:
    return make_domain


@pytest.fixture(scope="session")
def csv_tables() -> Callable[..., tuple[bytes, bytes]]:
    return make_csv
