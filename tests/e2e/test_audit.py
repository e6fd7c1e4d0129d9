"""From a recorded run to its privacy report: record, check, attack, report; refusals; nothing sensitive in what is written."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_sfubm.__main__ import main
from lightning_sfubm.audit import command
from lightning_sfubm.audit.attack import AuditSettings, protected_vectors
from lightning_sfubm.audit.check import check_run
from lightning_sfubm.audit.command import audit_run, schemas, write_curve
from lightning_sfubm.audit.curve import curve_points
from lightning_sfubm.audit.replay import replay
from lightning_sfubm.callbacks.differential_privacy import DifferentialPrivacy
from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.errors import ConfigError, DataError, PrivacyError
from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.federated.secure_kmeans import SecureKMeans
from lightning_sfubm.privacy.rounding import round_up
from tests.conftest import small_distiller

SETTINGS = AuditSettings(shadows=2, random_updates=2)


def private() -> DifferentialPrivacy:
    return DifferentialPrivacy(noise_multiplier=2.0, delta=1e-3, accounting="rdp")


@pytest.fixture
def recorded(federated_data: Any, federated_trainer: Any) -> Any:
    """A factory: fit a recorded run and return its trainer and data."""

    def make(
        folder: str = "run", callbacks: list | None = None, users: int = 80, kept: list | None = None, **settings: Any
    ) -> Any:
        callbacks = [PrivacyNoise(0.05)] if callbacks is None else callbacks
        trainer = federated_trainer(
            folder, callbacks=callbacks, **{"keep_messages": True, "local_max_epochs": 1, **settings}
        )
        data = federated_data(num_users=users, num_items=120, train_users=40)
        if kept is not None:  # also of a run that does not come to its end
            kept.extend((trainer, data))
        trainer.fit(small_distiller(), datamodule=data)
        return trainer, data

    return make


def audited(trainer: Any, data: Any, settings: AuditSettings = SETTINGS) -> tuple[dict[str, Any], Path]:
    report = audit_run(trainer, trainer.build_loop(small_distiller(), data), settings)
    return json.loads((trainer.run_dir / "audit.json").read_text()), report


def test_a_recorded_run_is_checked_attacked_and_reported(recorded: Any) -> None:
    trainer, data = recorded()
    facts, report = audited(trainer, data)
    assert facts["check"]["problems"] == []
    assert facts["check"]["recorded"] == facts["check"]["parsed"] == facts["check"]["lines"] > 0
    assert {row["client"] for row in facts["linkage"]} == {"alpha", "beta"}
    for row in facts["linkage"]:
        assert row["with_replacement"]["low"] > row["chance"]  # sigma .05 hides nothing from who has the catalogue
        assert row["sigma"] == 0.05
    attacked = {(r["domain"], r["client"], r["round"], r["score"]) for r in facts["membership"]}
    assert {("alpha", client, number, "loss") for client in ("alpha", "") for number in (1, 2)} <= attacked
    assert {("beta", client, 2, "calibrated") for client in ("beta", "")} <= attacked
    for row in facts["membership"]:
        assert (row["members"], row["others"], row["limit"]) == (40, 40, None)
        assert row["auc"]["low"] <= row["auc"]["value"] <= row["auc"]["high"]
    assert {row["score"] for row in facts["items"]} == {"first layer", "rise of logits", "strongest call"}
    assert all(len(row["random_updates"]) == 2 for row in facts["items"])
    report_facts = json.loads(report.with_suffix(".json").read_text())
    assert report_facts["self_check"]["holds"]
    assert [row["holds"] for row in report_facts["self_check"]["rows"]] == [True] * 5
    page = report.read_text()
    for words in ("In plain words", "heuristic", "no protection", "Self-check", "chance"):
        assert words in page


def test_a_run_that_ended_before_all_had_sent_is_audited(recorded: Any, federated_data: Any) -> None:
    class Killed(FederatedCallback):
        def on_upload(self, loop: Any, client: str, kind: str, tensors: Any) -> Any:
            if (client, kind) == ("beta", "teacher"):
                raise KeyboardInterrupt
            return tensors

    kept: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        recorded(callbacks=[PrivacyNoise(0.05), Killed()], kept=kept)
    trainer, data = kept
    facts, _ = audited(trainer, data)
    assert {row["domain"] for row in facts["membership"]} == {"alpha"}
    assert "Membership inference, beta: no weights of its own and none aggregated were recorded." in facts["not_run"]


def test_what_is_attacked_is_what_was_sent(recorded: Any) -> None:
    trainer, data = recorded()
    loop = trainer.build_loop(small_distiller(), data)
    check = check_run(trainer.run_dir, schemas(loop))
    initial = dict(loop.server.global_teacher)
    uploads, updates = replay(check.messages, check.entries, loop.clients, initial, partial(protected_vectors, loop))
    assert [(u.client, u.round) for u in uploads] == [("alpha", 0), ("beta", 0)]
    assert [(u.client, u.round) for u in updates] == [
        *(("alpha", 1), ("beta", 1), ("", 1)),
        *(("alpha", 2), ("beta", 2), ("", 2)),
    ]
    first, last = updates[0], updates[-1]
    finished = trainer.loop
    for name, weight in last.after.items():
        assert torch.equal(weight, finished.server.global_teacher[name])
        assert torch.equal(first.before[name], initial[name])
        assert torch.equal(updates[3].before[name], updates[2].after[name])  # a round starts from the mean before it
        assert torch.equal(last.before[name], updates[2].after[name])
    for name, client in finished.clients.items():
        assert torch.equal(last.views[name], client.module.teacher.global_text[1:])
        sent = next(upload.vectors for upload in uploads if upload.client == name)
        callback = next(c for c in finished.callbacks if isinstance(c, PrivacyNoise))
        noise = callback.mechanism(finished.seed, name, names=client.text_names())
        assert torch.equal(sent, noise(client.module.semantics()))


def test_differential_privacy_is_reported_with_its_limit(recorded: Any) -> None:
    trainer, data = recorded(callbacks=[PrivacyNoise(0.05), private()])
    facts, report = audited(trainer, data)
    last = [r for r in facts["membership"] if r["client"] == "" and r["round"] == 2]
    for row in last:
        assert 0 < row["epsilon"] < 20
        assert 0.5 < row["limit"]["auc"] <= 1
        assert row["auc"]["low"] <= row["limit"]["auc"]
    stated = json.loads(report.with_suffix(".json").read_text())
    assert all(row["simulated"] for row in stated["attacks"]["membership"])  # there is no secret_dir
    limit = f"<td>{round_up(last[0]['limit']['auc'], 3)}*</td>"
    assert limit in report.read_text()
    assert "“*”: in a simulation alone." in report.read_text()
    assert "guarantee" not in {m["standing"] for m in stated["mechanisms"]}
    guarantees = [m for m in stated["mechanisms"] if m["standing"] == "simulated"]
    assert {(m["client"], m["kind"]) for m in guarantees} == {("alpha", "teacher"), ("beta", "teacher")}
    whole = "one user's whole sequence added or removed, among the users that train_users drew"
    assert guarantees[0]["neighbours"] == f"{whole} (whom they draw depends on all users)"
    for row in guarantees:
        spent = trainer.loop.counters.spent[row["client"]]
        assert (row["epsilon"], row["delta"]) == (spent["epsilon"], spent["delta"])
        assert f"epsilon {round_up(spent['epsilon'], 3)} at delta 0.001" in report.read_text()
    assert "differ by one user's whole sequence added or removed" in " ".join(
        sentence for entry in stated["in_plain_words"] for sentence in entry["answer"]
    )


def test_shadow_models_have_the_noise_of_the_run_and_no_budget(
    recorded: Any, federated_data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They train on half of all users: 30 of 60, where the run has 40, would pass the budget with the same noise."""
    budget = DifferentialPrivacy(target_epsilon=3.0, total_epochs=2, delta=1e-3, accounting="rdp")
    trainer, data = recorded(callbacks=[PrivacyNoise(0.05), budget], users=60)
    trained: list[tuple[float, float, float | None]] = []
    ended = DifferentialPrivacy.teardown

    def keep(self: DifferentialPrivacy, *args: Any, **named: Any) -> None:
        trained.append((self._sigma, self.accountant.epsilon(), self.target_epsilon))
        ended(self, *args, **named)

    monkeypatch.setattr(DifferentialPrivacy, "teardown", keep)
    facts, _ = audited(trainer, data)
    sent = [
        line["mechanism"]["differential privacy"] for line in check_run(trainer.run_dir).entries if of_teacher(line)
    ]
    assert len(trained) == 4
    assert {sigma for sigma, _, _ in trained} == {line["noise_multiplier"] for line in sent}
    assert all(epsilon > 3.0 and target is None for _, epsilon, target in trained)
    assert {row["score"] for row in facts["membership"]} == {"loss", "calibrated"}
    assert facts["not_run"] == []


