"""No user, item, title, history or secret in anything a federated run says, sends or writes for others to see.

Two domains are made with unmistakable ids and titles and federated through the command line, with logs at DEBUG level, CSV
and offline W&B loggers, and every message tapped. What may hold titles and ids stays on the silo's machine and is not
scanned: its data folder, its cache (where the canaries are looked for, to show that the search finds them), its key files,
and per-user results, which name users by number. Prompts hold titles too; no LLM is run here.
"""

import base64
import csv
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from lightning_sfubm.__main__ import main
from lightning_sfubm.datamodules.synthetic import SyntheticReader
from lightning_sfubm.federated.ledger import Ledger
from tests.callbacks.test_dashboard import offline_wandb, wandb_records  # noqa: F401

pytestmark = pytest.mark.slow
DOMAINS = ("alpha", "beta")
WINDOW = 6  # interactions in a row that count as a history
Needles = dict[str, list[bytes]]


# ---------------------------------------------------------------------- what must not be found


def secret_forms(secret: bytes) -> list[bytes]:
    """A secret as bytes, hexadecimal of either case, base64 and a Python literal."""
    text = secret.hex()
    return [secret, text.encode(), text.upper().encode(), base64.b64encode(secret), repr(secret)[2:-1].encode()]


def history_forms(items: np.ndarray) -> list[bytes]:
    """Numbers in a row as text and as the machine holds them."""
    words = [str(item) for item in items.tolist()]
    text = [separator.join(words).encode() for separator in (", ", ",", " ")]
    return [*text, *(items.astype(kind).tobytes() for kind in ("<i8", "<i4", "<i2", "<f4"))]


def leaks(needles: Needles, haystacks: dict[str, bytes]) -> list[str]:
    """Which kind of needle was found where."""
    return [
        f"{kind} in {place}"
        for kind, forms in needles.items()
        for place, hay in haystacks.items()
        if any_in(forms, hay)
    ]


def any_in(forms: list[bytes], hay: bytes) -> bool:
    return any(form in hay for form in forms)


# ---------------------------------------------------------------------- a silo's data


