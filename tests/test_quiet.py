"""What the command line holds back of Lightning's notices, and what it does not."""

import logging
import warnings
from pathlib import Path

import pytest

from lightning_sfubm.__main__ import main
from lightning_sfubm.quiet import quiet_command_line

DIRPATH = "The dirpath has changed from 'a' to 'b'"


@pytest.mark.parametrize("fitting", [True, False])
def test_notices_that_no_user_can_act_on_are_held_back(fitting: bool, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet_command_line(fitting)
        for message in (
            "`isinstance(treespec, LeafSpec)` is deprecated",
            "Starting from v1.9.0, `tensorboardX` has been removed as a dependency of the package",
            "Couldn't infer the batch indices fetched from your dataloader: `DataLoader`",
            DIRPATH,
            "a warning of our own",
        ):
            warnings.warn(message)
    kept = [DIRPATH] if fitting else []  # a fit that goes on forgets the best value then
    assert [str(w.message) for w in shown] == [*kept, "a warning of our own"]

    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with caplog.at_level(logging.INFO, log.name):
        log.info("\N{ELECTRIC LIGHT BULB} Tip: For seamless cloud logging")
        log.info("TPU available: False, using: 0 TPU cores")
        log.info("GPU available: True (cuda), used: True")
    assert caplog.messages == ["GPU available: True (cuda), used: True"]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("fit", ["--nonsense"]),
        ("audit", ["--run_dir", "nowhere"]),
        ("results", ["--grid", "nowhere.yaml"]),
        ("flower-app", ["--config", "nowhere.yaml", "--out", "out"]),
        ("flower-silo", ["--silo", "a", "--config", "nowhere.yaml", "--superlink", "localhost:1", "--insecure"]),
    ],
)
def test_every_command_holds_them_back(
    command: str,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    monkeypatch.setattr(log, "filters", [])
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, log.name):
        log.info("TPU available: False, using: 0 TPU cores")
        assert caplog.messages
        caplog.clear()
        with warnings.catch_warnings(), pytest.raises(SystemExit):
            main([command, *options])
        log.info("TPU available: False, using: 0 TPU cores")
        assert not caplog.messages