@pytest.mark.parametrize("refusal", ["delta", "batch"])
def test_shadow_models_that_cannot_be_private_are_said_not_to_be_trained(recorded: Any, refusal: str) -> None:
    """The other attacks are made and written."""
    ask = {"delta": 1 / 45} if refusal == "delta" else {"expected_batch_size": 40}
    callback = DifferentialPrivacy(noise_multiplier=2.0, accounting="rdp", **{"delta": 1e-3, **ask})
    trainer, data = recorded(callbacks=[PrivacyNoise(0.05), callback], users=100 if refusal == "delta" else 60)
    facts, report = audited(trainer, data)
    assert {row["score"] for row in facts["membership"]} == {"loss"}
    assert facts["linkage"]
    assert facts["items"]
    why = "would allow to publish one" if refusal == "delta" else "an expected batch of 40"
    for name, sentence in zip(("alpha", "beta"), facts["not_run"], strict=True):
        assert sentence.startswith(f"Membership inference against shadow models, {name}: ")
        assert why in sentence
        assert sentence.split(":")[0] in report.read_text()


def of_teacher(line: dict[str, Any]) -> bool:
    return (line["kind"], line["direction"]) == ("teacher", "up")


def test_runs_side_by_side_make_a_curve(recorded: Any) -> None:
    plain, data = recorded("plain")
    audited(plain, data, AuditSettings(shadows=0))
    guarded, data = recorded("guarded", callbacks=[PrivacyNoise(0.05), private()])
    with pytest.raises(DataError, match="no readable audit"):
        curve_points([guarded.run_dir])
    audited(guarded, data, AuditSettings(shadows=0))
    report = write_curve(plain.run_dir, [guarded.run_dir])
    points = json.loads(report.with_suffix(".json").read_text())["curve"]
    assert [(p["domain"], p["epsilon"] is None) for p in points] == [
        ("alpha", True),
        ("alpha", False),
        ("beta", True),
        ("beta", False),
    ]
    assert all(p["membership"]["loss"]["client"] == "" for p in points)
    assert [p["simulated"] for p in points] == [False, True, False, True]
    assert "Membership inference and utility against epsilon" in report.read_text()


