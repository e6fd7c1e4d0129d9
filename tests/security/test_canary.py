"""Raw behaviour and secrets stay where they are: canaries in the data turn up in no file and no message (T18)."""

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from lightning.pytorch.loggers import WandbLogger

from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.federated_datamodule import FederatedDataModule
from lightning_sfubm.datamodules.readers.base import RawDomain
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader
from lightning_sfubm.federated import server as server_module
from lightning_sfubm.federated.hooks import FederatedCallback
from tests.conftest import small_distiller

WORD = "CANARY"


class Marked(SyntheticReader):
    """Every user, item and title carries the canary."""

    def read(self, root: Path | None) -> RawDomain:
        raw = super().read(root)

        def mark(table: pa.Table, columns: list[str]) -> pa.Table:
            for name in columns:
                marked = pa.array([f"{WORD}{name}{value}" for value in table[name].to_pylist()])
                table = table.set_column(table.column_names.index(name), name, marked)
            return table

        return RawDomain(mark(raw.interactions, ["user", "item"]), mark(raw.items, ["item", "title"]), raw.order_kind)


def history_forms(data: FederatedDataModule) -> list[bytes]:
    """Runs of five items of users' histories, as bytes of the usual integers and as text."""
    forms = []
    for domain in data.domains.values():
        items, offsets = domain.domain.items, domain.domain.offsets
        for start in offsets[:30]:
            run = items[start : start + 5]
            forms += [run.astype(kind).tobytes() for kind in ("int32", "int64", "float32")]
            forms += [sep.join(map(str, run)).encode() for sep in (", ", ",", " ")]
    return forms


@pytest.mark.slow
def test_neither_behaviour_nor_secrets_reach_logs_ledgers_or_messages(
    federated_trainer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    settings = {"text_encoder": HashingTextEncoder(dim=32), "k_core": 0, "batch_size": 16, "max_length": 16}
    data = FederatedDataModule(
        {
            name: DomainDataModule(name, Marked(number, num_users=40, num_items=48, mean_length=10), **settings)
            for number, name in enumerate(("alpha", "beta"))
        }
    )
    payloads: list[bytes] = []
    unpacked = server_module.unpack

    def spy(schema: Any, payload: bytes) -> Any:
        payloads.append(payload)
        return unpacked(schema, payload)

    monkeypatch.setattr(server_module, "unpack", spy)
    secrets = tmp_path / "secrets"

    class Complains(FederatedCallback):
        def on_round_end(self, loop: Any, round: int, metrics: Any) -> None:
            logging.getLogger("lightning_sfubm").debug("state of the loop: %s %s", loop, loop.clients)

    trainer = federated_trainer(
        callbacks=[PrivacyNoise(0.05, secret_dir=str(secrets)), Complains()],
        flags={"logger": WandbLogger(project="test", save_dir=tmp_path / "wandb", offline=True)},
    )
    with caplog.at_level(logging.DEBUG):
        trainer.fit(small_distiller(), datamodule=data)
        trainer.test(small_distiller(), datamodule=data, verbose=False)
    trainer.shared_loggers[0].experiment.finish()

    keys = [file.read_bytes() for file in secrets.glob("*.key")]
    assert len(keys) == 2
    forbidden = {WORD.encode(), *keys, *(key.hex().encode() for key in keys), *history_forms(data)}
    assert any(WORD in title for title in data.domains["alpha"].domain.titles)  # the canary is in the data
    said = capfd.readouterr()
    places = {"log": caplog.text.encode(), "stdout": said.out.encode(), "stderr": said.err.encode()}
    places |= {f"message {n}": payload for n, payload in enumerate(payloads)}
    for folder in (trainer.run_dir, tmp_path / "wandb"):
        places |= {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    kinds = {Path(place).suffix for place in places}
    assert {".jsonl", ".ckpt", ".csv", ".wandb"} <= kinds
    assert len(payloads) >= 6
    for place, content in places.items():
        for secret in forbidden:
            assert secret not in content, f"{secret[:40]!r} in {place}"
