"""The recipe of docs/privacy.md, on generated data: it attacks persons, and its exit code says what could not be checked."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from lightning_sfubm.__main__ import _HELP, main
from lightning_sfubm.evaluation import report_plots
from tests.test_configs import ROOT, command, prepared

CONFIG = ROOT / "configs" / "privacy" / "audit_demo.yaml"


def test_the_guide_starts_with_this_configuration_and_it_holds_users_out() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "privacy.md").read_text(), re.DOTALL)
    fit, audit = (shlex.split(line) for line in next(b for b in blocks if "lightning-sfubm audit" in b).splitlines())
    assert fit == ["lightning-sfubm", *command(CONFIG)]
    ours, demo = (yaml.safe_load(path.read_text()) for path in (CONFIG, ROOT / "configs" / "experiment" / "demo.yaml"))
    assert audit == ["lightning-sfubm", "audit", "--run_dir", ours["trainer"]["default_root_dir"]]
    assert f"\n  {shlex.join(audit)} " in _HELP
    domains = ours["data"]["init_args"]["domains"]
    assert set(domains) == set(demo["data"]["init_args"]["domains"])
    assert all(domain["init_args"]["train_users"] for domain in domains.values())


@pytest.mark.slow
def test_the_recipe_attacks_persons_and_its_exit_code_tells_an_unchecked_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(report_plots, "figures", lambda facts: {})
    run_dir = tmp_path / "run"
    fit = prepared(CONFIG, tmp_path)
    for path in map(Path, fit[2::2]):  # 60 generated users a domain
        path.write_text(path.read_text().replace("train_users: 200", "train_users: 30"))
    flags = ["--trainer.default_root_dir", str(run_dir), "--trainer.enable_progress_bar", "false"]
    main([*fit, *flags, "--trainer.federation.init_args.rounds", "1", "--trainer.accelerator", "cpu"])
    audit = ["audit", "--run_dir", str(run_dir), "--shadows", "0"]
    main(audit)
    facts = json.loads((run_dir / "audit.json").read_text())
    assert {(row["domain"], row["members"], row["others"]) for row in facts["membership"]} == {
        ("action", 30, 30),
        ("drama", 30, 30),
    }
    assert {row["client"] for row in facts["answers"]} == {"action", "drama"}
    assert facts["check"]["unchecked"] == []
    assert "This was not measured" not in (run_dir / "privacy_report.html").read_text()
    shutil.rmtree(run_dir / "checkpoints")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(audit)
    assert ended.value.code == 3
    out, err = capsys.readouterr()
    assert "privacy_report.html" in out
    assert "not checked: whether lines are missing at its end could not be checked: the run folder holds no" in err
    assert json.loads((run_dir / "audit.json").read_text())["membership"]
