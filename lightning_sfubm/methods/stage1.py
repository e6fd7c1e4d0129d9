"""Rows of the federated method's first stage, its upper bound, and the control that fuses it with text without an LLM."""

import copy
from functools import partial

import torch

from lightning_sfubm.contracts import Ranker
from lightning_sfubm.datamodules.union_datamodule import UnionDataModule
from lightning_sfubm.federated.client import Client
from lightning_sfubm.methods.base import DomainRun, Method
from lightning_sfubm.seeds import derive_seed


def _stage1(run: DomainRun) -> Ranker:
    return run.stage1


def _stage1_local(run: DomainRun) -> Ranker:
    return run.trainer.local_twin(run.template, run.name).module  # type: ignore[return-value]


def _stage1_pooled(run: DomainRun) -> Ranker:
    """The upper bound: a teacher pre-trained on everybody's raw behaviour, then trained on as every client trains."""
    federation = run.trainer.federation
    assert federation is not None
    client = Client(
        run.name,
        copy.deepcopy(run.template),
        run.data,
        partial(run.trainer.make_trainer, client=run.name),
        run.trainer.seed,
    )
    client.prepare()
    client.module.load_shared_state(_pooled_teacher(run))
    for phase in client.module.local_phases:
        client.train_phase(
            phase,
            run.folder("stage1_pooled"),
            lambda epoch, metrics: None,
            max_epochs=federation.local_max_epochs,
            min_epochs=federation.local_min_epochs,
            patience=federation.patience,
            monitor=federation.monitor,
        )
    client.finish()
    return client.module  # type: ignore[return-value]


def _pooled_teacher(run: DomainRun) -> dict[str, torch.Tensor]:
    """What clients share of a module trained on the union of all domains, trained once for all of them."""
    if "pooled teacher" not in run.shared:
        clients = run.trainer.loop.clients if run.trainer.loop is not None else {}
        union = UnionDataModule(
            {name: client.datamodule for name, client in clients.items()},  # type: ignore[misc]
            batch_size=run.data.batch_size,
            word_drop=0.0,
            seed=run.trainer.seed,
        )
        union.setup("fit")
        torch.manual_seed(derive_seed(run.trainer.seed, "initial weights"))
        module = copy.deepcopy(run.template)
        module.bind(union.catalogue)  # type: ignore[operator]
        module.set_phase(module.round_phase)  # type: ignore[operator]
        run.fit(module, "pooled_teacher", union)
        run.shared["pooled teacher"] = module.shared_state()  # type: ignore[operator]
    return run.shared["pooled teacher"]


def _late_fusion(run: DomainRun) -> Ranker:
    return run.fusion


STAGE1: dict[str, Method] = {
    "stage1_local": Method("{model} stage 1 without federation", "{model}, stage 1", _stage1_local),
    "stage1": Method("{model} stage 1", "{model}, stage 1", _stage1, needs_stage1=True),
    "stage1_pooled": Method(
        "{model} stage 1, teacher pre-trained on pooled behaviour",
        "Text, behaviour of all domains pooled",
        _stage1_pooled,
    ),
    "late_fusion": Method(
        "Late fusion of stage 1 and text", "Controls without an LLM", _late_fusion, needs_stage1=True
    ),
}
