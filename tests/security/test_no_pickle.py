"""No pickle in a path that reads outside data: the source is searched, and every reader is given one (T3)."""

import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_sfubm.datamodules.storage import load_domain
from lightning_sfubm.datamodules.text import _read_store
from lightning_sfubm.errors import CheckpointError, DataError, MessageError
from lightning_sfubm.evaluation.candidates import CandidateLists
from lightning_sfubm.evaluation.results import PerUserResults
from lightning_sfubm.federated.checkpoint import find_state, load_state
from lightning_sfubm.federated.ledger import read_ledger
from lightning_sfubm.federated.messages import semantics_schema, unpack
from lightning_sfubm.grid.cells import read_cell
from tests.conftest import small_distiller

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("lightning_sfubm", "modules", "datamodules", "callbacks", "benchmarks")
FORBIDDEN = {
    "pickle": r"\b(import|from)\s+(pickle|cPickle|_pickle|cloudpickle|dill|joblib|shelve|marshal)\b|\bpickle\.",
    "unsafe yaml": r"\byaml\.(load|unsafe_load|full_load|load_all)\(|(Unsafe|Full)Loader|yaml\.Loader\b",
    "numpy pickles": r"allow_pickle\s*=\s*True",
    "pandas pickles": r"read_pickle|to_pickle",
    "evaluated text": r"(?<![.\w])(eval|exec)\(",
    "shell": r"shell\s*=\s*True|os\.system\(",
}


def sources() -> list[Path]:
    own = {p.resolve() for folder in FOLDERS for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts}
    return sorted(own)


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_source_holds_no(what: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(FORBIDDEN[what], line)
    ]
    assert found == []


def calls(text: str, name: str) -> list[str]:
    """Every call of a function with its arguments, brackets matched."""
    found = []
    for match in re.finditer(re.escape(name) + r"\(", text):
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        found.append(text[match.start() : end])
    return found


def test_every_load_is_a_safe_one() -> None:
    assert calls("torch.load(f(x), weights_only=True)", "torch.load") == ["torch.load(f(x), weights_only=True)"]
    seen = 0
    for path in sources():
        text = path.read_text(encoding="utf-8")
        for call in calls(text, "torch.load"):
            seen += 1
            assert "weights_only=True" in call, f"{path.name}: {call}"
        for call in calls(text, "load_from_checkpoint"):
            assert "weights_only=False" not in call, f"{path.name}: {call}"
        for call in calls(text, ".fit"):
            if "ckpt_path" in call and "trainer.fit" in call:
                assert "weights_only=True" in call or "**" in call, f"{path.name}: {call}"
        for call in calls(text, "np.load"):
            assert "allow_pickle=False" in call or "allow_pickle" not in call, f"{path.name}: {call}"
    assert seen >= 3


class Bomb:
    """Says so when it is unpickled."""

    fired = False

    def __reduce__(self) -> tuple[Any, tuple]:
        return (_fire, ())


def _fire() -> dict:
    Bomb.fired = True
    return {}


def plain() -> bytes:
    return pickle.dumps({"state_dict": Bomb()})


def in_torch_form() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {}, "bomb": Bomb()}, buffer)
    return buffer.getvalue()


def legacy() -> bytes:
    buffer = io.BytesIO()
    torch.save({"bomb": Bomb()}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


# Lightning's safe reader warns of the protocol of what it is about to refuse.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
PICKLES = pytest.mark.parametrize("make", [plain, in_torch_form, legacy])


@pytest.fixture(autouse=True)
def unfired() -> Any:
    Bomb.fired = False
    yield
    assert not Bomb.fired, "a pickle was executed"


def test_the_bomb_works() -> None:
    for make in (in_torch_form, legacy):
        torch.load(io.BytesIO(make()), weights_only=False)
        assert Bomb.fired
        Bomb.fired = False
    pickle.loads(plain())
    assert Bomb.fired
    Bomb.fired = False


@PICKLES
def test_a_message_is_no_pickle(make: Callable[[], bytes]) -> None:
    with pytest.raises(MessageError):
        unpack(semantics_schema(4), make())


@PICKLES
def test_files_of_a_checkpoint_are_no_pickles(
    make: Callable[[], bytes], federated_data: Any, federated_trainer: Any
) -> None:
    """Each file replaced, and its hash with it, as whoever hands over a checkpoint could do."""
    from lightning_sfubm.federated import checkpoint

    trainer = federated_trainer(rounds=1, local_max_epochs=1, flags={"limit_val_batches": 1})
    trainer.fit(small_distiller(), datamodule=federated_data(num_users=30))
    state = find_state(trainer.run_dir / "checkpoints")
    whole = {name: (state / name).read_bytes() for name in ("clients/alpha.ckpt", "server.ckpt", "loop.json")}
    for name in whole:
        (state / name).write_bytes(make())
        if name != "loop.json":
            loop = json.loads(whole["loop.json"])
            loop["files"][name] = checkpoint._sha256(state / name)
            loop["sha256"] = checkpoint._content({k: v for k, v in loop.items() if k != "sha256"})
            (state / "loop.json").write_text(json.dumps(loop))
        with pytest.raises(CheckpointError):
            load_state(state, trainer.loop.server, trainer.loop.clients)
        for restored, content in whole.items():
            (state / restored).write_bytes(content)


@PICKLES
def test_ledgers_results_and_candidate_files_are_no_pickles(make: Callable[[], bytes], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(make())
    with pytest.raises(CheckpointError, match="line 1"):
        read_ledger(path)
    for name in ("results.parquet", "results.json"):
        (tmp_path / name).write_bytes(make())
    with pytest.raises(DataError, match="cannot be read"):
        PerUserResults.load(tmp_path / "results.parquet")
    assert read_cell(path) is None
    with pytest.raises(DataError, match="damaged candidate lists"):
        CandidateLists.load(path)


@PICKLES
def test_stored_text_vectors_are_no_pickles(make: Callable[[], bytes], tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", keys=np.array(["k"]), vectors=np.array([Bomb()], dtype=object))
    (tmp_path / "other.npz").write_bytes(make())
    assert _read_store(tmp_path) == {}
    assert not list(tmp_path.glob("*.npz"))  # thrown away, to be computed again


@PICKLES
def test_a_prepared_domain_is_no_pickle(make: Callable[[], bytes], tmp_path: Path) -> None:
    for name in ("domain.json", "users.arrow", "interactions.arrow", "items.arrow"):
        (tmp_path / name).write_bytes(make())
    with pytest.raises(DataError, match="damaged cache entry"):
        load_domain(tmp_path, "shop")
