"""Messages kept for an audit: opt-in, byte for byte, readable by their owner alone, and whole after an interruption."""

import hashlib
import stat
from pathlib import Path
from typing import Any

import pytest

from lightning_sfubm.errors import PrivacyError
from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.federated.ledger import read_ledger
from lightning_sfubm.federated.recording import MessageStore
from tests.conftest import small_distiller


class Die(FederatedCallback):
    """End the run when the teacher of some client is about to leave in some round, after the first upload of it."""

    def __init__(self, round: int) -> None:
        self.round, self.sent = round, 0

    def on_upload(self, loop: Any, client: str, kind: str, tensors: Any) -> Any:
        if kind == "teacher" and loop.counters.round + 1 == self.round:
            self.sent += 1
            if self.sent == 2:
                raise KeyboardInterrupt
        return tensors


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return read_ledger(run_dir / "ledger.jsonl")  # type: ignore[return-value]


def test_by_default_only_hashes_are_kept(federated_data: Any, federated_trainer: Any) -> None:
    trainer = federated_trainer(rounds=1, local_max_epochs=1)
    trainer.fit(small_distiller(), datamodule=federated_data())
    assert lines(trainer.run_dir)
    assert not (trainer.run_dir / "messages").exists()


def test_what_is_kept_is_what_travelled(federated_data: Any, federated_trainer: Any) -> None:
    trainer = federated_trainer(rounds=1, local_max_epochs=1, keep_messages=True)
    trainer.fit(small_distiller(), datamodule=federated_data())
    folder = trainer.run_dir / "messages"
    entries = lines(trainer.run_dir)
    assert {entry["sha256"] for entry in entries} == {path.name for path in folder.iterdir()}
    for entry in entries:
        payload = (folder / entry["sha256"]).read_bytes()
        assert hashlib.sha256(payload).hexdigest() == entry["sha256"]
        assert len(payload) == entry["bytes"]
        assert stat.S_IMODE((folder / entry["sha256"]).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_run_without_recording_leaves_no_messages_of_an_earlier_one(
    federated_data: Any, federated_trainer: Any
) -> None:
    for keep in (True, False):
        trainer = federated_trainer(rounds=0, local_max_epochs=1, keep_messages=keep)
        trainer.fit(small_distiller(), datamodule=federated_data())
        assert (trainer.run_dir / "messages").exists() == keep


def test_a_resumed_run_keeps_one_message_for_every_line(federated_data: Any, federated_trainer: Any) -> None:
    from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise

    settings = {"rounds": 2, "local_max_epochs": 1, "keep_messages": True}
    with pytest.raises(KeyboardInterrupt):
        federated_trainer(callbacks=[PrivacyNoise(0.05), Die(2)], **settings).fit(
            small_distiller(), datamodule=federated_data()
        )
    trainer = federated_trainer(**settings)
    orphan = MessageStore(trainer.run_dir / "messages")
    orphan.keep(b"kept, and cut off before its line was written")
    trainer.fit(small_distiller(), datamodule=federated_data(), ckpt_path="last")
    entries = lines(trainer.run_dir)
    assert any(entry.get("resent") for entry in entries)
    assert {entry["sha256"] for entry in entries} == orphan.names()


def test_a_run_cut_off_before_its_first_state_keeps_what_it_had_sent(
    federated_data: Any, federated_trainer: Any
) -> None:
    """Its line stays in the ledger, and an audit asks for the message of every line."""
    from lightning_sfubm.audit.check import check_run
    from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise

    class DieAtOnce(FederatedCallback):
        def on_upload(self, loop: Any, client: str, kind: str, tensors: Any) -> Any:
            if client == "beta":
                raise KeyboardInterrupt
            return tensors

    settings = {"rounds": 0, "local_max_epochs": 1, "keep_messages": True}
    cut = federated_trainer(callbacks=[PrivacyNoise(0.05), DieAtOnce()], **settings)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(small_distiller(), datamodule=federated_data())
    (sent,) = lines(cut.run_dir)
    (cut.run_dir / "audit.json").write_text("of what was sent until then")
    trainer = federated_trainer(**settings)
    trainer.fit(small_distiller(), datamodule=federated_data(), ckpt_path="last")
    check = check_run(trainer.run_dir)
    assert lines(trainer.run_dir)[0] == sent
    assert (check.problems, check.unchecked, check.recorded) == ([], [], check.lines)
    assert not (trainer.run_dir / "audit.json").exists()


def test_a_changed_or_missing_message_is_not_handed_out(tmp_path: Path) -> None:
    store = MessageStore(tmp_path / "messages")
    assert store.names() == set()
    store.keep(b"payload")
    (name,) = store.names()
    assert store.read(name) == b"payload"
    (tmp_path / "messages" / name).write_bytes(b"other")
    with pytest.raises(PrivacyError, match="changed"):
        store.read(name)
    with pytest.raises(PrivacyError, match="not recorded"):
        store.read("0" * 64)
