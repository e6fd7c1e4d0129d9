"""Rows of published cross-domain methods."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning_sfubm.contracts import Ranker
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.union_datamodule import UnionDataModule
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.methods.base import DomainRun, Method
from lightning_sfubm.modules.baselines.unisrec import UniSRec
from lightning_sfubm.modules.baselines.unisrec_pretraining import UniSRecPretraining
from lightning_sfubm.modules.layers.count_affinity import WithCounts
from lightning_sfubm.seeds import derive_seed, follow_seed

UNION_BATCH = 256


def _unisrec(key: str, mode: str, pretrain: bool = True) -> Callable[[DomainRun], Ranker]:
    def build(run: DomainRun) -> Ranker:
        template = _template(run, key, mode, freeze_encoder=pretrain)
        # First: what it draws, where no row before has done it, would move the draws of this row.
        weights = _pretrained(run, template) if pretrain else None
        return _trained(run, key, template, run.full_data, weights)

    return build


def _fused_unisrec(run: DomainRun) -> Ranker:
    """The fusion with counts and products on UniSRec without pre-training, trained as stage 1 is: less what was held out."""
    template = _template(run, "unisrec_scratch", "inductive", freeze_encoder=False)
    module = _trained(run, "unisrec_fusion_products", template, run.data)
    fusion = run.fused(WithCounts(module, run.data.catalogue), ("train2", "val"), products=True)
    fusion.add_module("unisrec", module)  # no other row trains it: its parameters are this row's
    return fusion


def _template(run: DomainRun, key: str, mode: str, freeze_encoder: bool) -> UniSRec:
    template = run.experiment.baselines.get(key)
    if template is None:
        template = UniSRec(run.own_encoder(key), mode=mode, freeze_encoder=freeze_encoder)  # type: ignore[arg-type]
    if not isinstance(template, UniSRec):
        raise ConfigError(f"experiment.baselines.{key} must be a UniSRec, not {type(template).__name__}")
    return template


def _trained(
    run: DomainRun,
    key: str,
    template: UniSRec,
    data: DomainDataModule,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> UniSRec:
    torch.manual_seed(derive_seed(run.trainer.seed, "baseline", key, run.name))
    module = copy.deepcopy(template)
    follow_seed(module, run.trainer.seed)
    module.bind(data.catalogue)
    if weights is not None:
        module.load_pretrained(weights)
    run.fit(module, key, data)
    return module


def _pretrained(run: DomainRun, template: UniSRec) -> dict[str, torch.Tensor]:
    """Weights pre-trained on the union of all domains, once for all rows of a run that share the settings."""
    encoder = str(template.hparams["encoder"])  # its class and arguments
    names = ("num_experts", "text_dropout", "tau", "lr", "weight_decay", "warmup_steps", "logits_precision")
    settings: dict[str, Any] = {name: getattr(template, name) for name in names}

    def build() -> dict[str, torch.Tensor]:
        clients = run.trainer.loop.clients if run.trainer.loop is not None else {}
        domains = {key: client.datamodule.without_holdout() for key, client in clients.items()}  # type: ignore[attr-defined]
        union = UnionDataModule(domains, batch_size=UNION_BATCH, seed=run.trainer.seed)
        union.setup("fit")
        torch.manual_seed(derive_seed(run.trainer.seed, "unisrec", "pretraining"))
        module = UniSRecPretraining(copy.deepcopy(template.encoder), **settings, seed=run.trainer.seed)
        run.fit(module, "unisrec_pretraining", union)
        return module.shared_state()

    return run.once(f"unisrec {encoder} {settings}", "unisrec_pretraining", build)


def _method(key: str, label: str, mode: str, pretrain: bool = True) -> Method:
    group = "Text, behaviour of all domains pooled" if pretrain else "Text, one domain"
    trainings = (key, "unisrec_pretraining") if pretrain else (key,)
    build = _unisrec(key, mode, pretrain)
    return Method(label, group, build, configurable=True, promises={"mode": mode}, trainings=trainings)


CROSS_DOMAIN: dict[str, Method] = {
    "unisrec_scratch": _method("unisrec_scratch", "UniSRec without pre-training", "inductive", pretrain=False),
    "unisrec_fusion_products": Method(
        "Late fusion of UniSRec, text, counts and their products",
        "Controls without an LLM",
        _fused_unisrec,
        trainings=("unisrec_fusion_products",),
        fitted=True,
    ),
    "unisrec_inductive": _method("unisrec_inductive", "UniSRec, inductive", "inductive"),
    "unisrec_transductive": _method("unisrec_transductive", "UniSRec, transductive", "transductive"),
}
