"""What the README says is run: the plug-in encoder from outside the package, the commands, the links (T11)."""

import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.sequential import SequentialRecommender

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """Every lightning-sfubm command of the README, continuation lines joined."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if "lightning-sfubm " in line]


def run(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "SFUBM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "lightning_sfubm", *arguments],
        cwd=folder,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_plug_in_encoder_keeps_the_contract_and_trains_from_outside(tmp_path: Path) -> None:
    source = next(b for b in blocks("python") if "DecayEncoder" in b)
    assert len([line for line in source.splitlines() if line.strip()]) <= 20
    (tmp_path / "my_encoder.py").write_text(source)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    check = "from my_encoder import DecayEncoder; from lightning_sfubm.modules.encoders.checks import check_encoder; "
    done = subprocess.run(
        [sys.executable, "-c", check + "check_encoder(DecayEncoder(16))"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    command = next(c for c in commands() if "DecayEncoder" in c)
    arguments = shlex.split(command.split("lightning-sfubm ", 1)[1])
    done = run(arguments, tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "DecayEncoder alone" in done.stdout
    report = tmp_path / "runs" / "synthetic" / "report.html"
    assert "DecayEncoder alone" in report.read_text()
    again = run(["report", "runs/synthetic"], tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "report.html" in again.stdout


def test_the_passage_on_a_trained_model_loads_one(tmp_path: Path, federated_data: Any) -> None:
    data = federated_data(domains=1).domains["alpha"]
    data.setup("fit")
    module = SequentialRecommender(SASRec(hidden_dim=8, num_layers=1, num_heads=1)).eval()
    module.bind(data.catalogue)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "best.ckpt", weights_only=True)
    source = next(b for b in blocks("python") if "load_from_checkpoint" in b)
    seen: dict[str, Any] = {}
    exec(source.replace("best.ckpt", str(tmp_path / "best.ckpt")), seen)
    assert seen["scores"].shape == (1, data.catalogue.num_items + 1)
    assert torch.equal(seen["scores"], module.score_all({"history": seen["history"]}))


def test_every_command_names_files_that_exist() -> None:
    rows = re.findall(r"`([^`]*--config[^`]*)`", README)
    assert len(rows) >= 5
    for command in (*rows, *commands()):
        for word in re.findall(r"--config (\S+\.yaml)", command):
            if word not in ("a.yaml", "b.yaml"):
                assert (ROOT / word).exists(), word


def text_of(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Places of a page that a link can name, as GitHub makes them of headings."""
    found = set(re.findall(r'<a id="([^"]+)"', text_of(page)))
    times: Counter[str] = Counter()
    for heading in re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower().strip()).replace(" ", "-")
        found.add(f"{name}-{times[name]}" if times[name] else name)
        times[name] += 1
    return found


PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *(ROOT / "benchmarks").rglob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_and_pictures_are_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in link:
            assert link.startswith("https://"), link
            continue
        path, _, place = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not place or target.suffix != ".md" or place in anchors(target), link


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_page_of_methods_lists_every_row() -> None:
    from lightning_sfubm.methods import METHODS

    page = (ROOT / "docs/methods/README.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| (.+?) \| (yes)? ?\| (yes)? ?\| (.+) \|$", page, re.MULTILINE)
    assert [(key, label, bool(rounds), bool(llm)) for key, label, rounds, llm, _ in listed] == [
        (key, method.label, method.needs_stage1, method.needs_llm) for key, method in METHODS.items()
    ]
    for _, _, _, _, links in listed:
        for target in re.findall(r"\]\((.+?)\)", links):
            assert (ROOT / "docs/methods" / target).is_file(), target
