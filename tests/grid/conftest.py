import subprocess
from types import SimpleNamespace

import pytest

from lightning_sfubm.grid import runner
from tests.grid.stand_ins import FakeFit


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> FakeFit:
    fake = FakeFit()
    monkeypatch.setattr(runner, "sources", lambda *of: {"a": "1", "b": "1"})
    stands_in = SimpleNamespace(Popen=fake, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(runner, "subprocess", stands_in)
    monkeypatch.setattr(runner, "environment", lambda: {"commit": "c", "hardware": {}, "versions": {}})
    return fake
