"""10,000 mutated ledgers: each is refused with CheckpointError, or says what the original says but for its last line.

The chain fixes every line but the last: what was cut off behind it, or made of it, nothing in the file can tell.
"""

import json
import random
from pathlib import Path

import pytest

from lightning_sfubm.errors import CheckpointError
from lightning_sfubm.federated.ledger import PRIVATE, Ledger, read_ledger

COUNT = 10_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of six messages."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.start()
    for number in range(6):
        shape: dict[str, dict[str, object]] = {"w": {"shape": [3, number], "dtype": "float32"}}
        ledger.record_bytes("beauté", "up", "teacher", number, bytes([number]), {"sigma": 0.1}, shape)
    return ledger.path


def mutate(rng: random.Random, content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    action = rng.randrange(12)
    if action == 0:
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if action == 1:
        return content[: rng.randrange(len(content))]
    if action == 2:
        del lines[place]
    elif action == 3:
        lines.insert(place, rng.choice(lines))
    elif action == 4:
        rng.shuffle(lines)
    elif action == 5:
        entry = json.loads(lines[place])
        entry[rng.choice([*entry, "resent", "note"])] = rng.choice([None, 1, -1, "x", "0" * 64, [], {}, [1], True, 1.5])
        lines[place] = json.dumps(entry, sort_keys=True).encode() + b"\n"
    elif action == 6:
        entry = json.loads(lines[place])
        del entry[rng.choice(list(entry))]
        lines[place] = json.dumps(entry, sort_keys=True).encode() + b"\n"
    elif action == 7:  # a second spelling, or a second value for a key
        lines[place] = rng.choice(
            [
                json.dumps(json.loads(lines[place])).replace(" ", "").encode() + b"\n",
                lines[place].replace(b'"bytes": 1', b'"bytes": 9, "bytes": 1'),
                b" " + lines[place],
                b"\n" + lines[place],
            ]
        )
    elif action == 8:
        depth = rng.choice([10, 5_000, 100_000])
        lines[place] = rng.choice([b"[" * depth, b'{"a":' * depth, b"9" * depth, b"null", b'"previous"', b"7"]) + b"\n"
    elif action == 9:
        lines[place] = rng.choice([b"\xff\xfe\n", b"\x80\x04}.\n", b"\x0b\n", "\u2028\n".encode(), b"\r\n", b"\x00\n"])
    elif action == 10:
        return content + rng.randbytes(rng.randint(1, 30)) + rng.choice([b"", b"\n"])
    else:
        return rng.randbytes(rng.randint(0, 100))
    return b"".join(lines)


@pytest.mark.slow
def test_mutated_ledgers_are_refused_or_say_what_was_written(path: Path) -> None:
    rng, content, original, read = random.Random(5), path.read_bytes(), read_ledger(path), 0
    for _ in range(COUNT):
        changed = mutate(rng, content)
        path.write_bytes(changed)
        try:
            found = read_ledger(path)
        except CheckpointError:
            pass
        else:
            read += 1
            assert found[:-1] == original[: max(len(found) - 1, 0)], changed
            assert len(found) <= len(original) + 1
        if rng.random() < 0.7:
            continue
        count = rng.randint(0, 7)
        try:
            ledger = Ledger(path)
            ledger.resume(count)
            assert ledger.entries >= count
        except CheckpointError:
            continue
        ledger.record_bytes("beauté", "down", "teacher", 7, b"x", {})
        assert len(read_ledger(path)) == ledger.entries
    assert COUNT // 50 < read < COUNT // 2


def test_a_ledger_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ledger.jsonl.*cannot be read"):
        read_ledger(tmp_path / "ledger.jsonl")


def test_sent_again_is_what_says_the_same_after_the_state_that_a_run_goes_on_from(path: Path) -> None:
    ledger = Ledger(path)
    ledger.resume(4)
    assert [line["round"] for line in ledger.since] == [4, 5]

    def record(client: str, direction: str, kind: str, round: int, payload: bytes) -> None:
        ledger.record_bytes(client, direction, kind, round, payload, {})

    record("beauté", "up", "teacher", 4, bytes([4]))
    record("beauté", "up", "teacher", 5, b"other content")
    record("beauté", "up", "semantics", 5, bytes([5]))
    record("beauté", "down", "teacher", 5, bytes([5]))
    record("books", "up", "teacher", 5, bytes([5]))
    record("beauté", "up", "teacher", 3, bytes([3]))  # the state knows of the first one
    assert [line.get("resent", False) for line in read_ledger(path)[6:]] == [True] + 5 * [False]


def test_private_steps_that_a_state_does_not_know_of_are_those_not_sent_again(tmp_path: Path) -> None:
    def record(ledger: Ledger, round: int, mechanism: dict[str, object]) -> None:
        ledger.record_bytes("a", "up", "teacher", round, bytes([round]), mechanism)

    begun = Ledger(tmp_path / "ledger.jsonl")
    begun.start()
    for round in range(1, 4):
        record(begun, round, {PRIVATE: {"steps": 4 * round}})
    record(begun, 4, {"sigma": 0.1})
    begun.record_bytes("a", "up", "semantics", 3, b"vectors", {"sigma": 0.1})
    resumed = Ledger(begun.path)
    resumed.resume(1)
    resumed.record_bytes("a", "up", "semantics", 3, b"vectors", {"sigma": 0.1})  # again, but not its weights
    assert resumed.private_since("a") == {2: 8, 3: 12}
    assert resumed.private_since("b") == {}
    record(resumed, 2, {PRIVATE: {"steps": 8}})
    assert resumed.private_since("a") == {3: 12}
