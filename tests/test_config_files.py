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
        (b"a: " + b"[" * 3000 + b"]" * 3000, "is nested too deeply"),
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
    spellings = (["--config", str(path)], [f"--config={path}"], ["-c", str(path)], [f"-c={path}"], [f"-c{path}"])
    for arguments in spellings:
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
    check_config_files(["fit", "--config", "{seed_everything: 1, title: " + "x" * 400 + "}"])  # settings given inline


def test_a_baseline_takes_settings_whose_class_hands_others_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """UniSRec gives the class above it arguments that its own constructor does not take; it is made anew for its seed."""
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        "trainer: {enable_progress_bar: false}\n"
        "experiment:\n  class_path: lightning_sfubm.experiment.Experiment\n  init_args:\n    methods: [unisrec_scratch]\n"
        "    llm: null\n    baselines:\n      unisrec_scratch:\n"
        "        class_path: lightning_sfubm.modules.baselines.unisrec.UniSRec\n        init_args:\n          num_experts: 3\n"
        "          encoder:\n            class_path: lightning_sfubm.modules.encoders.sasrec.SASRec\n"
        "            init_args: {hidden_dim: 16, num_layers: 1, max_length: 20}\n"
        "data:\n  init_args:\n    domains:\n"
        + "".join(
            f"      {name}: {{init_args: {{reader: {{init_args: {{num_users: 60}}}}}}}}\n" for name in ("alpha", "beta")
        )
    )
    synthetic = str(CONFIGS / "debug/synthetic.yaml")
    flags = [
        "--trainer.federation.init_args.local_max_epochs",
        "1",
        "--trainer.federation.init_args.local_min_epochs",
        "1",
    ]
    main(["fit", "--config", synthetic, "--config", "mine.yaml", "--trainer.default_root_dir", "run", *flags])
    for name in ("alpha", "beta"):
        assert (tmp_path / "run/results" / name / "unisrec_scratch.parquet").is_file()
