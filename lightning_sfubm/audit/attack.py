"""All attacks on the messages of a run, as plain figures: what ``audit.json`` holds. No user, item or title is named."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_sfubm.audit.answers import answers
from lightning_sfubm.audit.replay import GLOBAL, Update, Upload, replay
from lightning_sfubm.audit.shadows import shadow_losses
from lightning_sfubm.audit.subjects import Subjects, sequence_losses, subjects, trained_items
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.errors import ConfigError, DataError, PrivacyError
from lightning_sfubm.evaluation.facts import plain
from lightning_sfubm.evaluation.significance import Estimate, wilson_interval
from lightning_sfubm.federated.client import Client
from lightning_sfubm.federated.loop import FederatedLoop
from lightning_sfubm.federated.messages import Message
from lightning_sfubm.federated.trainer import FederatedTrainer
from lightning_sfubm.modules.fkd import FKDDistiller
from lightning_sfubm.privacy.attacks import (
    area_limit,
    area_under_roc,
    attribute_inference,
    averaged,
    calibrated_scores,
    first_layer_shift,
    linked,
    logit_shift,
    membership,
    random_update,
    rate_limit,
    strongest_call,
)
from lightning_sfubm.privacy.attacks.attribute import most_common
from lightning_sfubm.privacy.attacks.membership import FALSE_POSITIVES
from lightning_sfubm.seeds import torch_generator

Facts = dict[str, Any]
_MIN_GROUP = 10  #: items without which a group says nothing


@dataclass(frozen=True)
class AuditSettings:
    """How much is attacked.

    Attributes:
        shadows: shadow models a domain, even; 0 = membership by loss alone.
        max_users: users a domain whose membership is asked about, half of them members.
        max_items: vectors a client that are linked, sent and received (without replacement that is quadratic), and probes of
            item inference.
        classes: most common categories that attribute inference tells apart.
        random_updates: updates of random direction that say where item inference lies by chance.
        seed: of every draw.
    """

    shadows: int = 4
    max_users: int = 4000
    max_items: int = 2000
    classes: int = 10
    random_updates: int = 5
    seed: int = 1


def attack(
    trainer: FederatedTrainer,
    loop: FederatedLoop,
    messages: list[tuple[dict[str, Any], Message]],
    lines: list[dict[str, Any]],
    settings: AuditSettings,
) -> Facts:
    """Run every attack that the messages and the data allow.

    Args:
        trainer: built from the run's configuration.
        loop: of it; the clients' modules are changed.
        messages: checked messages with their ledger lines.
        lines: all lines of the ledger.
        settings: how much is attacked.

    Returns:
        Lists ``linkage``, ``attribute``, ``answers``, ``membership`` and ``items`` of figures with their chance level beside,
        and ``not_run``, a sentence for whatever could not be attacked.
    """
    initial = dict(loop.server.global_teacher)
    uploads, updates = replay(messages, lines, loop.clients, initial, partial(protected_vectors, loop))
    received, unmeasured = answers(
        messages, loop.clients, loop.federation.aggregator, settings.max_items, settings.seed
    )
    facts: Facts = {"linkage": [], "attribute": [], "answers": received, "membership": [], "items": []}
    facts["not_run"] = unmeasured
    for name, client in loop.clients.items():
        if sent := [upload for upload in uploads if upload.client == name]:
            facts["linkage"].append(_linkage(client, sent, settings))
            facts["attribute"].extend(_attributes(client, sent[-1], settings))
    if not uploads:
        facts["not_run"].append("No item vectors were sent: linkage and attribute inference have nothing to attack.")
    if not updates:
        facts["not_run"].append("No teacher weights were sent: membership and item inference have nothing to attack.")
    for name, client in loop.clients.items():
        if not updates:
            break
        if not isinstance(client.module, FKDDistiller):
            facts["not_run"].append(f"{type(client.module).__name__} shares no teacher that these attacks know.")
            break
        facts["items"].extend(_items(client, updates, settings, facts["not_run"]))
        try:
            who = subjects(_data(client), settings.max_users, settings.seed)
        except DataError as error:
            facts["not_run"].append(f"Membership inference, {name}: {error}.")
            continue
        facts["membership"].extend(
            _membership(trainer, loop, client, initial, updates, who, settings, facts["not_run"])
        )
    return plain(facts)  # type: ignore[no-any-return]


def protected_vectors(loop: FederatedLoop, name: str) -> Tensor:
    """Item vectors (N, D) of an untrained client as its callbacks leave them, rows in its private order."""
    tensors = {"vectors": loop.clients[name].semantics()}
    for callback in loop.callbacks:
        tensors = callback.on_upload(loop, name, "semantics", tensors)
    return tensors["vectors"]


# ---------------------------------------------------------------------- item vectors


def _linkage(client: Client, sent: list[Upload], settings: AuditSettings) -> Facts:
    clean: Tensor = client.module.semantics()  # type: ignore[operator]
    generator = torch_generator(settings.seed, "linkage items")
    pick = torch.randperm(len(clean), generator=generator)[: settings.max_items]
    last = sent[-1].vectors
    alone = linked(last[pick], clean[pick], torch.arange(len(pick)), one_to_one=True)
    mean = averaged([upload.vectors for upload in sent])
    cosine = (clean * last).sum(dim=1)
    return {
        "client": client.name,
        "uploads": len(sent),
        "items": len(clean),
        "attacked": len(pick),
        "sigma": sent[-1].sigma,
        "cosine_mean": float(cosine.mean()),
        "with_replacement": _share(linked(last[pick], clean, pick)),
        "without_replacement": _share(alone),
        "after_averaging": _share(linked(mean[pick], clean, pick)),
        "chance": 1 / len(clean),
        "chance_without_replacement": 1 / len(pick),
    }


def _attributes(client: Client, sent: Upload, settings: AuditSettings) -> list[Facts]:
    clean: Tensor = client.module.semantics()  # type: ignore[operator]
    generator = torch_generator(settings.seed, "attribute inference", client.name)
    order = torch.randperm(len(clean), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    like_sent = normalize(clean + sent.sigma * noise, dim=1)
    figures = []
    for name, labels in _labels(_data(client), settings.classes).items():
        half = [rows[labels[rows] >= 0] for rows in order.chunk(2)]
        if len(half) < 2 or min(map(len, half)) < _MIN_GROUP or len(labels[half[0]].unique()) < 2:
            continue
        known, attacked = half
        found = attribute_inference(like_sent[known], labels[known], sent.vectors[attacked], labels[attacked])
        figures.append(
            {
                "client": client.name,
                "attribute": name,
                "sigma": sent.sigma,
                "classes": found.classes,
                "accuracy": found.accuracy._asdict(),
                "chance": found.majority,
            }
        )
    return figures


def _labels(data: DomainDataModule, classes: int) -> dict[str, Tensor]:
    """Classes of the items (N,): the first entry of the text beside the title, and popularity in thirds."""
    domain, labels = data.domain, {}
    beside = [
        text[len(title) :].lstrip(". ").split(", ")[0] if text.startswith(title) else ""
        for title, text in zip(domain.titles[1:], domain.texts[1:], strict=True)
    ]
    if any(beside):
        labels["category"] = most_common(beside, classes)
    ranks = data.catalogue.train_counts[1:].argsort(stable=True).argsort(stable=True)
    labels["popularity, in thirds"] = ranks * 3 // max(1, len(ranks))
    return labels


# ---------------------------------------------------------------------- updates of the teacher


def _membership(
    trainer: FederatedTrainer,
    loop: FederatedLoop,
    client: Client,
    initial: Mapping[str, Tensor],
    updates: list[Update],
    who: Subjects,
    settings: AuditSettings,
    not_run: list[str],
) -> list[Facts]:
    """Each update by its loss, the last of the client and the last aggregated one also against shadow models."""
    mine = [update for update in updates if update.client in (client.name, GLOBAL)]
    if not mine:  # a run that ended before its first update did
        not_run.append(f"Membership inference, {client.name}: no weights of its own and none aggregated were recorded.")
        return []
    losses = []
    for update in mine:
        _load(client, update, update.after)
        losses.append(sequence_losses(client.module.teacher, who))  # type: ignore[arg-type]
    figures = [
        _member_facts(client.name, update, "loss", -loss, who, settings)
        for update, loss in zip(mine, losses, strict=True)
    ]
    if not settings.shadows:
        return figures
    _load(client, mine[-1], mine[-1].after)  # the shadows have the global view of the attacked model
    rounds = sum(update.client == client.name for update in mine) or len(mine)
    try:
        shadows, inside = shadow_losses(
            trainer,
            client,
            initial,
            who,
            count=settings.shadows,
            epochs=rounds * loop.federation.epochs(client.name),
            seed=settings.seed,
        )
    except (ConfigError, PrivacyError) as error:  # what holds for the run's users need not hold for half of them
        not_run.append(f"Membership inference against shadow models, {client.name}: {error}.")
        return figures
    newest = {update.client: index for index, update in enumerate(mine)}
    for index in newest.values():
        scores = calibrated_scores(losses[index], shadows, inside)
        figures.append(_member_facts(client.name, mine[index], "calibrated", scores, who, settings))
    return figures


def _member_facts(
    domain: str, update: Update, score: str, scores: Tensor, who: Subjects, settings: AuditSettings
) -> Facts:
    found = membership(scores, who.member, seed=settings.seed)
    epsilon, delta = update.privacy.get("epsilon"), update.privacy.get("delta")
    limit = None
    if epsilon is not None and delta is not None:
        limit = {"auc": area_limit(epsilon, delta), "tpr": rate_limit(epsilon, delta, FALSE_POSITIVES)}
    return {
        "domain": domain,
        "client": update.client,
        "round": update.round,
        "score": score,
        "auc": found.auc._asdict(),
        "tpr": found.tpr._asdict(),
        "chance": {"auc": 0.5, "tpr": FALSE_POSITIVES},
        "members": found.members,
        "others": found.others,
        "epsilon": epsilon,
        "delta": delta,
        "limit": limit,
    }


def _items(client: Client, updates: list[Update], settings: AuditSettings, not_run: list[str]) -> list[Facts]:
    """The client's own updates; where none travelled in the clear, the aggregated ones."""
    trained = trained_items(_data(client))
    if min(int(trained.sum()), int((~trained).sum())) < _MIN_GROUP:
        not_run.append(
            f"Item inference, {client.name}: {int(trained.sum())} items were trained on and {int((~trained).sum())} were not; "
            f"{_MIN_GROUP} of each are needed."
        )
        return []
    own = [update for update in updates if update.client == client.name]
    figures = []
    for update in own or [update for update in updates if update.client == GLOBAL]:
        generator = torch_generator(settings.seed, "random updates", client.name, update.round)
        blind = [random_update(update.before, update.after, generator) for _ in range(settings.random_updates)]
        by_chance: dict[str, list[float]] = {}
        for weights in blind:
            for score, values in _item_scores(client, update, weights, settings).items():
                by_chance.setdefault(score, []).append(area_under_roc(values[trained], values[~trained]).value)
        for score, values in _item_scores(client, update, update.after, settings).items():
            figures.append(
                {
                    "domain": client.name,
                    "client": update.client,
                    "round": update.round,
                    "score": score,
                    "auc": area_under_roc(values[trained], values[~trained])._asdict(),
                    "random_updates": sorted(by_chance.get(score, [])),
                    "chance": 0.5,
                    "trained": int(trained.sum()),
                    "untrained": int((~trained).sum()),
                    "epsilon": update.privacy.get("epsilon"),
                }
            )
    return figures


