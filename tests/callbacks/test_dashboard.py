import csv
import json
import struct

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_sfubm.callbacks.dashboard import log_privacy, log_results_table, log_round

ROUNDS = [
    {"beauty": {"val/ndcg@10": 0.31, "train/loss": 5.0}, "health": {"val/ndcg@10": 0.28}},
    {"beauty": {"val/ndcg@10": 0.42, "train/loss": 4.0}, "health": {"val/ndcg@10": 0.33}},
]
PRIVACY = {
    "beauty": [
        {"sigma": 0.0, "cosine_mean": 1.0, "obfuscation": 0.0, "linkage_with_replacement": 1.0, "used": False},
        {
            "sigma": 0.05,
            "cosine_mean": 0.714,
            "obfuscation": 0.286,
            "linkage_with_replacement": 0.99,
            "used": True,
            "averaging": {"uploads": [1, 2], "linkage": [0.99, 1.0]},
        },
    ]
}
ROWS = [
    {"domain": "beauty", "method": "sasrec", "label": "SASRec", "users": 5, "hit@1": 0.35, "full_ndcg@10": 0.05},
    {"domain": "beauty", "method": "sfubm", "label": "SF-UBM", "users": 5, "hit@1": 0.4, "full_ndcg@10": None},
]


def log_everything(loggers):
    for number, metrics in enumerate(ROUNDS, 1):
        log_round(loggers, number, metrics)
    log_privacy(loggers, PRIVACY)
    log_results_table(loggers, ROWS)


def wandb_records(path):
    """Records of a .wandb file: a 7-byte header, then LevelDB log blocks of 32 KiB holding protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # a block's tail too short for a header is padding
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


@pytest.fixture
def offline_wandb(tmp_path, monkeypatch):
    import wandb

    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_CACHE_DIR": str(tmp_path / "cache"),
        "WANDB_CONFIG_DIR": str(tmp_path / "config"),
        "WANDB_DATA_DIR": str(tmp_path / "staged"),
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run").mkdir()
    yield tmp_path / "run"
    wandb.teardown()


@pytest.mark.filterwarnings("ignore:There is a wandb run already in progress")
def test_an_offline_wandb_run_holds_rounds_privacy_and_table(offline_wandb):
    import wandb

    loggers = [WandbLogger(project="test", save_dir=offline_wandb, offline=True) for _ in range(2)]
    log_everything(loggers)
    wandb.finish()  # without it the dead run stays the current one for the tests that follow
    wandb.teardown()  # waits for the service that writes the file

    (file,) = offline_wandb.glob("wandb/offline-run-*/run-*.wandb")
    records = list(wandb_records(file))
    history = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    rounds = [row for row in history if "fed/round" in row]
    assert [row["fed/round"] for row in rounds] == [1, 2], "two loggers on one run must not log a round twice"
    assert [row["fed/beauty/val/ndcg@10"] for row in rounds] == [0.31, 0.42]
    assert [row["fed/health/val/ndcg@10"] for row in rounds] == [0.28, 0.33]

    figures = next(row for row in history if "privacy/beauty/sigma" in row)
    assert figures["privacy/beauty/sigma"] == 0.05
    assert figures["privacy/beauty/linkage_with_replacement"] == 0.99
    scores = next(row for row in history if "results/beauty/sfubm/hit@1" in row)
    assert scores["results/beauty/sfubm/hit@1"] == 0.4

    axes = {r.metric.glob_name or r.metric.name: r.metric.step_metric for r in records if r.HasField("metric")}
    assert axes["fed/*"] == "fed/round"

    stored = {}
    for name in ("results/table", "privacy/sweep"):
        entry = next(row for row in history if f"{name}/path" in row)
        assert entry[f"{name}/_type"] == "table-file"
        stored[name] = json.loads((file.parent / "files" / entry[f"{name}/path"]).read_text())
    assert stored["results/table"]["columns"] == ["domain", "method", "label", "users", "hit@1", "full_ndcg@10"]
    assert stored["results/table"]["data"] == [
        ["beauty", "sasrec", "SASRec", 5, 0.35, 0.05],
        ["beauty", "sfubm", "SF-UBM", 5, 0.4, None],
    ]
    assert [row[1] for row in stored["privacy/sweep"]["data"]] == [0.0, 0.05]


def test_a_csv_logger_gets_the_numbers(tmp_path):
    logger = CSVLogger(tmp_path, name="logs", version="0")
    log_everything([logger])
    logger.finalize("success")
    with open(tmp_path / "logs" / "0" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rounds = [row for row in rows if row["fed/round"]]
    assert [(row["step"], row["fed/beauty/train/loss"]) for row in rounds] == [("1", "5.0"), ("2", "4.0")]
    merged = {key: value for row in rows for key, value in row.items() if value}
    assert merged["privacy/beauty/cosine_mean"] == "0.714"
    assert merged["results/beauty/sasrec/hit@1"] == "0.35"
    assert "results/beauty/sfubm/full_ndcg@10" not in merged


def test_nothing_to_log_is_no_error(tmp_path):
    logger = CSVLogger(tmp_path)
    log_round([], 1, ROUNDS[0])
    log_privacy([logger], {})
    log_results_table([logger], [])
    assert logger.experiment.metrics == []


@pytest.mark.parametrize(("name", "classes"), [("csv", [CSVLogger]), ("wandb", [CSVLogger, WandbLogger])])
def test_logger_configs_build_their_loggers(name, classes, tmp_path, monkeypatch):
    from importlib.resources import files

    from jsonargparse import ArgumentParser
    from lightning.pytorch import Trainer

    monkeypatch.chdir(tmp_path)
    parser = ArgumentParser()
    parser.add_class_arguments(Trainer, "trainer")
    config = parser.parse_path(str(files("lightning_sfubm.configs") / "logger" / f"{name}.yaml"))
    trainer = parser.instantiate(config).trainer
    assert [type(logger) for logger in trainer.loggers] == classes
    if name == "wandb":
        assert trainer.loggers[1]._offline