def test_secure_aggregation_leaves_only_the_mean_to_attack(recorded: Any) -> None:
    from lightning_sfubm.federated.secure import SecureAggregation

    trainer, data = recorded(rounds=1, secure_aggregation=SecureAggregation())
    facts, report = audited(trainer, data, AuditSettings(shadows=0))
    assert facts["check"]["problems"] == []
    assert facts["check"]["parsed"] < facts["check"]["recorded"] == facts["check"]["lines"]
    assert {row["client"] for row in facts["membership"]} == {""}
    stated = json.loads(report.with_suffix(".json").read_text())
    assert {m["standing"] for m in stated["mechanisms"]} == {"heuristic", "hidden"}


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_the_view_that_silos_made_from_centroids_is_rebuilt(recorded: Any, sigma: float) -> None:
    """Attacked without it, the teacher would not be the one that was trained, and the figures too harmless."""
    pytest.importorskip("cryptography")
    aggregator = SecureKMeans(num_clusters=4, min_members=1)
    trainer, data = recorded(rounds=1, aggregator=aggregator, callbacks=[PrivacyNoise(sigma)])
    loop = trainer.build_loop(small_distiller(), data)
    check = check_run(trainer.run_dir, schemas(loop))
    initial = dict(loop.server.global_teacher)
    _, updates = replay(check.messages, check.entries, loop.clients, initial, partial(protected_vectors, loop))
    for name, client in trainer.loop.clients.items():
        trained = client.module.teacher.global_text[1:]  # row 0 is the padding
        assert torch.equal(updates[-1].views[name], trained)
        assert 1 < len(trained.unique(dim=0)) <= 4
    facts, _ = audited(trainer, data, AuditSettings(shadows=0, random_updates=2))
    assert facts["check"]["problems"] == []
    assert {row["domain"] for row in facts["membership"]} == {"alpha", "beta"}
    assert {row["domain"] for row in facts["items"]} == {"alpha", "beta"}
    assert not [text for text in facts["not_run"] if "Membership" in text]