def _item_scores(
    client: Client, update: Update, after: Mapping[str, Tensor], settings: AuditSettings
) -> dict[str, Tensor]:
    layer, vectors = "adaptor.experts.weight", client.module.semantics()  # type: ignore[operator]
    generator = torch_generator(settings.seed, "probes", client.name)
    probes = torch.randperm(len(vectors), generator=generator)[: settings.max_items]
    earlier, later = (_logit_inputs(client, update, weights, probes) for weights in (update.before, after))
    return {
        "first layer": first_layer_shift(update.before[layer], after[layer], vectors),
        "rise of logits": logit_shift(earlier, later),
        "strongest call": strongest_call(*later, probes),
    }


@torch.no_grad()
def _logit_inputs(
    client: Client, update: Update, weights: Mapping[str, Tensor], probes: Tensor
) -> tuple[Tensor, Tensor]:
    """States of histories of a single item each, and the vectors of all items."""
    _load(client, update, weights)
    teacher: Any = client.module.teacher
    table = teacher.frozen_table()
    states, items = teacher.scaled(teacher.states(probes[:, None] + 1, table)[:, -1], table)
    return states.float(), items[1:].float()


def _load(client: Client, update: Update, weights: Mapping[str, Tensor]) -> None:
    """Put an update into the client's module as it stood when the update was made."""
    if client.name in update.views:
        client.module.receive_semantics(update.views[client.name])  # type: ignore[operator]
    client.module.load_shared_state(dict(weights))  # type: ignore[operator]
    client.module.eval()


def _data(client: Client) -> DomainDataModule:
    return client.datamodule  # type: ignore[return-value]


def _share(hits: Tensor) -> dict[str, Any]:
    estimate: Estimate = wilson_interval(int(hits.sum()), len(hits))
    return estimate._asdict()
