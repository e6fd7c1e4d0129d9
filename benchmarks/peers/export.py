"""Write one domain, split as everywhere in this project, for the scripts of the peers.

    python benchmarks/peers/export.py --data-root DIR --folder beauty --out EXPORT
    python benchmarks/peers/export.py --reader movielens-100k --out EXPORT
    python benchmarks/peers/export.py --reader synthetic --items 10000 --out EXPORT

EXPORT/data.npz: training sequences, and for validation and test the histories to rank from; items are 1..N, rows oldest
first. Targets are not written: report.py reads them from the source. EXPORT/meta.json: what the data is.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.readers.base import Reader
from lightning_sfubm.datamodules.readers.movielens import MovieLensReader
from lightning_sfubm.datamodules.readers.table import TableReader
from lightning_sfubm.datamodules.synthetic import SyntheticReader
from lightning_sfubm.errors import DataError

SOURCE = ("reader", "root", "folder", "items", "k_core", "max_users", "seed")
READERS = ("table", "movielens-100k", "synthetic")


def reader_of(meta: dict[str, Any]) -> tuple[str, Reader]:
    """Name and reader of a domain: a table of the data root, MovieLens-100K as RecBole ships it, or generated users."""
    if meta["reader"] == "movielens-100k":
        return "movielens-100k", MovieLensReader(variant="recbole-100k")
    if meta["reader"] == "synthetic":
        return f"synthetic-{meta['items']}", SyntheticReader(num_users=20_000, num_items=meta["items"], mean_length=8)
    return meta["folder"], TableReader(meta["folder"])


def open_data(meta: dict[str, Any], **settings: Any) -> DomainDataModule:
    """The data module an export was made from.

    Raises:
        DataError: the source has changed since.
    """
    name, reader = reader_of(meta)
    data = DomainDataModule(
        name,
        reader,
        root=meta["root"],
        k_core=meta["k_core"],
        max_users=meta["max_users"],
        seed=meta["seed"],
        **settings,
    )
    data.prepare_data()
    data.setup()
    if meta.get("fingerprint", data.domain.fingerprint) != data.domain.fingerprint:
        raise DataError(f"{name}: the data has changed since the export; export it again")
    return data


def flat(items: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slices ``items[start:end]`` one after the other, and their offsets."""
    lengths = ends - starts
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return items[np.repeat(starts, lengths) + within].astype(np.int32), offsets


def main() -> None:
    """Command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", choices=READERS, default=READERS[0], help="where the domain comes from")
    parser.add_argument("--data-root", dest="root", type=lambda path: str(Path(path).resolve()))
    parser.add_argument("--folder", help="folder of the domain under the data root")
    parser.add_argument("--items", type=int, default=10_000, help="number of items of a synthetic domain")
    parser.add_argument("--out", required=True)
    parser.add_argument("--k-core", type=int, default=5)
    parser.add_argument("--max-users", type=int, default=None)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.reader == "table" and not (arguments.root and arguments.folder):
        parser.error("--reader table needs --data-root and --folder")
    meta: dict[str, Any] = {name: getattr(arguments, name) for name in SOURCE}
    if arguments.reader != "synthetic":
        meta["items"] = None
    data = open_data(meta)
    domain, splits = data.domain, data.splits
    starts = domain.offsets[splits.eval_users]
    parts = {
        "train": flat(domain.items, splits.train_start, splits.train_end),
        "val": flat(domain.items, starts, splits.val),
        "test": flat(domain.items, starts, splits.test),
    }
    meta |= {
        "fingerprint": domain.fingerprint,
        "num_items": domain.num_items,
        "num_users": domain.num_users,
        "eval_users": len(splits.eval_users),
        "train_interactions": len(parts["train"][0]),
    }
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{name}_{kind}": a for name, pair in parts.items() for kind, a in zip(("items", "offsets"), pair, strict=True)
    }
    np.savez(out / "data.npz", **arrays)
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    print(f"{meta['num_users']} users, {meta['num_items']} items, {meta['train_interactions']} to train on -> {out}")


if __name__ == "__main__":
    main()
