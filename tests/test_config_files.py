"""Files given with --config: faults are said of the file."""

from pathlib import Path

import pytest

from lightning_sfubm.__main__ import main
from lightning_sfubm.config_files import check_config_files
from lightning_sfubm.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"trainer:\n\tmax_epochs: 1\n", "is not readable YAML: .*line 2"),
        (b"trainer: {max_epochs: 1\n", "is not readable YAML"),
        (b"\xff\xfe\x00", "is not readable YAML: .*utf-8"),
        (b"a: &x\n  b: *x\n", "has what stands in line 1 within itself"),
        (b"", "holds no settings: a configuration is a mapping"),
        (b"- a\n- b\n", "holds no settings"),
        (
            b"trainer:\n  max_epochs: 1\nmodel: null\ntrainer:\n  devices: 1\n",
            "names 'trainer' a second time in line 4",
        ),
        (b"trainer:\n  callbacks:\n  - init_args: {a: 1, a: 2}\n", "names 'a' a second time in line 3"),
    ],
)
def test_a_faulty_file_is_named(content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    for arguments in (["--config", str(path)], [f"--config={path}"]):
        with pytest.raises(ConfigError, match=f"mine.yaml {words}"):
            check_config_files(["fit", *arguments])
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(path)])
    assert "mine.yaml" in capsys.readouterr().err


def test_shipped_files_and_what_a_merge_replaces_pass(tmp_path: Path) -> None:
    merged = tmp_path / "merged.yaml"
    merged.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: {<<: *a, x: 4}\n")
    paths = [merged, *CONFIGS.rglob("*.yaml")]
    check_config_files([word for path in paths for word in ("--config", path)])
    check_config_files(["fit", "--config"])  # no file: the parser says so
    check_config_files(["fit", "--config", "not there.yaml"])
