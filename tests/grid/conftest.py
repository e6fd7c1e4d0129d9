import pytest

from lightning_sfubm.grid import runner
from tests.grid.stand_ins import FakeFit


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> FakeFit:
    fake = FakeFit()
    monkeypatch.setattr(runner, "sources", lambda *of: {"a": "1", "b": "1"})
    monkeypatch.setattr(runner.subprocess, "run", fake)
    monkeypatch.setattr(runner, "environment", lambda: {"commit": "c", "hardware": {}, "versions": {}})
    return fake