def test_without_held_out_users_membership_is_not_claimed(
    recorded: Any, federated_data: Any, federated_trainer: Any
) -> None:
    trainer = federated_trainer(rounds=1, local_max_epochs=1, keep_messages=True)
    data = federated_data()
    trainer.fit(small_distiller(), datamodule=data)
    facts, report = audited(trainer, data)
    assert facts["membership"] == []
    assert sum("set" in s and "train_users" in s for s in facts["not_run"]) == 2
    assert "This was not measured" in report.read_text()


def test_nothing_sensitive_is_written(recorded: Any) -> None:
    trainer, data = recorded()
    _, report = audited(trainer, data)
    written = (
        report.read_text() + report.with_suffix(".json").read_text() + (trainer.run_dir / "audit.json").read_text()
    )
    for domain in data.domains.values():
        for secret in (*domain.domain.user_keys, *domain.domain.item_keys[1:], *domain.domain.titles[1:]):
            assert secret not in written


# ---------------------------------------------------------------------- refusals


def test_a_run_that_kept_only_hashes_cannot_be_audited(recorded: Any) -> None:
    trainer, data = recorded(keep_messages=False)
    with pytest.raises(PrivacyError, match="keep_messages"):
        audited(trainer, data)


@pytest.mark.parametrize("what", ["message", "ledger", "cut"])
def test_tampering_stops_the_audit_and_shows_in_the_report(recorded: Any, what: str) -> None:
    trainer, data = recorded(rounds=1)
    ledger = trainer.run_dir / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    if what == "message":
        victim = trainer.run_dir / "messages" / json.loads(lines[-1])["sha256"]
        victim.write_bytes(victim.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    elif what == "ledger":
        ledger.write_text("".join([lines[0].replace('"round": 0', '"round": 1'), *lines[1:]]))
    else:
        ledger.write_text("".join(lines[:-1]))
    with pytest.raises(PrivacyError, match="do not agree"):
        audited(trainer, data)
    facts = json.loads((trainer.run_dir / "audit.json").read_text())
    assert facts["check"]["problems"]
    assert "membership" not in facts
    report = json.loads((trainer.run_dir / "privacy_report.json").read_text())
    assert not report["self_check"]["holds"]
    assert "Do not rely on this" in (trainer.run_dir / "privacy_report.html").read_text()
    with pytest.raises(DataError, match="nothing was attacked"):
        curve_points([trainer.run_dir])


def test_another_configuration_than_the_runs_is_refused(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, data = recorded(rounds=1)
    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    with pytest.raises(ConfigError, match="was written by the schedule") as refused:
        audited(trainer, data)
    assert ": seed_everything was 3 and is 4; audit a run with its own configuration" in str(refused.value)


def test_other_data_than_the_runs_are_refused(recorded: Any, federated_data: Any) -> None:
    trainer, _ = recorded(rounds=1)
    with pytest.raises(ConfigError, match="has 90 items, its message of round 0 has"):
        audited(trainer, federated_data(num_users=300, num_items=90, train_users=40))


@pytest.mark.parametrize("how", ["made anew", "of another folder"])
def test_other_secrets_than_the_runs_are_refused(
    recorded: Any, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another noise and another order of items every attack misses, and the report would be calm."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    trainer, data = recorded(rounds=1, callbacks=[PrivacyNoise(0.05, "secrets")])
    if how == "made anew":
        (tmp_path / "here/secrets/beta.key").write_bytes(bytes(32))
    else:
        monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(
        PrivacyError, match=r"the secrets of \[.*'beta'\] in secrets are not those that the run was made"
    ):
        audited(trainer, data)
    assert not (trainer.run_dir / "audit.json").exists()


# ---------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_audits_a_run_by_its_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    config = yaml.safe_load(Path("configs/debug/synthetic.yaml").read_text())
    config.pop("experiment")
    config["trainer"] |= {"default_root_dir": str(tmp_path / "run"), "enable_progress_bar": False}
    federation = config["trainer"]["federation"]["init_args"]
    federation |= {"rounds": 1, "exchange": "both", "local_max_epochs": 2, "keep_messages": True}
    for domain in config["data"]["init_args"]["domains"].values():
        domain["init_args"]["train_users"] = 100
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(path)])
    main(["audit", "--run_dir", str(tmp_path / "run"), "--shadows", "0"])
    assert str(tmp_path / "run" / "privacy_report.html") in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "audit.json").read_text())["membership"]
    main(["report", str(tmp_path / "run")])
    assert "privacy_report.html" in capsys.readouterr().out
    before = (tmp_path / "run" / "audit.json").read_bytes()
    with pytest.raises(SystemExit):  # would take outsiders for members
        main(
            ["audit", "--run_dir", str(tmp_path / "run"), "--data.init_args.domains.alpha.init_args.train_users", "150"]
        )
    assert "train_users was 100 and is 150" in capsys.readouterr().err
    assert (tmp_path / "run" / "audit.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --config, or --run_dir"),
        (["--run_dir", "nowhere"], "give --config, or --run_dir"),
        (["--run_dir", "nowhere"], "nowhere: there is no such run folder; give"),
        (
            ["--run_dir", "nowhere", "--config", "configs/debug/synthetic.yaml"],
            "nowhere: there is no such run folder; give",
        ),
        (["--run_dir", "nowhere", "--shadows", "3"], "--shadows must be even"),
    ],
)
def test_what_the_command_refuses(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["audit", *arguments])
    assert words in capsys.readouterr().err


def test_a_run_to_be_shown_beside_is_looked_for_before_anything_is_attacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The attacks take long, and audit.json of the run is replaced after them."""

    def attacked(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(command, "audit_run", attacked)
    monkeypatch.setattr(command, "_recorded_or_raise", lambda run_dir: None)
    (tmp_path / "audit.json").write_text("of before")
    arguments = ["--config", "configs/debug/synthetic.yaml", "--run_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as exit:
        main(["audit", *arguments, "--trainer.accelerator", "cpu", "--beside", str(tmp_path / "other")])
    assert exit.value.code == 2
    assert f"{tmp_path / 'other'}: no readable audit.json there" in capsys.readouterr().err
    assert (tmp_path / "audit.json").read_text() == "of before"
