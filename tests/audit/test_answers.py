"""What mixed vectors tell the silo that gets them: figures with a known truth, and what is not measured."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_sfubm.audit.answers import answers
from lightning_sfubm.federated.aggregation import KMeans, KNNMix


def units(n: int, seed: int) -> Tensor:
    return normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)), dim=1)


def client(vectors: Tensor) -> Any:
    """Uploads in the reverse order of the catalogue."""
    return SimpleNamespace(
        module=SimpleNamespace(semantics=lambda: vectors), in_catalogue_order=lambda sent: sent.flip(0)
    )


def exchange(clean: dict[str, Tensor], aggregator: Any) -> list[tuple[dict[str, Any], Any]]:
    """The messages of one exchange without noise."""
    uploads = {name: vectors.flip(0) for name, vectors in clean.items()}
    return [
        (
            {"kind": "semantics", "direction": way, "client": name, "round": 0},
            SimpleNamespace(tensors={"vectors": vectors}),
        )
        for way, sent in (("up", uploads), ("down", aggregator.aggregate(uploads)))
        for name, vectors in sent.items()
    ]


def measured(clean: dict[str, Tensor], aggregator: Any = None, max_items: int = 1000) -> tuple[list[Any], list[str]]:
    aggregator = aggregator or KNNMix()
    clients = {name: client(vectors) for name, vectors in clean.items()}
    return answers(exchange(clean, aggregator), clients, aggregator, max_items, seed=1)


def test_products_that_both_sell_come_back_almost_as_they_are() -> None:
    both = units(40, 0)
    rows, not_run = measured({"a": both, "b": torch.cat([units(60, 1), both])}, KNNMix(tau=0.01))
    assert not_run == []
    first = next(row for row in rows if row["client"] == "a")
    assert (first["items"], first["attacked"], first["foreign"], first["chance"]) == (40, 40, 100, 0.01)
    assert first["with_replacement"]["value"] == first["copies"]["value"] == 1.0
    assert first["products_named"] == 40
    assert first["cosine_mean"] > 0.99


def test_products_are_counted_once_and_where_they_are_named() -> None:
    both = units(40, 0)
    clean, aggregator = {"a": torch.cat([both, both]), "b": torch.cat([both, units(60, 1)])}, KNNMix(tau=0.01)
    messages = exchange(clean, aggregator)
    answer = next(message for line, message in messages if (line["direction"], line["client"]) == ("down", "a"))
    received = answer.tensors["vectors"].flip(0)
    received[:10] *= -1  # what comes back says nothing of the first ten products
    received[40:50] *= -1
    answer.tensors["vectors"] = received.flip(0)
    rows, _ = answers(messages, {name: client(vectors) for name, vectors in clean.items()}, aggregator, 100, seed=1)
    first = next(row for row in rows if row["client"] == "a")
    assert (first["with_replacement"]["value"], first["with_replacement"]["n"]) == (0.75, 80)
    assert first["products_named"] == 30


def test_an_even_mixture_hides_more_than_a_peaked_one() -> None:
    clean = {"a": units(200, 2), "b": units(300, 3), "c": units(100, 4)}
    (even, *_), (peaked, *_) = (measured(clean, KNNMix(k=50, tau=tau))[0] for tau in (100.0, 0.01))
    assert even["foreign"] == 400
    assert even["with_replacement"]["value"] < peaked["with_replacement"]["value"]
    assert even["cosine_mean"] < peaked["cosine_mean"]
    assert even["copies"]["value"] == 0.0
    assert even["without_answer"]["value"] == 1.0  # no noise: a silo's own upload says which is nearest


def test_a_limit_is_kept() -> None:
    rows, _ = measured({"a": units(50, 5), "b": units(50, 6)}, max_items=20)
    assert {(row["attacked"], row["with_replacement"]["n"]) for row in rows} == {(20, 20)}


def test_answers_of_other_aggregators_are_said_not_to_be_measured() -> None:
    rows, (sentence,) = measured({"a": units(50, 5), "b": units(50, 6)}, KMeans(num_clusters=4))
    assert rows == []
    assert "answers of KMeans is not measured" in sentence


@pytest.mark.parametrize("sizes", [(50,), (50, 3)])
def test_without_an_answer_there_is_nothing_to_measure(sizes: tuple[int, ...]) -> None:
    rows, not_run = measured({name: units(size, size) for name, size in zip("ab", sizes, strict=False)})
    assert [row["client"] for row in rows] == ["b"] * (len(sizes) - 1)  # a's foreign pool is too small
    assert not_run == []


def test_a_silos_own_record_lacks_what_its_answers_were_mixed_from() -> None:
    clean = {"a": units(40, 0), "b": units(60, 1)}
    alone = [message for message in exchange(clean, KNNMix()) if message[0]["client"] == "a"]
    rows, not_run = answers(alone, {"a": client(clean["a"])}, KNNMix(), 100, seed=1)
    assert rows == []
    assert "What a learns of another's items from its answer of round 0 is not measured" in not_run[0]
    received = [message for message in alone if message[0]["direction"] == "down"]
    assert answers(received, {"a": client(clean["a"])}, KNNMix(), 100, seed=1) == (rows, not_run)
