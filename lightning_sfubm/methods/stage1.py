"""Rows of the federated method's first stage, and the control that fuses it with text without an LLM."""

from lightning_sfubm.contracts import Ranker
from lightning_sfubm.methods.base import DomainRun, Method


def _stage1(run: DomainRun) -> Ranker:
    return run.stage1


def _stage1_local(run: DomainRun) -> Ranker:
    return run.trainer.local_twin(run.template, run.name).module  # type: ignore[return-value]


def _late_fusion(run: DomainRun) -> Ranker:
    return run.fusion


STAGE1: dict[str, Method] = {
    "stage1_local": Method("{model} stage 1 without federation", "{model}, stage 1", _stage1_local),
    "stage1": Method("{model} stage 1", "{model}, stage 1", _stage1, needs_stage1=True),
    "late_fusion": Method(
        "Late fusion of stage 1 and text", "Controls without an LLM", _late_fusion, needs_stage1=True
    ),
}
