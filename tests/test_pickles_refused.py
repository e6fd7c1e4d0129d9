"""A pickle that would leave a mark is fed to every reader of outside data: one clear error, and never the mark (T3, T31)."""

import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_sfubm.__main__ import main
from lightning_sfubm.errors import AssetError, CheckpointError, ConfigError, DataError, MessageError, SFUBMError
from tests.conftest import small_distiller
from tests.test_cli import sequential  # noqa: F401

MARK = "executed"


class Bomb:
    """Makes the file MARK in the working directory when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(MARK),))


def zipped(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def archive() -> bytes:
    """A numpy archive whose arrays are pickled objects."""
    buffer = io.BytesIO()
    boxed = np.array([Bomb()], dtype=object)
    np.savez(buffer, keys=boxed, vectors=boxed)
    return buffer.getvalue()


#: the same bomb as a bare pickle, as a torch file, hidden in one among good entries, in torch's old form, in numpy's
BOMBS: dict[str, Callable[[], bytes]] = {
    "pickle": lambda: pickle.dumps(Bomb()),
    "pickle0": lambda: pickle.dumps(Bomb(), protocol=0),
    "torch": lambda: zipped(Bomb()),
    "checkpoint": lambda: zipped({"state_dict": {}, "stage1_shapes": {"module": "FKDDistiller"}, "callbacks": Bomb()}),
    "numpy": archive,
}


@pytest.fixture(params=BOMBS)
def bomb(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    return BOMBS[request.param]()


@pytest.fixture(autouse=True)
def no_mark(tmp_path: Path) -> Any:
    """After each test, whatever it read: no mark."""
    yield
    assert not list(tmp_path.rglob(MARK)), "a pickle was executed"


def written(content: bytes, name: str) -> Path:
    path = Path(name).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_the_bomb_goes_off_where_a_pickle_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for make in (BOMBS["pickle"], BOMBS["pickle0"]):
        pickle.loads(make())
        Path(MARK).unlink()
    torch.load(io.BytesIO(BOMBS["checkpoint"]()), weights_only=False)
    Path(MARK).unlink()
    np.load(io.BytesIO(BOMBS["numpy"]()), allow_pickle=True)["keys"]
    Path(MARK).unlink()


def read_message(path: Path) -> None:
    from lightning_sfubm.federated.messages import semantics_schema, unpack

    unpack(semantics_schema(4), path.read_bytes())


def read_secagg_message(path: Path) -> None:
    from lightning_sfubm.privacy.secagg.wire import unpack

    unpack("keys", path.read_bytes(), sender="a", round=0, session=None, clients=100)


def read_ledger(path: Path) -> None:
    from lightning_sfubm.federated.ledger import read_ledger

    read_ledger(path)


def read_state(path: Path) -> None:
    from lightning_sfubm.federated.checkpoint import find_state

    path.rename(path.with_name("loop.json"))
    find_state(path.parent)


def read_stage1(path: Path) -> None:
    from lightning_sfubm.modules.llm.stage1 import load_stage1

    load_stage1(path, None)  # type: ignore[arg-type]


def read_projector(path: Path) -> None:
    from lightning_sfubm.modules.llm_head import LLMHead

    head = LLMHead("no-model")
    head.projector = torch.nn.Linear(1, 1)  # type: ignore[assignment]
    head._load_projector(str(path))


def read_candidates(path: Path) -> None:
    from lightning_sfubm.evaluation.candidates import CandidateLists

    CandidateLists.load(path)


def read_results(path: Path) -> None:
    from lightning_sfubm.evaluation.results import FORMAT, PerUserResults

    path = path.rename(path.with_suffix(".parquet"))
    side = {"format": FORMAT, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(side))
    PerUserResults.load(path)


def read_side_file(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lightning_sfubm.evaluation.results import PerUserResults

    path.rename(path.with_suffix(".json"))
    pq.write_table(pa.table({"user": [1]}), path.with_suffix(".parquet"))
    PerUserResults.load(path.with_suffix(".parquet"))


def read_table(path: Path) -> None:
    from lightning_sfubm.datamodules.readers.table import TableReader

    path.rename(path.with_name("interactions.parquet"))
    path.with_name("items.csv").write_text("item_id,title\ni1,One\n")
    TableReader(path.parent.name).read(path.parent.parent)


def read_manifest(path: Path) -> None:
    from lightning_sfubm.assets import MANIFEST, verify

    path.rename(path.with_name(MANIFEST))
    verify(path.parent)


def read_published(path: Path) -> None:
    from lightning_sfubm.grid.command import _published_facts

    path.rename(path.with_name("comparisons.json"))
    _published_facts(path.parent)


def read_template(path: Path) -> None:
    from lightning_sfubm.datamodules.prompt_templates import load_template

    load_template(str(path.rename(path.with_suffix(".yaml"))), "list")


def read_grid(path: Path) -> None:
    from lightning_sfubm.grid.spec import load_grid

    load_grid(path.rename(path.with_suffix(".yaml")), {"stage1"})


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (read_message, MessageError),
        (read_secagg_message, MessageError),
        (read_ledger, CheckpointError),
        (read_state, CheckpointError),
        (read_stage1, CheckpointError),
        (read_projector, CheckpointError),
        (read_candidates, DataError),
        (read_results, DataError),
        (read_side_file, DataError),
        (read_table, DataError),
        (read_manifest, AssetError),
        (read_published, DataError),
        (read_template, SFUBMError),
        (read_grid, SFUBMError),
    ],
)
def test_a_reader_refuses_a_pickle(bomb: bytes, read: Callable[[Path], None], error: type[SFUBMError]) -> None:
    with pytest.raises(error) as caught:
        read(written(bomb, "outside/data.bin"))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["domain.json", "interactions.arrow", "users.arrow", "items.arrow"])
def test_a_prepared_domain_refuses_a_pickle(bomb: bytes, name: str, federated_data: Any) -> None:
    data = federated_data(domains=1)
    data.prepare_data()
    (entry,) = (path for path in Path("cache/domains").iterdir() if path.is_dir())
    (entry / name).write_bytes(bomb)
    with pytest.raises(DataError, match="damaged cache entry"):
        federated_data(domains=1).setup("fit")


def test_a_text_store_deletes_a_pickle_and_computes_again(bomb: bytes) -> None:
    from lightning_sfubm.datamodules.synthetic import HashingTextEncoder
    from lightning_sfubm.datamodules.text import encode_cached

    path = written(bomb, "texts/piece.npz")
    vectors = encode_cached(HashingTextEncoder(dim=8), ["one", "two"], folder="texts")
    assert vectors.shape == (2, 8)
    assert not path.exists()


def test_a_cell_of_the_grid_that_is_a_pickle_counts_as_missing(bomb: bytes) -> None:
    from lightning_sfubm.grid.cells import read_cell
    from lightning_sfubm.grid.runner import _mark_of

    assert read_cell(written(bomb, "cell.json")) is None
    assert _mark_of(written(bomb, "mark.json")) is None


def test_a_report_names_files_that_are_pickles(bomb: bytes) -> None:
    from lightning_sfubm.evaluation.run_folder import RunFolder

    for name in ("run.json", "privacy.json", "history.jsonl", "ledger.jsonl"):
        written(bomb, f"run/{name}")
    assert len(RunFolder.read(Path("run")).problems) >= 4


@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
def test_a_trainer_refuses_a_checkpoint_that_is_a_pickle(bomb: bytes, method: str, federated_data: Any) -> None:
    from lightning_sfubm.federated.trainer import FederatedTrainer

    data = federated_data(domains=1).domains["alpha"]
    trainer = FederatedTrainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1)
    path = written(bomb, "last.ckpt")
    for flag in (None, False):  # also where it is told to trust the file
        with pytest.raises(CheckpointError, match=r"last\.ckpt: not a safe checkpoint"):
            getattr(trainer, method)(small_distiller(), datamodule=data, ckpt_path=path, weights_only=flag)


def test_a_trainer_reads_no_checkpoint_from_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, federated_data: Any
) -> None:
    from lightning_sfubm.federated.trainer import FederatedTrainer

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *a, **k: pytest.fail("the network was asked"))
    trainer = FederatedTrainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1)
    with pytest.raises(CheckpointError, match="files only"):
        trainer.fit(
            small_distiller(),
            datamodule=federated_data(domains=1).domains["alpha"],
            ckpt_path="https://x.invalid/a.ckpt",
        )


def test_load_from_checkpoint_refuses_a_pickle(bomb: bytes) -> None:
    from lightning_sfubm.modules.fkd import FKDDistiller

    with pytest.raises(Exception):  # Lightning's own function: torch's error stands
        FKDDistiller.load_from_checkpoint(written(bomb, "last.ckpt"))


@pytest.mark.parametrize("class_path", ["subprocess.Popen", "pathlib.Path.touch", "os.system"])
def test_load_from_checkpoint_builds_no_foreign_object(class_path: str, tmp_path: Path, monkeypatch: Any) -> None:
    from lightning_sfubm.modules.fkd import FKDDistiller

    monkeypatch.chdir(tmp_path)
    arguments = {"subprocess.Popen": {"args": ["touch", MARK]}, "pathlib.Path.touch": {"self": MARK}}
    foreign = {"class_path": class_path, "init_args": arguments.get(class_path, {"command": f"touch {MARK}"})}
    settings = {"encoder": foreign, "_instantiator": "lightning.pytorch.cli.instantiate_module"}
    path = written(zipped({"state_dict": {}, "hyper_parameters": settings, "pytorch-lightning_version": "2.6.0"}), "x")
    with pytest.raises(Exception, match="does not correspond to a subclass"):
        FKDDistiller.load_from_checkpoint(path, weights_only=True)


def test_the_command_line_refuses_pickles(
    bomb: bytes,
    sequential: list[str],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = written(bomb, "last.ckpt")
    config = Path(__file__).resolve().parent.parent / "configs/debug/synthetic.yaml"
    hostile = written(b"trainer: !!python/object/apply:os.system ['touch executed']\n", "hostile.yaml")
    for arguments in (
        ["test", *sequential, "--ckpt_path", str(path)],
        ["fit", *sequential, "--ckpt_path", str(path)],
        ["fit", "--config", str(config), "--ckpt_path", str(path)],
        ["test", "--ckpt_path", str(path)],
        ["fit", "--config", str(path)],
        ["fit", "--config", str(config), "--config", str(hostile)],
        ["results", "--grid", str(path)],
        ["results", "--grid", str(hostile)],
    ):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2, arguments
        assert "Traceback" not in capsys.readouterr().err


def tampered(state: Path, name: str, content: bytes) -> None:
    """Put ``content`` into a state as who can write to the folder would: with its hash put right."""
    (state / name).write_bytes(content)
    loop = json.loads((state / "loop.json").read_text())
    loop["files"][name] = hashlib.sha256(content).hexdigest()
    (state / "loop.json").write_text(json.dumps(loop))


@pytest.mark.slow
def test_a_federated_state_refuses_pickles_with_the_right_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, federated_data: Any, federated_trainer: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = federated_trainer(rounds=1, local_max_epochs=1)
    trainer.fit(small_distiller(), datamodule=federated_data())
    state = max(trainer.loop.checkpoints.glob("state-*"))
    for name in ("server.ckpt", "clients/alpha.ckpt"):
        good = (state / name).read_bytes()
        others = (zipped({}), zipped([1]), zipped({"state_dict": {"x": torch.ones(1)}}))
        for content in (*(make() for make in BOMBS.values()), *others):
            tampered(state, name, content)
            again = federated_trainer(rounds=1, local_max_epochs=1)
            with pytest.raises(CheckpointError):
                again.test(small_distiller(), datamodule=federated_data(), ckpt_path=state, verbose=False)
        tampered(state, name, good)


def test_a_model_folder_with_pickled_weights_is_refused(bomb: bytes) -> None:
    from lightning_sfubm.modules.llm.backbone import Backbone
    from lightning_sfubm.modules.llm.tiny import write_tiny_llm

    folder = write_tiny_llm(Path("llm").absolute())
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(ConfigError, match="safetensors"):
        Backbone(str(folder))