def write_domain(folder: Path, index: int) -> None:
    """The planted structure under canary names; titles keep their words, so that there is something to learn."""
    raw = SyntheticReader(index, num_users=60, num_items=60, mean_length=10).read(None)
    folder.mkdir(parents=True)
    titles = dict(zip(raw.items["item"].to_pylist(), raw.items["title"].to_pylist(), strict=True))
    with open(folder / "interactions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user_id", "item_id", "timestamp"])
        table = raw.interactions.to_pydict()
        for user, item, order in zip(table["user"], table["item"], table["order"], strict=True):
            rows.writerow([f"CanaryUser{user}", f"CanaryItem{item}", order + 1])
    with open(folder / "items.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["item_id", "title"])
        rows.writerows([f"CanaryItem{item}", f"{title} Canarytitle"] for item, title in titles.items())


def config(place: Path, private: bool) -> dict[str, Any]:
    noise = {"sigma": 0.05, "secret_dir": str(place / "keys/noise")}
    callbacks = [{"class_path": "lightning_sfubm.callbacks.privacy_noise.PrivacyNoise", "init_args": noise}]
    federation: dict[str, Any] = {"exchange": "both", "rounds": 2, "local_max_epochs": 1, "local_min_epochs": 1}
    if private:
        dp = {"noise_multiplier": 1.0, "delta": 1e-3, "accounting": "rdp", "secret_dir": str(place / "keys/dp")}
        name = "lightning_sfubm.callbacks.differential_privacy.DifferentialPrivacy"
        callbacks.append({"class_path": name, "init_args": dp})
        federation["secure_aggregation"] = {"class_path": "lightning_sfubm.federated.secure.SecureAggregation"}
    else:
        federation["weighting"] = "examples"
    encoder = {"hidden_dim": 16, "num_layers": 1, "max_length": 16, "num_heads": 2}
    run = str(place / "run")
    domain = "lightning_sfubm.datamodules.domain_datamodule.DomainDataModule"
    reader = "lightning_sfubm.datamodules.readers.table.TableReader"
    text = {"class_path": "lightning_sfubm.datamodules.synthetic.HashingTextEncoder", "init_args": {"dim": 32}}
    shared = {"text_encoder": text, "k_core": 0, "batch_size": 16, "max_length": 16, "stage2_positions": 1}
    return {
        "seed_everything": 3,
        "trainer": {
            "default_root_dir": run,
            "accelerator": "cpu",
            "enable_progress_bar": True,
            "log_every_n_steps": 1,
            "callbacks": callbacks,
            "logger": [
                {"class_path": "CSVLogger", "init_args": {"save_dir": run}},
                {"class_path": "WandbLogger", "init_args": {"save_dir": run, "offline": True, "project": "leaks"}},
            ],
            "federation": {"class_path": "lightning_sfubm.federated.loop.Federation", "init_args": federation},
        },
        "model": {
            "class_path": "lightning_sfubm.modules.fkd.FKDDistiller",
            "init_args": {
                "encoder": {"class_path": "lightning_sfubm.modules.encoders.sasrec.SASRec", "init_args": encoder},
                "num_experts": 1,
                "logits_precision": "fp32",
            },
        },
        "data": {
            "class_path": "lightning_sfubm.datamodules.federated_datamodule.FederatedDataModule",
            "init_args": {
                "root": str(place / "silo"),
                "domains": {
                    name: {
                        "class_path": domain,
                        "init_args": {
                            "name": name,
                            "reader": {"class_path": reader, "init_args": {"folder": name}},
                            **shared,
                        },
                    }
                    for name in DOMAINS
                },
            },
        },
        "experiment": {
            "class_path": "lightning_sfubm.experiment.Experiment",
            "init_args": {"methods": ["popularity", "stage1"], "sigmas": [0.1]},
        },
    }


# ---------------------------------------------------------------------- everything that can be heard


class Tap(logging.Handler):
    """Every record of every logger, as text."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{self.format(record)} {record.args!r}")


@pytest.fixture
def logs() -> Iterator[Tap]:
    """All loggers at DEBUG, also those that keep their records from the root."""
    tap, root = Tap(), logging.getLogger()
    alone = [x for x in root.manager.loggerDict.values() if isinstance(x, logging.Logger) and not x.propagate]
    before = {logger: logger.level for logger in (root, logging.getLogger("lightning_sfubm"), *alone)}
    for logger in before:
        logger.setLevel(logging.DEBUG)
    for logger in (root, *alone):
        logger.addHandler(tap)
    yield tap
    for logger, level in before.items():
        logger.setLevel(level)
        logger.removeHandler(tap)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The secrets of secure aggregation: private keys and seeds of masks, as they are drawn, and the mask keys made of them."""
    from lightning_sfubm.privacy.secagg import client, primitives

    kept: list[bytes] = []

    def keeping(function: Any) -> Any:
        def keep(*args: Any) -> bytes:
            kept.append(function(*args))
            return kept[-1]

        return keep

    monkeypatch.setattr(primitives, "new_private_key", keeping(primitives.new_private_key))
    monkeypatch.setattr(primitives, "derive", keeping(primitives.derive))
    monkeypatch.setattr(client, "secrets", SimpleNamespace(token_bytes=keeping(client.secrets.token_bytes)))
    return kept


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every payload, up and down, on its way into the ledger."""
    sent: list[bytes] = []
    record = Ledger.record_bytes

    def tapped(
        self: Ledger, client: str, direction: str, kind: str, round: int, payload: bytes, *rest: Any, **named: Any
    ) -> None:
        sent.append(payload)
        record(self, client, direction, kind, round, payload, *rest, **named)

    monkeypatch.setattr(Ledger, "record_bytes", tapped)
    return sent


@pytest.mark.parametrize("private", [False, True], ids=["plain", "secure aggregation and DP"])
def test_a_federated_run_tells_nobody_who_did_what(
    private: bool,
    tmp_path: Path,
    offline_wandb: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    logs: Tap,
    drawn: list[bytes],
    wire: list[bytes],
) -> None:
    import wandb

    if private:
        pytest.importorskip("cryptography")
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "silo-cache"))
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate(DOMAINS):
        write_domain(tmp_path / "silo" / name, index)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(tmp_path, private)))
    main(["fit", "--config", str(tmp_path / "config.yaml")])
    wandb.finish()
    wandb.teardown()

    out, err = capfd.readouterr()
    run = tmp_path / "run"
    own = {path for path in run.rglob("*") if path.is_relative_to(run / "results")}  # per user, by number
    heard = {
        str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file() and path not in own
    }
    (log_of_wandb,) = run.rglob("run-*.wandb")  # its file is cut into blocks, which could cut a word in two
    heard["wandb records"] = b"".join(record.SerializeToString() for record in wandb_records(log_of_wandb))
    heard |= {f"message {number}": payload for number, payload in enumerate(wire)}
    heard |= {"stdout": out.encode(), "stderr": err.encode(), "logs": "\n".join(logs.lines).encode()}
    for place in ("history.jsonl", "ledger.jsonl", "report.json", "report.html", "run.json", "stdout", "logs"):
        assert heard[place], place
    assert any(place.startswith("csv/alpha") for place in heard)
    assert len(wire) > 4

    needles = canaries(tmp_path, drawn)
    assert bool(needles["mask key"]) == private
    assert leaks(needles, heard) == []
    rows = {path.name: path.read_bytes() for path in own if path.is_file()}
    assert rows
    assert leaks({kind: needles[kind] for kind in ("user", "item", "title")}, rows) == []
    cache = b"".join(path.read_bytes() for path in (tmp_path / "silo-cache").rglob("*") if path.is_file())
    found = leaks(needles, {"the silo's cache": cache})
    assert found == [f"{kind} in the silo's cache" for kind in ("user", "item", "title", "history")]


def canaries(place: Path, drawn: list[bytes]) -> Needles:
    from lightning_sfubm.datamodules.storage import load_domain

    histories: list[bytes] = []
    for entry in (place / "silo-cache/domains").iterdir():
        if entry.is_dir():
            domain = load_domain(entry, "any")
            for user in range(len(domain.user_keys)):
                sequence = np.asarray(domain.sequence(user))[:WINDOW]
                histories += history_forms(sequence) if len(sequence) == WINDOW else []
    keys = [path.read_bytes() for path in (place / "keys").rglob("*.key")]
    assert keys
    return {
        "user": [b"CanaryUser", b"canaryuser"],
        "item": [b"CanaryItem", b"canaryitem"],
        "title": [b"Canarytitle", b"canarytitle"],
        "history": histories,
        "noise secret": [form for key in keys for form in secret_forms(key)],
        "mask key": [form for key in drawn for form in secret_forms(key)],
    }


def test_the_search_finds_what_is_planted() -> None:
    secret, items = bytes(range(100, 132)), np.array([3, 1, 4, 1, 5, 9])
    needles = {"title": [b"Canarytitle"], "history": history_forms(items), "noise secret": secret_forms(secret)}
    for planted, kind in (
        (b'{"metrics": {"val": 1}, "note": "Two Canarytitle"}', "title"),
        (b'{"history": [2, 3, 1, 4, 1, 5, 9, 7]}', "history"),
        (np.array([0, 3, 1, 4, 1, 5, 9], dtype="<i8").tobytes(), "history"),
        (f"key = {secret.hex()}".encode(), "noise secret"),
        (b"secret: " + base64.b64encode(secret) + b"\n", "noise secret"),
        (f"args = {secret!r}".encode(), "noise secret"),
        (b"\x00" + secret, "noise secret"),
    ):
        assert leaks(needles, {"somewhere": b"before" + planted + b"after", "elsewhere": b"nothing"}) == [
            f"{kind} in somewhere"
        ]


def test_the_tap_hears_a_debug_record_of_the_product(logs: Tap) -> None:
    logging.getLogger("lightning_sfubm.federated.loop").debug("sent %s", "Canarytitle")
    assert leaks({"title": [b"Canarytitle"]}, {"logs": "\n".join(logs.lines).encode()}) == ["title in logs"]
