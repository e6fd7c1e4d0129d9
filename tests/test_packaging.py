"""The package list equals the disk; the built wheel holds one top-level package and its commands answer (T24)."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "lightning_sfubm": "lightning_sfubm",
    "lightning_sfubm.modules": "modules",
    "lightning_sfubm.datamodules": "datamodules",
    "lightning_sfubm.callbacks": "callbacks",
    "lightning_sfubm.configs": "configs",
}


def on_disk() -> set[str]:
    """Dotted names of all packages in the source folders; symlinks inside ``lightning_sfubm`` are not followed."""
    found = set()
    for package, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            if not (package == "lightning_sfubm" and parts and parts[0] in FOLDERS.values()):
                found.add(".".join((package, *parts)))
    return found


def listed() -> set[str]:
    lines = (ROOT / "pyproject.toml").read_text().split("packages = [", 1)[1].split("]", 1)[0]
    return {line.strip().strip('",') for line in lines.splitlines() if line.strip()}


def test_the_package_list_is_complete() -> None:
    assert listed() == on_disk()


def test_symlinks_lead_to_the_root_folders() -> None:
    for folder in ("modules", "datamodules", "callbacks", "configs"):
        link = ROOT / "lightning_sfubm" / folder
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder


@pytest.mark.parametrize("folder", ["modules", "datamodules", "callbacks", "configs"])
def test_root_folders_refuse_to_be_imported_under_their_own_name(folder: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"import this package as 'lightning_sfubm.{folder}'" in done.stderr


@pytest.mark.slow
def test_the_wheel_installs_into_a_clean_environment(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"lightning_sfubm"}
    for needed in ("modules/fkd.py", "configs/experiment/demo.yaml", "datamodules/templates/movies.yaml", "py.typed"):
        assert f"lightning_sfubm/{needed}" in names
    # The dependencies are borrowed from this environment; only the package itself must come from the wheel.
    environment = tmp_path / "venv"
    venv.create(environment, system_site_packages=False, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True, capture_output=True)
    site = next((environment / "lib").glob("python*/site-packages"))
    borrowed = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "borrowed.pth").write_text(borrowed + "\n")
    for command in (["lightning-sfubm", "--version"], ["lightning", "--help"], ["lightning-sfubm", "fit", "--help"]):
        answer = subprocess.run(
            [environment / "bin" / command[0], *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stderr[-2000:]
    code = "import lightning_sfubm, lightning_sfubm.modules.fkd as m; print(m.__file__)"
    answer = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(site) in answer.stdout
