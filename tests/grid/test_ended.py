"""A command that is told to end ends the run that is at work."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.grid.stand_ins import grid_file

COMMAND = """
import sys
from pathlib import Path
from types import SimpleNamespace
from lightning_sfubm.grid import runner
from lightning_sfubm.grid.spec import load_grid
from lightning_sfubm.methods import METHODS

grid, out, fit = map(Path, sys.argv[1:])
runner.sources = lambda *of: {"a": "1"}
runner.sys = SimpleNamespace(executable=str(fit))
runner.run_grid(load_grid(grid, set(METHODS)), out, None, [], None)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_run_ends_with_the_command_that_started_it(tmp_path: Path, number: signal.Signals) -> None:
    started = tmp_path / "started"
    fit = tmp_path / "fit.sh"
    fit.write_text(f"#!/bin/sh\necho $$ >> {started}\nexec sleep 600\n")
    fit.chmod(0o755)
    arguments = [sys.executable, "-c", COMMAND, str(grid_file(tmp_path)), str(tmp_path / "out"), str(fit)]
    heard = partial(signal.signal, number, signal.SIG_DFL)  # tests in the background of a script ignore an interrupt
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(arguments, preexec_fn=heard, **quiet) as command:  # type: ignore[call-overload]
        try:
            until = time.monotonic() + 120
            while not (started.is_file() and started.read_text().strip()):
                assert command.poll() is None, "the command ended by itself"
                assert time.monotonic() < until
                time.sleep(0.05)
            command.send_signal(number)
            assert command.wait(timeout=60) != 0
        finally:
            command.kill()
    (pid,) = started.read_text().split()  # and no further run was begun
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
