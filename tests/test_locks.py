"""Locks on folders: one process at a time, again within it, and none left behind."""

import fcntl
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_sfubm.__main__ import main
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.locks import LOCK, check_writable, locked

HOLD = """
import sys
from pathlib import Path
from lightning_sfubm.locks import locked

with locked(Path(sys.argv[1]), "--out"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that keeps a folder until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_a_folder_is_kept_while_the_process_lives(tmp_path: Path, end: str) -> None:
    other = holder(tmp_path / "new")
    try:
        with (
            pytest.raises(ConfigError, match=r"/new: another process is at work there.* by --out$"),
            locked(tmp_path / "new", "--out"),
        ):
            pass
        with locked(tmp_path / "elsewhere", "--out"):
            pass
    finally:
        other.kill() if end == "kill" else other.communicate()
        other.wait()
    with locked(tmp_path / "new", "--out"):
        assert (tmp_path / "new" / LOCK).is_file()
    if end == "kill":  # the folder was there, with what the dead process left
        assert list((tmp_path / "new").iterdir()) == []
    else:  # nobody has left anything in it
        assert not (tmp_path / "new").exists()
    with locked(tmp_path / "filled", "--out"):
        (tmp_path / "filled/ledger").write_text("")
    assert [path.name for path in (tmp_path / "filled").iterdir()] == ["ledger"]


def test_folders_made_for_a_lock_alone_go_with_it(tmp_path: Path) -> None:
    with locked(tmp_path / "runs" / "new" / "one", "--out"):
        (tmp_path / "runs" / "other").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "other"]


def test_a_process_may_ask_again_within_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        with locked(tmp_path, "--out"):
            with locked(Path(), "--out"):
                pass
            assert (tmp_path / LOCK).is_file()  # the inner one has not let go
            raise KeyError

    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with pytest.raises(KeyError):
            work()
        assert not (tmp_path / LOCK).exists()


def test_a_lock_file_deleted_just_now_by_the_process_that_held_it_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, times = tmp_path / LOCK, []

    def flock(file: Any, how: int) -> None:
        times.append(how)
        if len(times) == 1:
            path.unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path, "--out"):
        assert (len(times), path.is_file()) == (2, True)


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with caplog.at_level(logging.WARNING), locked(tmp_path, "--out"):
        assert f"{tmp_path} cannot be locked" in caplog.text


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file/out", "Not a directory"),
        ("file", "File exists"),
        ("x" * 300, "File name too long"),
        ("a\0b", "null (byte|character)"),
    ],
)
def test_a_folder_that_cannot_be_is_one_sentence(tmp_path: Path, place: str, reason: str) -> None:
    (tmp_path / "file").write_text("text")
    with (
        pytest.raises(ConfigError, match=f"cannot be written into .*{reason}.*; give another folder by --out$"),
        locked(tmp_path / place, "--out"),
    ):
        pass
    with pytest.raises(ConfigError, match=f"cannot be written into .*{reason}.*; give another folder by --out$"):
        check_writable(tmp_path / place, "--out")
    assert (tmp_path / "file").read_text() == "text"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_nobody_may_write_to_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with (
        pytest.raises(
            ConfigError, match=r"cannot be written into \(Permission denied\); give another folder by --out$"
        ),
        locked(tmp_path / "out", "--out"),
    ):
        pass
    tmp_path.chmod(0o700)


def test_the_command_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    grid = str(Path(__file__).resolve().parent.parent / "configs/results/demo.yaml")
    with pytest.raises(SystemExit) as exit:
        main(["results", "--grid", grid, "--out", str(tmp_path / "file/out")])
    assert exit.value.code == 2
    assert "file/out' cannot be written into (Not a directory)" in capsys.readouterr().err


def test_a_folder_that_is_only_looked_at_is_left_as_it_is(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder", "--out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("text")
    check_writable(tmp_path, "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
