"""Schedules and settings that could never do what they say are refused before anything is trained (T17, T18, T31)."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_sfubm.callbacks.differential_privacy import DifferentialPrivacy
from lightning_sfubm.callbacks.fedprox import FedProx
from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.errors import ConfigError, SFUBMError
from lightning_sfubm.federated.federation import Federation
from lightning_sfubm.federated.robust import CoordinateMedian
from lightning_sfubm.federated.secure import SecureAggregation
from lightning_sfubm.federated.secure_kmeans import SecureKMeans
from tests.conftest import small_distiller
from tests.federated.machines import Machines, coordinator


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_updates": 3}, "min_updates needs 3 updates a round, and the smallest round draws 2 of 2 clients"),
        ({"min_updates": 2, "participation": 0.5}, "min_updates needs 2 updates a round, .* draws 1 of 2"),
        ({"min_updates": 2, "joins": {"beta": 2}}, "min_updates needs 2 updates a round, .* draws 1 of 2"),
        ({"participation": 0.5, "secure": {}}, "secure_aggregation needs 2 updates a round, .* draws 1 of 2"),
        ({"weighting": "examples", "secure": {"max_weight": 10.0}}, "secure_aggregation.max_weight = 10 is below the"),
        ({"weighting": "examples", "secure": {"modulus_bits": 32}}, "2 clients .* could wrap .* max_weight"),
    ],
    ids=str,
)
def test_a_teacher_that_could_never_be_aggregated_is_refused_at_set_up(
    settings: dict[str, Any], words: str, federated_data: Any, federated_trainer: Any, tmp_path: Path
) -> None:
    """Not when the first round has been trained, nor in a warning after every round."""
    given = dict(settings)
    if "secure" in given:
        pytest.importorskip("cryptography")
        given["secure_aggregation"] = SecureAggregation(**given.pop("secure"))
    trainer = federated_trainer(exchange="teacher", **given)
    with pytest.raises(ConfigError, match=words):
        trainer.fit(small_distiller(), datamodule=federated_data(num_users=30))
    assert not (trainer.run_dir / "ledger.jsonl").exists()
    if "secure_aggregation" not in given:
        with pytest.raises(ConfigError, match=words):
            coordinator(Machines({}), tmp_path, ["alpha", "beta"], exchange="teacher", **given)


def test_rounds_for_which_all_have_left_ask_for_no_updates() -> None:
    schedule = Federation(rounds=4, exchange="teacher", min_updates=2, leaves={"a": 2, "b": 2})
    schedule.check_clients(["a", "b"])
    assert schedule.smallest_round(["a", "b"]) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modulus_bits": 16}, "modulus_bits = 16"),
        ({"clip": -1.0}, "clip = -1.0"),
        ({"clip": math.nan}, "clip = nan"),
        ({"fractional_bits": 60}, "fractional_bits = 60"),
        ({"clip": 1000.0, "modulus_bits": 32}, "lower clip"),
        ({"max_weight": 0.0}, "max_weight = 0.0"),
        ({"max_weight": math.inf}, "max_weight = inf"),
    ],
    ids=str,
)
def test_settings_of_secure_sums_are_tried_at_once(settings: dict[str, Any], words: str) -> None:
    pytest.importorskip("cryptography")
    with pytest.raises(ConfigError, match=f"secure.aggregation.*{words}"):
        SecureAggregation(**settings)
    SecureAggregation(modulus_bits=32)  # weights of 1 each fit


def test_secure_k_means_tries_the_settings_of_its_sums() -> None:
    pytest.importorskip("cryptography")
    with pytest.raises(ConfigError, match=r"could wrap a sum modulo 2\^32"):
        SecureKMeans(secure_aggregation=SecureAggregation(modulus_bits=32))


def test_what_would_seem_to_protect_a_teacher_that_is_not_sent_is_refused(
    federated_data: Any, federated_trainer: Any
) -> None:
    """Callbacks stay silent under exchange: nothing, the control of the same settings."""
    pytest.importorskip("cryptography")
    for exchange in ("semantics", "nothing"):
        with pytest.raises(ConfigError, match=f"secure_aggregation .*exchange: {exchange} .*set exchange to 'teacher'"):
            Federation(exchange=exchange, secure_aggregation=SecureAggregation())  # type: ignore[arg-type]
    for callback in (FedProx(0.1), DifferentialPrivacy(noise_multiplier=1.0)):
        trainer = federated_trainer(exchange="semantics", callbacks=[PrivacyNoise(0.05), callback])
        with pytest.raises(ConfigError, match=f"{type(callback).__name__}: .*exchange: semantics .*trainer.callbacks"):
            trainer.fit(small_distiller(), datamodule=federated_data(num_users=30))


def test_settings_of_a_teacher_that_is_not_sent_are_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    given: dict[str, Any] = {"weights": CoordinateMedian(), "weighting": "examples", "min_updates": 2}
    with caplog.at_level(logging.WARNING):
        Federation(exchange="semantics")
        Federation(exchange="teacher", **given)
        Federation(exchange="nothing", **given)
        assert not caplog.records
        Federation(exchange="semantics", **given)
    assert "federation: weights, weighting, min_updates: for the weights of a shared teacher" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"callbacks": []}, "item semantics would leave unprotected"),
        ({"callbacks": [], "joins": {"beta": 2}}, "item semantics would leave unprotected"),
        ({"max_items": 5}, r"client 'alpha' would send \d+ rows .* at most 5 are accepted"),
        ({"secure": {"max_items": 5}}, r"SecureKMeans\.max_items = 5 admits no more"),
        ({"secure": {"min_members": 500}}, r"SecureKMeans\.min_members = 500: a sum over so few"),
        ({"private": {}, "flags": {"accumulate_grad_batches": 2}}, "raise expected_batch_size"),
        ({"private": {"delta": 0.1}}, "with 30 users would allow to publish one of them"),
        ({"private": {"expected_batch_size": 31}}, "cannot be drawn from 30"),
        ({"private": {"target_epsilon": 0.1}}, r"2 more private steps after 0 would spend .* over the budget of 0\.1"),
        (
            {"private": {"target_epsilon": 0.1, "noise_multiplier": None, "total_epochs": 10**12}},
            "no noise keeps",
        ),
    ],
    ids=str,
)
def test_a_refused_run_leaves_an_earlier_one_as_it_was(
    settings: dict[str, Any], words: str, federated_data: Any, federated_trainer: Any
) -> None:
    """States, record and configuration: it would be found out at the first step, after all of them were gone."""
    given = dict(settings)
    if "private" in given:
        pytest.importorskip("opacus")
        private = {"noise_multiplier": 1.0, "delta": 1e-3, "accounting": "rdp", **given.pop("private")}
        given["callbacks"] = [PrivacyNoise(0.05), DifferentialPrivacy(**private)]
    if "secure" in given:
        pytest.importorskip("cryptography")
        given["aggregator"] = SecureKMeans(num_clusters=2, **given.pop("secure"))
    trainer = federated_trainer(**given)
    for name in ("config.yaml", "ledger.jsonl", "checkpoints/state-0001/loop.json", "clients/alpha/trained.ckpt"):
        (trainer.run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (trainer.run_dir / name).write_text("of before")
    trainer.config_text = "of the refused run"
    with pytest.raises(SFUBMError, match=words):
        trainer.fit(small_distiller(), datamodule=federated_data(num_users=30))
    left = [path for path in trainer.run_dir.rglob("*") if path.is_file()]
    assert len(left) == 4
    assert all(path.read_text() == "of before" for path in left)
