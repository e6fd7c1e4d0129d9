"""Rows of the federated method's first stage, its upper bound, and the control that fuses it with text without an LLM."""

import copy
from collections.abc import Callable
from functools import partial
from operator import attrgetter

import torch

from lightning_sfubm.contracts import Ranker
from lightning_sfubm.datamodules.union_datamodule import UnionDataModule
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.methods.base import TWINS, DomainRun, Method
from lightning_sfubm.modules.baselines.score_sum import Branch, ScoreSum
from lightning_sfubm.modules.baselines.side_by_side import SideBySide
from lightning_sfubm.modules.fkd import FKDDistiller
from lightning_sfubm.modules.layers.count_affinity import WithCounts
from lightning_sfubm.seeds import derive_seed


def _students(key: str) -> Callable[[DomainRun], Ranker]:
    """The student of a row, or the sum of its students' scores, weighed on the held-out samples."""

    def build(run: DomainRun) -> Ranker:
        students = [run.twin(number).module for number in TWINS[key]]
        if len(students) == 1:
            return students[0]  # type: ignore[return-value]
        both = ScoreSum(students)
        both.fit(run.data.rank_dataloader("train2", 256))
        return both

    return build


def _with_teacher(run: DomainRun) -> Ranker:
    """The federated student and its teacher, which is there already: the one knows items by their ids, the other by text."""
    both = ScoreSum([run.stage1, Branch(run.stage1, "teacher")])
    both.fit(run.data.rank_dataloader("train2", 256))
    return both


#: rows of a student that learns from the very teacher of row ``stage1``, less a part of how it learns
WITHOUT: dict[str, tuple[str, tuple[str, ...]]] = {
    "stage1_no_fkd": ("without distillation", ("fact", "counter", "align", "start")),
    "stage1_no_fact": ("without FACT", ("fact",)),
    "stage1_no_counter": ("without COUNTER", ("counter",)),
    "stage1_no_align": ("without ALIGN", ("align",)),
    "stage1_no_start": ("table not started from the teacher", ("start",)),
}


def _student_without(key: str) -> Callable[[DomainRun], Ranker]:
    """Another student of the trained teacher: what its parts are worth, without the difference between two teachers."""

    def build(run: DomainRun) -> Ranker:
        trained = run.stage1
        if not isinstance(trained, FKDDistiller):
            raise ConfigError(
                f"row '{key}' leaves out a term of FKDDistiller, which {type(trained).__name__} does not have"
            )
        client = run.new_client(key)
        module = client.module
        assert isinstance(module, FKDDistiller)
        module.restore_shapes(trained.checkpoint_shapes())  # with a view of the federation where there is one
        module.teacher.load_state_dict(trained.teacher.state_dict())
        module.leave_out(*WITHOUT[key][1])
        run.train_phases(client, ("student",), key)
        return module

    return build


def _stage1_pooled(run: DomainRun) -> Ranker:
    """The upper bound: a teacher pre-trained on everybody's raw behaviour, then trained on as every client trains."""
    client = run.new_client("pooled")
    client.module.load_shared_state(_pooled_teacher(run))
    run.train_phases(client, client.module.local_phases, "stage1_pooled")
    return client.module  # type: ignore[return-value]


def _pooled_teacher(run: DomainRun) -> dict[str, torch.Tensor]:
    """What clients share of a module trained on the union of all domains, trained once for all of them."""

    def build() -> dict[str, torch.Tensor]:
        assert run.trainer.loop is not None
        domains = {name: client.datamodule for name, client in run.trainer.loop.clients.items()}
        union = UnionDataModule(
            domains,  # type: ignore[arg-type]
            batch_size=next(iter(domains.values())).batch_size,  # type: ignore[attr-defined]  # whichever domain asks first
            word_drop=0.0,
            seed=run.trainer.seed,
        )
        union.setup("fit")
        torch.manual_seed(derive_seed(run.trainer.seed, "initial weights"))
        module = copy.deepcopy(run.template)
        module.bind(union.catalogue)  # type: ignore[operator]
        module.set_phase(module.round_phase)  # type: ignore[operator]
        run.fit(module, "pooled_teacher", union)
        state: dict[str, torch.Tensor] = module.shared_state()  # type: ignore[operator]
        return state

    return run.once("pooled teacher", "pooled_teacher", build)


def _fusion(label: str, fusion: str) -> Method:
    """A fusion that the run has under this name."""
    return Method(label, "Controls without an LLM", attrgetter(fusion), needs_stage1=True, fitted=True)


#: fusions with counts and products of other students than the federated one, by the twins whose scores they weigh
FUSED_TWINS: dict[str, tuple[str, tuple[int, ...]]] = {
    "late_fusion_products_local": ("Late fusion of stage 1 without federation, text, counts and their products", (1,)),
    "late_fusion_products_local_twice": (
        "Late fusion of two stages 1 without federation, text, counts and their products",
        (1, 2),
    ),
    "late_fusion_products_beside_own": (
        "Late fusion of stage 1, the silo's own stage 1, text, counts and their products",
        (0, 1),
    ),
}


def _fused_twins(key: str) -> Callable[[DomainRun], Ranker]:
    """The fusion of row ``late_fusion_products`` on what a silo trained alone, or on two first stages."""

    def build(run: DomainRun) -> Ranker:
        numbers = FUSED_TWINS[key][1]
        for number in filter(None, numbers):  # the row's own cost is the fusion's, as for that on the federated stage 1
            run.once(f"twin {number}", f"stage 1 alone, {number}", partial(run.twin, number))
        stages = [run.twin(number).module for number in numbers]
        stage1 = stages[0] if len(stages) == 1 else SideBySide(*stages)  # type: ignore[arg-type]
        return run.fused(WithCounts(stage1, run.data.catalogue), ("train2", "val"), products=True)  # type: ignore[arg-type]

    return build


def _row(key: str, label: str, needs_stage1: bool) -> Method:
    return Method(label, "{model}, stage 1", _students(key), needs_stage1=needs_stage1, fitted=len(TWINS[key]) > 1)


STAGE1: dict[str, Method] = {
    "stage1_local": _row("stage1_local", "{model} stage 1 without federation", False),
    "stage1_local_twice": _row("stage1_local_twice", "{model} stage 1 without federation, two students", False),
    "stage1": _row("stage1", "{model} stage 1", True),
    "stage1_with_teacher": Method(
        "{model} stage 1, student and teacher",
        "{model}, stage 1",
        _with_teacher,
        needs_stage1=True,
        branch="teacher",
        fitted=True,
    ),
    "stage1_beside_own": _row("stage1_beside_own", "{model} stage 1, beside the silo's own student", True),
    "stage1_pooled": Method(
        "{model} stage 1, teacher pre-trained on pooled behaviour",
        "Text, behaviour of all domains pooled",
        _stage1_pooled,
        trainings=("pooled_teacher",),
        branch="teacher",
    ),
    **{
        key: Method(
            "{model} stage 1, " + label,
            "{model}, stage 1",
            _student_without(key),
            needs_stage1=True,
            branch="teacher",
        )
        for key, (label, _) in WITHOUT.items()
    },
    "late_fusion": _fusion("Late fusion of stage 1 and text", "fusion"),
    "late_fusion_counts": _fusion("Late fusion of stage 1, text and counts", "count_fusion"),
    "late_fusion_products": _fusion("Late fusion of stage 1, text, counts and their products", "product_fusion"),
    **{
        key: Method(label, "Controls without an LLM", _fused_twins(key), needs_stage1=0 in numbers, fitted=True)
        for key, (label, numbers) in FUSED_TWINS.items()
    },
}
