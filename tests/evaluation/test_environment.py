import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from lightning_sfubm.evaluation import environment as module
from lightning_sfubm.evaluation.environment import environment
from lightning_sfubm.precision import has_fast_bf16


def test_the_environment_says_what_figures_depend_on() -> None:
    facts = json.loads(json.dumps(environment()))
    hardware = facts["hardware"]
    assert hardware["threads"] == torch.get_num_threads()
    assert hardware["bf16"] is has_fast_bf16(torch.device("cpu"))
    assert hardware["vectors"]
    assert {"python", "torch", "lightning", "transformers"} <= set(facts["versions"])
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?|unknown", facts["commit"])


def test_the_commit_is_of_this_package_and_not_of_a_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package installed in an environment below somebody's own repository."""

    def git(*arguments: str) -> str:
        names = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
        done = subprocess.run(["git", *names, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    (tmp_path / "environment.py").write_text("")
    (tmp_path / "theirs.py").write_text("")
    git("init", "-q")
    git("add", "theirs.py")
    git("commit", "-qm", "theirs")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "environment.py"))
    assert module.commit() == "unknown"
    git("add", "environment.py")
    git("commit", "-qm", "a checkout of this package")
    head = git("rev-parse", "--short=12", "HEAD")
    assert module.commit() == head
    (tmp_path / "notes.py").write_text("")  # beside the code
    assert module.commit() == head
    new = tmp_path / "modules" / "encoders" / "own.py"
    new.parent.mkdir(parents=True)
    new.write_text("")
    assert module.commit() == f"{head}+changes"
