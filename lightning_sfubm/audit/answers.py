"""What a silo learns of the others' items from the mixed vectors that come back to it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_sfubm.evaluation.significance import wilson_interval
from lightning_sfubm.federated.aggregation import KNNMix, SemanticAggregator
from lightning_sfubm.federated.client import Client
from lightning_sfubm.federated.messages import Message
from lightning_sfubm.federated.neighbours import foreign_neighbours
from lightning_sfubm.privacy.attacks import linked
from lightning_sfubm.seeds import torch_generator

Facts = dict[str, Any]
_COPY = 0.95  #: cosine from which on an answer passes for a copy of an upload


def answers(
    messages: Iterable[tuple[Mapping[str, Any], Message]],
    clients: Mapping[str, Client],
    aggregator: SemanticAggregator,
    max_items: int,
    seed: int,
) -> tuple[list[Facts], list[str]]:
    """Linkage of the last answer that each client received, with the uploads it was mixed from as the truth.

    The attacker is the silo itself, which holds the texts of all products of the others. Of each answer it names the
    other silos' product that is nearest; right is the one whose upload weighs most in it, the nearest to the silo's own.
    Beside it stands what the silo would name by its own upload alone.

    Args:
        messages: checked messages with their ledger lines.
        clients: by name.
        aggregator: of the run; of others than ``KNNMix`` nothing is measured.
        max_items: answers a client that are attacked.
        seed: of the draw of those.

    Returns:
        One row of figures a client, and a sentence for whatever was not measured.
    """
    uploads: dict[int, dict[str, Tensor]] = {}
    received: dict[str, tuple[int, Tensor]] = {}
    for entry, message in messages:
        name, number = entry["client"], entry["round"]
        if (
            entry["kind"].startswith("semantics")
            and entry["direction"] == "down"
            and not isinstance(aggregator, KNNMix)
        ):
            kind = type(aggregator).__name__
            return [], [f"What one client learns of another's items from the answers of {kind} is not measured."]
        if entry["kind"] != "semantics" or name not in clients:
            continue
        vectors = clients[name].in_catalogue_order(message.tensors["vectors"])
        if entry["direction"] == "up":
            uploads.setdefault(number, {})[name] = vectors
        else:
            received[name] = (number, vectors)
    rows, unmeasured = [], []
    for name, (number, vectors) in sorted(received.items()):
        sent = uploads.get(number, {})
        if name in sent and len(sent) > 1:
            rows.append(_linkage(name, number, vectors, sent, clients, max_items, seed))
        else:
            unmeasured.append(
                f"What {name} learns of another's items from its answer of round {number} is not measured: the uploads that it "
                "was mixed from are not all here."
            )
    return rows, unmeasured


def _linkage(
    name: str,
    round: int,
    received: Tensor,
    uploads: Mapping[str, Tensor],
    clients: Mapping[str, Client],
    max_items: int,
    seed: int,
) -> Facts:
    own, others = uploads[name], [other for other in sorted(uploads) if other != name]
    foreign = torch.cat([uploads[other] for other in others])
    clean = torch.cat([clients[other].module.semantics() for other in others])  # type: ignore[operator]
    sizes = [len(own), len(foreign)]
    nearest = foreign_neighbours(torch.cat([own, foreign]), sizes, 1)[1][: len(own), 0] - len(own)
    pick = torch.randperm(len(own), generator=torch_generator(seed, "answers", name))[:max_items]
    answer, owner = received[pick], nearest[pick]
    cosine = (answer * foreign[owner]).sum(dim=1)
    named = linked(answer, clean, owner)
    return {
        "client": name,
        "round": round,
        "items": len(own),
        "attacked": len(pick),
        "foreign": len(foreign),
        "cosine_mean": float(cosine.mean()),
        "copies": wilson_interval(int((cosine >= _COPY).sum()), len(pick))._asdict(),
        "with_replacement": wilson_interval(int(named.sum()), len(pick))._asdict(),
        "without_answer": wilson_interval(int(linked(own[pick], clean, owner).sum()), len(pick))._asdict(),
        "products_named": len(owner[named].unique()),
        "chance": 1 / len(foreign),
    }
