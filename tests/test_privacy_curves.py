"""The benchmark of privacy beside utility: which finished runs it takes for those it would make."""

import argparse
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "privacy_curves.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script without its training: ``script.made`` lists the folders of the runs it has made."""
    spec = importlib.util.spec_from_file_location("privacy_curves", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.made = []

    class Trainer:
        def __init__(self, default_root_dir: Path, **_: Any) -> None:
            self.folder, self.loop = default_root_dir, object()

        def fit(self, *_: Any, **__: Any) -> None:
            module.made.append(self.folder)

        def build_loop(self, *_: Any) -> SimpleNamespace:
            return SimpleNamespace(run_dir=self.folder)

    def audit(trainer: Any, loop: SimpleNamespace, settings: Any) -> None:
        loop.run_dir.mkdir(parents=True)
        (loop.run_dir / "audit.json").write_text("{}")

    monkeypatch.setattr(module, "FederatedTrainer", Trainer)
    monkeypatch.setattr(module, "audit_run", audit)
    monkeypatch.setattr(module, "evaluate", lambda *_: None)
    return module


def shops(root: Path, rows: str = "u,1,1\n") -> Path:
    for domain in ("beauty", "health"):
        (root / domain).mkdir(parents=True)
        (root / domain / "interactions.csv").write_text(f"user,item,timestamp\n{rows}")
        (root / domain / "items.csv").write_text("item,title\n1,One\n")
    return root


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        data_root=shops(tmp_path / "data"),
        users=40,
        rounds=2,
        local_epochs=1,
        batch=8,
        epsilons=[8],
        sigmas=[0.1],
        shadows=1,
        seed=1,
        out=tmp_path / "runs",
        publish=False,
    )


def test_a_finished_run_is_taken_again_whatever_else_is_asked_for(
    script: Any, options: argparse.Namespace, tmp_path: Path
) -> None:
    first = script.run(options, "epsilon_8", "teacher", [])
    options.epsilons, options.sigmas, options.publish = [8, 2], [], True
    options.data_root = shops(tmp_path / "elsewhere")  # the same content
    assert script.run(options, "epsilon_8", "teacher", []) == first
    assert script.made == [first]


@pytest.mark.parametrize("name", ["users", "rounds", "local_epochs", "batch", "shadows", "seed"])
def test_a_run_of_another_setting_is_not_taken_for_it(script: Any, options: argparse.Namespace, name: str) -> None:
    first = script.run(options, "epsilon_8", "teacher", [])
    setattr(options, name, 2 * getattr(options, name))
    other = script.run(options, "epsilon_8", "teacher", [])
    assert script.made == [first, other]
    assert (first / "audit.json").is_file()  # and can be gone back to


def test_a_run_of_other_data_is_not_taken_for_it(script: Any, options: argparse.Namespace, tmp_path: Path) -> None:
    first = script.run(options, "epsilon_8", "teacher", [])
    options.data_root = shops(tmp_path / "elsewhere", rows="u,1,1\nv,1,2\n")
    assert script.run(options, "epsilon_8", "teacher", []) != first
    assert len(script.made) == 2
