"""The benchmark of federations: its comparison of epsilons sees an accountant that is wrong."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lightning_sfubm.privacy import accounting

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "federated.py"
SAMPLED, EVERYBODY = (1.0, 0.01, 1000, 1e-5), (5.0, 1.0, 50, 1e-5)
PLD = {SAMPLED: 1.8282, EVERYBODY: 6.5730}  # dp-accounting 0.6.0


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("federated_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GRID", [SAMPLED, EVERYBODY])
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    accounting._epsilon.cache_clear()
    accounting._step_rdp.cache_clear()
    yield module
    accounting._epsilon.cache_clear()  # nothing that a test computed with a changed Opacus stays
    accounting._step_rdp.cache_clear()


def install_dp_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much of dp-accounting as the benchmark calls, with the epsilons of its own."""

    class PLDAccountant:
        def compose(self, event: tuple[float, float], count: int) -> "PLDAccountant":
            self.event = (*event, count)
            return self

        def get_epsilon(self, delta: float) -> float:
            return PLD[(*self.event, delta)]

    package, pld = ModuleType("dp_accounting"), ModuleType("dp_accounting.pld")
    package.__dict__.update(
        pld=pld,
        GaussianDpEvent=lambda noise: SimpleNamespace(noise=noise),
        PoissonSampledDpEvent=lambda rate, event: (event.noise, rate),
    )
    pld.__dict__.update(PLDAccountant=PLDAccountant)
    monkeypatch.setitem(sys.modules, "dp_accounting", package)
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", pld)


def test_ours_is_above_the_exact_epsilon_and_near_it(script: Any) -> None:
    found = script.part_epsilon()
    assert found["met"]
    assert [row["exact"] for row in found["rows"]] == [None, pytest.approx(PLD[EVERYBODY], abs=1e-4)]
    assert found["prv_above"].keys() == {"exact"}
    assert "epsilon, prv_above exact: 0.0103" in script.table({"epsilon": found})


def test_with_sampling_dp_accounting_is_what_ours_is_compared_with(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_dp_accounting(monkeypatch)
    found = script.part_epsilon()
    assert found["met"]
    assert [row["pld"] for row in found["rows"]] == [PLD[SAMPLED], PLD[EVERYBODY]]
    monkeypatch.setitem(PLD, SAMPLED, 1.9)
    assert not script.part_epsilon()["met"]


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_a_wrong_prv_of_opacus_is_seen(script: Any, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    from opacus.accountants import PRVAccountant

    right = PRVAccountant.get_epsilon
    monkeypatch.setattr(PRVAccountant, "get_epsilon", lambda *a, **k: share * right(*a, **k))
    assert not script.part_epsilon()["met"]


def test_an_rdp_of_opacus_that_promises_too_much_is_seen(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from opacus.accountants.analysis import rdp

    right = rdp.compute_rdp
    monkeypatch.setattr(rdp, "compute_rdp", lambda **k: 0.8 * right(**k))
    assert not script.part_epsilon()["met"]
