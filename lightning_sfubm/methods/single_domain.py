"""Rows that know one domain only: references, sequential encoders, and the controls without an LLM."""

import copy
from collections.abc import Callable

import torch

from lightning_sfubm.contracts import Ranker
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.methods.base import DomainRun, Method
from lightning_sfubm.modules.baselines.popularity import Popularity
from lightning_sfubm.modules.sequential import SequentialRecommender
from lightning_sfubm.seeds import derive_seed


def _popularity(run: DomainRun) -> Ranker:
    return Popularity(run.full_data.catalogue)


def _sequential(key: str, features: str) -> Callable[[DomainRun], Ranker]:
    def build(run: DomainRun) -> Ranker:
        torch.manual_seed(derive_seed(run.trainer.seed, "baseline", features, run.name))
        template = run.experiment.baselines.get(key)
        if template is None:
            encoder = getattr(run.template, "encoder", None)
            if encoder is None:
                raise ConfigError(
                    f"row '{key}' takes its encoder from model.encoder, which this model does not have; "
                    f"configure it as experiment.baselines.{key}"
                )
            lr = run.template.lr
            template = SequentialRecommender(copy.deepcopy(encoder), features=features, lr=lr)  # type: ignore[arg-type]
        module = copy.deepcopy(template)
        module.bind(run.full_data.catalogue)  # type: ignore[operator]
        run.fit(module, key)
        return module  # type: ignore[return-value]

    return build


SINGLE_DOMAIN: dict[str, Method] = {
    "popularity": Method("Popularity", "Reference", _popularity),
    "encoder": Method("{encoder} alone", "One domain", _sequential("encoder", "id")),
    "id_text": Method("ID + text, one encoder", "Controls without an LLM", _sequential("id_text", "id+text")),
}
