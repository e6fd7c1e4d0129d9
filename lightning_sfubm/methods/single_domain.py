"""Rows that know one domain only: references, sequential encoders, and the controls without an LLM."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from lightning_sfubm.contracts import Ranker
from lightning_sfubm.methods.base import DomainRun, Method
from lightning_sfubm.modules.baselines.popularity import Popularity
from lightning_sfubm.modules.baselines.random_ranker import RandomRanker
from lightning_sfubm.modules.baselines.text_similarity import TextSimilarity
from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.sequential import SequentialRecommender
from lightning_sfubm.seeds import derive_seed, follow_seed


def _random(run: DomainRun) -> Ranker:
    return RandomRanker(run.full_data.catalogue, run.trainer.seed)


def _popularity(run: DomainRun) -> Ranker:
    return Popularity(run.full_data.catalogue)


def _text_similarity(run: DomainRun) -> Ranker:
    return TextSimilarity(run.full_data.catalogue)


def _sequential(key: str, template: Callable[[DomainRun], SequentialRecommender]) -> Callable[[DomainRun], Ranker]:
    """A row trained on one domain, as configured under ``experiment.baselines`` or else by ``template``."""

    def build(run: DomainRun) -> Ranker:
        torch.manual_seed(derive_seed(run.trainer.seed, "baseline", key, run.name))
        configured = run.experiment.baselines.get(key)
        module = template(run) if configured is None else copy.deepcopy(configured)
        follow_seed(module, run.trainer.seed)
        module.bind(run.full_data.catalogue)  # type: ignore[operator]
        run.fit(module, key)
        return module  # type: ignore[return-value]

    return build


def _own_encoder(key: str, features: str) -> Callable[[DomainRun], SequentialRecommender]:
    def template(run: DomainRun) -> SequentialRecommender:
        encoder, lr = run.own_encoder(key), run.template.lr
        return SequentialRecommender(encoder, features=features, lr=lr)  # type: ignore[arg-type]

    return template


def recommender_template(run: DomainRun) -> SequentialRecommender:
    """An untrained recommender with the settings of row ``encoder``."""
    configured = run.experiment.baselines.get("encoder")
    return _own_encoder("encoder", "id")(run) if configured is None else copy.deepcopy(configured)  # type: ignore[return-value]


def _gru4rec(run: DomainRun) -> SequentialRecommender:
    return SequentialRecommender(GRU4Rec(hidden_dim=64), lr=3e-3)


def _sasrec_bce(run: DomainRun) -> SequentialRecommender:
    """Loss and dropout of the SASRec paper: one uniform negative for each position."""
    encoder = SASRec(hidden_dim=64, max_length=run.full_data.max_length, dropout=0.5)
    return SequentialRecommender(encoder, loss="bce", lr=1e-3)


def _trained(
    key: str,
    label: str,
    template: Callable[[DomainRun], SequentialRecommender],
    group: str = "One domain",
    encoder: type[nn.Module] | None = None,
    **promises: str,
) -> Method:
    """A row of a sequential recommender, and what its label says of one that is configured for it."""
    build = _sequential(key, template)
    return Method(label, group, build, configurable=True, promises=promises, encoder=encoder, trainings=(key,))


SINGLE_DOMAIN: dict[str, Method] = {
    "random": Method("Random", "Reference", _random),
    "popularity": Method("Popularity", "Reference", _popularity),
    "text_similarity": Method("Text similarity, untrained", "Reference", _text_similarity),
    "gru4rec": _trained("gru4rec", "GRU4Rec", _gru4rec, encoder=GRU4Rec, features="id"),
    "sasrec_bce": _trained(
        "sasrec_bce", "SASRec, one negative", _sasrec_bce, encoder=SASRec, features="id", loss="bce"
    ),
    "encoder": _trained("encoder", "{encoder} alone", _own_encoder("encoder", "id"), features="id"),
    "id_text": _trained(
        "id_text",
        "ID + text, one encoder",
        _own_encoder("id_text", "id+text"),
        "Controls without an LLM",
        features="id+text",
    ),
}
