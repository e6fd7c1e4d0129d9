"""How what is sent is aggregated is among the terms that silos agree to, and that a server goes on with (T4, T18)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.federated.aggregation import KMeans, KNNMix, NoAggregation
from lightning_sfubm.federated.describe import describe
from lightning_sfubm.federated.envelopes import read_terms, terms
from lightning_sfubm.federated.federation import Federation
from lightning_sfubm.federated.robust import CoordinateMedian, Krum, TrimmedMean
from lightning_sfubm.federated.run_config import build_federation
from lightning_sfubm.federated.secure import SecureAggregation
from lightning_sfubm.federated.secure_kmeans import SecureKMeans
from lightning_sfubm.federated.server_optimizers import FedAdam, FedYogi
from lightning_sfubm.federated.weights import FedAvg
from tests.federated.machines import coordinator, cut_off_in_round
from tests.federated.test_silo import hello  # noqa: F401

AGG = "lightning_sfubm.federated."


@pytest.mark.parametrize(
    ("part", "class_path", "init_args"),
    [
        (None, "aggregation.KNNMix", {}),
        (KNNMix(7, 1), "aggregation.KNNMix", {"k": 7, "tau": 1.0}),
        (KMeans(min_members=50), "aggregation.KMeans", {"min_members": 50}),
        (NoAggregation(), "aggregation.NoAggregation", {}),
    ],
)
def test_an_aggregator_is_described_alike_from_a_configuration_and_from_python(
    part: Any, class_path: str, init_args: dict[str, Any]
) -> None:
    configured = {"class_path": AGG + class_path, "init_args": init_args}
    from_text = build_federation({"exchange": "both", "aggregator": configured})
    assert read_terms(terms(Federation(exchange="both", aggregator=part), 1)) == read_terms(terms(from_text, 1))


@pytest.mark.parametrize(
    "part", [FedAvg(), FedAdam(lr=0.5), FedYogi(), Krum(2, 2), TrimmedMean(0.3), CoordinateMedian()]
)
def test_an_aggregation_of_weights_is_described_alike_from_a_configuration_and_from_python(part: Any) -> None:
    described = describe(part)
    assert described == json.loads(json.dumps(described))
    from_text = build_federation({"exchange": "teacher", "weights": described})
    assert from_text.aggregation() == Federation(exchange="teacher", weights=part).aggregation()
    part.load_state_dict({})  # what it keeps between rounds is no setting
    assert describe(part) == described


def test_a_description_holds_settings_and_no_secrets(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    keyed = SecureKMeans(epsilon=2.0, secret_dir=str(tmp_path), secure_aggregation=SecureAggregation(threshold=0.9))
    described = describe(keyed)
    assert str(tmp_path) not in json.dumps(described)
    assert described["init_args"]["epsilon"] == 2.0
    assert described["init_args"]["secure_aggregation"]["class_path"] == f"{AGG}secure.SecureAggregation"
    assert described["init_args"]["secure_aggregation"]["init_args"]["threshold"] == 0.9

    class Odd:
        def __init__(self, table: Any, password: str, *rest: Any, gone: int = 3, limit: float = 0.0) -> None:
            self.table, self.password, self.limit, self.own = table, password, limit, self

    odd = describe(Odd({1: (2, None)}, "hidden", limit=float("nan")))
    assert odd["init_args"] == {"table": {"1": [2, None]}, "limit": "nan"}
    ring: Any = Odd(None, "")
    ring.table = ring
    assert "Odd" in json.dumps(describe(ring))
    assert json.dumps(describe(Odd(torch.zeros(2), ""))).count("Tensor")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"aggregator": KMeans(min_members=5)}, "aggregator.class_path is '.*KMeans' and here '.*KNNMix'"),
        ({"aggregator": KNNMix(k=6)}, "of this silo: aggregator.init_args.k is 6 and here 5$"),
        ({"weights": FedAdam()}, "weights.class_path is '.*FedAdam' and here '.*FedAvg'"),
        ({"min_updates": 2}, "of this silo: min_updates is 2 and here 1$"),
        ({"local_epochs": 2}, "of this silo: schedule.local_epochs is 2 and here 1$"),
        ({"joins": {"beta": 2}}, "of this silo: schedule.joins.beta is 2 and here None$"),
    ],
)
def test_a_silo_refuses_a_server_that_aggregates_otherwise_and_names_the_setting(
    change: dict[str, Any],
    named: str,
    hello: Any,  # noqa: F811
) -> None:
    make, request = hello()
    asked = Federation(exchange="both", rounds=2, **change)
    with pytest.raises(ConfigError, match=named):
        make().answer(replace(request, terms=terms(asked, 3)))


@pytest.mark.parametrize(
    ("exchange", "unused"),
    [
        ("teacher", {"aggregator": KMeans()}),
        ("semantics", {"weights": FedAdam(), "min_updates": 2}),
        ("nothing", {"aggregator": KMeans(), "weights": FedAdam()}),
    ],
)
def test_what_the_exchange_does_not_use_need_not_be_agreed_on(exchange: Any, unused: dict[str, Any]) -> None:
    assert terms(Federation(exchange=exchange, **unused), 1) == terms(Federation(exchange=exchange), 1)


def test_terms_that_are_nested_without_end_are_refused_in_one_sentence(hello: Any) -> None:  # noqa: F811
    make, request = hello()
    for depth in (100, 800):
        nested = (
            json.dumps({**json.loads(request.terms), "aggregator": 0})[:-1] + f', "x": {"[" * depth}{"]" * depth}}}'
        )
        with pytest.raises(ConfigError, match=r"trainer\.federation of this silo"):
            make().answer(replace(request, terms=nested))


def test_a_server_does_not_go_on_with_another_aggregation(machines: Any, tmp_path: Path) -> None:
    names, schedule = ["alpha", "beta"], {"rounds": 2, "local_max_epochs": 1}
    transport = machines(names, **schedule)
    cut_off_in_round(transport, 2, coordinator(transport, tmp_path, names, **schedule))
    for change, named in (
        ({"aggregator": KMeans()}, "aggregation.aggregator.class_path was '.*KNNMix' and is '.*KMeans'"),
        ({"weights": FedAdam()}, "aggregation.weights.class_path was '.*FedAvg' and is '.*FedAdam'"),
        ({"min_updates": 2}, "silos: aggregation.min_updates was 1 and is 2; set it back"),
    ):
        with pytest.raises(CheckpointError, match=named):
            coordinator(transport, tmp_path, names, **schedule, **change).run()
