"""Ledger and recorded messages: what agrees is said to agree, and any tampering is found and named."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from lightning_sfubm.audit.check import check_run
from lightning_sfubm.audit.command import _secrets_or_raise
from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.errors import PrivacyError
from lightning_sfubm.federated.ledger import GENESIS, Ledger, entry_hash
from lightning_sfubm.federated.messages import Message, pack, semantics_schema, teacher_schema
from lightning_sfubm.federated.recording import MessageStore
from lightning_sfubm.privacy.secret import client_secret

TEACHER = {"w": torch.zeros(2, 3)}
SCHEMAS = {
    ("semantics", "up"): semantics_schema(4),
    ("teacher", "up"): teacher_schema(TEACHER, with_weight=False),
    ("teacher", "down"): teacher_schema(TEACHER, with_weight=False),
}


def messages() -> list[tuple[str, str, Message]]:
    vectors = normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    return [
        ("a", "up", pack(SCHEMAS["semantics", "up"], "a", 0, {"vectors": vectors})),
        ("a", "up", pack(SCHEMAS["teacher", "up"], "a", 1, {"w": torch.ones(2, 3)})),
        ("b", "up", pack(SCHEMAS["teacher", "up"], "b", 1, {"w": torch.zeros(2, 3)})),
        ("a", "down", pack(SCHEMAS["teacher", "down"], "server", 1, {"w": torch.full((2, 3), 0.5)})),
    ]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    ledger = Ledger(tmp_path / "ledger.jsonl", MessageStore(tmp_path / "messages"))
    ledger.start()
    for client, direction, message in messages():
        ledger.record(client, direction, message, {"mechanism": "test"} if direction == "up" else {})
    ledger.record_bytes("a", "up", "secagg masked input", 1, b"masked", {})
    return tmp_path


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]


def rewrite(run_dir: Path, entries: list[dict[str, Any]], chained: bool = False) -> None:
    """Put a ledger in place; ``chained`` = with new hashes, as a forger would who knows the format."""
    last = GENESIS
    for entry in entries:
        if chained:
            entry["previous"] = last
            last = entry_hash(entry)
    (run_dir / "ledger.jsonl").write_text("".join(json.dumps(e, sort_keys=True) + "\n" for e in entries))


def test_what_agrees_is_counted(run_dir: Path) -> None:
    check = check_run(run_dir, SCHEMAS)
    assert check.problems == []
    assert (check.lines, check.recorded, check.parsed) == (5, 5, 4)
    assert check.bytes["up"] + check.bytes["down"] == sum(entry["bytes"] for entry in lines(run_dir))
    assert check.head == entry_hash(lines(run_dir)[-1])
    assert [entry["client"] for entry, _ in check.messages] == ["a", "a", "b", "a"]
    assert "messages" not in check.facts()


def test_without_recordings_the_ledger_alone_is_checked(run_dir: Path) -> None:
    for path in (run_dir / "messages").iterdir():
        path.unlink()
    check = check_run(run_dir, SCHEMAS)
    assert (check.lines, check.recorded, check.problems) == (5, 0, [])


def _edited(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    entries[1]["round"] = 2
    return entries


@pytest.mark.parametrize(
    "tamper",
    [_edited, lambda e: e[1:], lambda e: [e[0], *e[2:]], lambda e: [e[1], e[0], *e[2:]], lambda e: [*e[:2], *e[1:]]],
)
def test_a_line_changed_removed_moved_or_repeated_breaks_the_chain(
    run_dir: Path, tamper: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
) -> None:
    rewrite(run_dir, tamper(lines(run_dir)))
    (problem,) = check_run(run_dir, SCHEMAS).problems
    assert "does not follow" in problem


def _set(number: int, key: str, value: Any) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    def change(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        entries[number][key] = value
        return entries

    return change


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (_set(1, "round", 2), "another round"),
        (_set(1, "client", "b"), "another sender"),
        (_set(1, "bytes", 7), "states 7 bytes"),
        (_set(1, "content_sha256", "0" * 64), "another content"),
        (_set(1, "tensors", {}), "another set of tensors"),
        (_set(1, "sha256", "0" * 64), "not recorded"),
        (_set(1, "kind", "semantics"), "kind 'teacher' where 'semantics' is expected"),
        (_set(1, "direction", "sideways"), "direction missing or unreadable"),
        (_set(1, "mechanism", "strong"), "not an entry of a ledger"),
        (lambda e: e[:-1], "1 recorded messages have no line"),
        (lambda e: [*e, e[1]], "a message not seen before"),
    ],
)
def test_a_ledger_rewritten_with_new_hashes_contradicts_the_messages(
    run_dir: Path, tamper: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], words: str
) -> None:
    rewrite(run_dir, [dict(entry) for entry in tamper(lines(run_dir))], chained=True)
    assert any(words in problem for problem in check_run(run_dir, SCHEMAS).problems)


def test_a_message_changed_or_deleted_is_named(run_dir: Path) -> None:
    first, second = lines(run_dir)[:2]
    path = run_dir / "messages" / first["sha256"]
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    (run_dir / "messages" / second["sha256"]).unlink()
    problems = check_run(run_dir, SCHEMAS).problems
    assert "line 1" in problems[0]
    assert "changed" in problems[0]
    assert "line 2" in problems[1]
    assert "not recorded" in problems[1]


def test_a_ledger_cut_at_the_end_is_shorter_than_the_checkpoint_says(run_dir: Path) -> None:
    for path in (run_dir / "messages").iterdir():
        path.unlink()
    state = run_dir / "checkpoints" / "state-0003"
    state.mkdir(parents=True)
    (state / "loop.json").write_text(json.dumps({"stored": {"ledger": 5}}))
    check = check_run(run_dir)
    assert (check.problems, check.unchecked) == ([], [])
    rewrite(run_dir, lines(run_dir)[:-1])
    (problem,) = check_run(run_dir).problems
    assert "has 4 lines, state-0003 was written after 5" in problem


def test_without_a_whole_newest_checkpoint_the_end_is_said_not_to_be_checked(run_dir: Path) -> None:
    (sentence,) = check_run(run_dir).unchecked
    assert "could not be checked: the run folder holds no checkpoint" in sentence
    for number, content in ((1, {"stored": {"ledger": 5}}), (2, {"stored": {}}), (3, {"stored": {"ledger": 4}})):
        state = run_dir / "checkpoints" / f"state-{number:04d}"
        state.mkdir(parents=True)
        (state / "loop.json").write_text(json.dumps(content))
        check = check_run(run_dir)
        assert check.problems == []
        assert len(check.unchecked) == (number > 1)
    assert "state-0003, the newest checkpoint, was written after 4 of them" in check.unchecked[0]
    assert check.facts()["unchecked"] == check.unchecked


def test_no_ledger_and_no_json_are_problems(tmp_path: Path) -> None:
    assert "there is no ledger" in check_run(tmp_path).problems[0]
    (tmp_path / "ledger.jsonl").write_text("[]\n")
    assert "not an entry" in check_run(tmp_path).problems[0]


def test_many_problems_are_summed_up(run_dir: Path) -> None:
    entries = [{**lines(run_dir)[0], "sha256": f"{number:064d}"} for number in range(40)]
    rewrite(run_dir, entries, chained=True)
    problems = check_run(run_dir).problems
    assert len(problems) == 21
    assert problems[-1] == "and 21 more problems"


@pytest.mark.parametrize("holder", ["callback", "aggregator"])
def test_an_audit_without_the_secrets_of_the_run_is_refused_and_makes_none(holder: str, tmp_path: Path) -> None:
    keyed, plain = SimpleNamespace(secret_dir=str(tmp_path / "secrets")), PrivacyNoise(0.05)
    callbacks, aggregator = ([keyed, plain], None) if holder == "callback" else ([plain], keyed)
    trainer = SimpleNamespace(callbacks=callbacks, federation=SimpleNamespace(aggregator=aggregator))
    client_secret(tmp_path / "secrets", "alpha")
    _secrets_or_raise(trainer, ["alpha"])  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match=r"beta\.key, the secret the run was made with, is not there"):
        _secrets_or_raise(trainer, ["alpha", "beta"])  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "secrets").iterdir()] == ["alpha.key"]
