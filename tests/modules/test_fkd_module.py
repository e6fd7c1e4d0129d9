import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch

from lightning_sfubm.contracts import Catalogue, CatalogueRanker, FederatedModule, RankBatch, TrainBatch
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.errors import CheckpointError, ConfigError, MessageError
from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.fkd import FKDDistiller
from lightning_sfubm.modules.layers.cooccurrence import cooccurrence_vectors
from lightning_sfubm.modules.layers.text_affinity import text_affinities
from lightning_sfubm.modules.losses import fkd
from lightning_sfubm.modules.losses.fkd import prefixes
from lightning_sfubm.modules.sequential import SequentialRecommender
from lightning_sfubm.seeds import torch_generator


def build(catalogue: Catalogue, phase: str = "student", **kwargs) -> FKDDistiller:
    torch.manual_seed(0)
    settings = {"num_experts": 2, "logits_precision": "fp32", **kwargs}
    module = FKDDistiller(SASRec(8, num_heads=1), phase=phase, **settings)
    module.bind(catalogue)
    return module


def logged_step(module: FKDDistiller, batch: TrainBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logged: dict[str, torch.Tensor] = {}
    module.log_losses = lambda batch, **terms: logged.update(terms)  # type: ignore[method-assign]
    return module.training_step(batch, 0), logged


def with_gradient(module: FKDDistiller) -> set[str]:
    return {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize(
    ("phase", "moved"),
    [
        ("teacher", {"teacher"}),
        ("student", {"encoder", "ids", "align_projection"}),
        ("joint", {"teacher", "encoder", "ids", "align_projection"}),
    ],
)
def test_a_phase_trains_its_branch_only(
    catalogue: Catalogue, train_batch: TrainBatch, phase: str, moved: set[str]
) -> None:
    module = build(catalogue, phase).train()
    module.training_step(train_batch, 0).backward()
    assert with_gradient(module) == moved
    optimised = {id(p) for p in module.trained_parameters()}
    named = {name.split(".")[0] for name, p in module.named_parameters() if id(p) in optimised}
    assert named == moved


def test_the_student_sends_no_gradient_to_a_training_teacher(catalogue: Catalogue, train_batch: TrainBatch) -> None:
    """T26: with its own loss off, the joint phase leaves the teacher alone."""
    module = build(catalogue, "joint", alpha=0.0).train()
    module.training_step(train_batch, 0).backward()
    assert "teacher" not in with_gradient(module)


def test_terms_add_up_and_are_logged_by_name(catalogue: Catalogue, train_batch: TrainBatch) -> None:
    module = build(catalogue, counter="both", w_fact=0.7, w_counter=0.3, w_align=0.2).eval()
    loss, terms = logged_step(module, train_batch)
    assert set(terms) == {"loss", "ce", "fact", "counter_non_target", "counter_what_if", "align"}
    expected = (
        terms["ce"]
        + 0.7 * terms["fact"]
        + 0.3 * (terms["counter_non_target"] + terms["counter_what_if"])
        + 0.2 * terms["align"]
    )
    torch.testing.assert_close(loss, expected)


def test_each_term_is_its_definition(catalogue: Catalogue, train_batch: TrainBatch) -> None:
    """Over the pool of what a position's history, swapped or not, does not hold; the teacher's logits are cosines."""
    module = build(catalogue, counter="both", temperature=2.0, tau=0.3).eval()
    _, terms = logged_step(module, train_batch)
    ids, z = module.item_tables()
    history, predicting = train_batch["history"], train_batch["targets"] != 0
    targets = train_batch["targets"][predicting]

    def logits(history: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The student's, the teacher's, and the columns outside the pool, one position after the other."""
        student, teacher, outside = [], [], torch.zeros(len(targets), catalogue.num_items + 1, dtype=torch.bool)
        for row, place in predicting.nonzero().tolist():
            known = history[row : row + 1, : place + 1]
            outside[len(student), known[0]] = True
            student.append(module.encoder(ids[known], known != 0)[0, -1] @ ids.T)
            state = module.teacher.encoder(z[known], known != 0)[0, -1]
            teacher.append(torch.cosine_similarity(state, z, dim=-1) / 0.3)
        return torch.stack(student), torch.stack(teacher), fkd.pool_mask(outside, targets)

    swapped = fkd.swap_items(history, fkd.nearest_items(z, 10), 0.3, torch_generator(0, "what_if", 0))
    assert not torch.equal(swapped, history)
    items = torch.cat([history.flatten(), targets]).unique()[1:]
    student, teacher, outside = logits(history)
    expected = {
        "ce": torch.nn.functional.cross_entropy(student[:, 1:], targets - 1),
        "fact": fkd.fact(student, teacher, targets, outside, 2.0).mean(),
        "counter_non_target": fkd.non_target(student, teacher, targets, outside, 2.0).mean(),
        "counter_what_if": fkd.what_if(*logits(swapped), 2.0).mean(),
        "align": fkd.align(module.align_projection(ids[items]), z[items], 0.3),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("phase", "weight"), [("teacher", 1.0), ("joint", 0.4)])
def test_the_teacher_s_loss_is_weighed_beside_the_student_s_alone(
    catalogue: Catalogue, train_batch: TrainBatch, phase: str, weight: float
) -> None:
    module = build(catalogue, phase, alpha=0.4, w_fact=0.0, w_counter=0.0, w_align=0.0).eval()
    loss, terms = logged_step(module, train_batch)
    torch.testing.assert_close(loss, weight * terms["teacher_ce"] + terms.get("ce", 0.0))


def test_neighbours_to_swap_for_follow_the_teacher_by_epoch(catalogue: Catalogue, train_batch: TrainBatch) -> None:
    module = build(catalogue, "joint", counter="what_if").eval()
    module.on_train_epoch_start()
    generator = torch_generator(0, "another teacher")
    shared = module.shared_state()
    module.load_shared_state({n: v + torch.randn(v.shape, generator=generator) for n, v in shared.items()})
    fresh = build(catalogue, "joint", counter="what_if").eval()
    fresh.load_state_dict(module.state_dict())
    expected = logged_step(fresh, train_batch)[1]["counter_what_if"]
    assert not torch.isclose(logged_step(module, train_batch)[1]["counter_what_if"], expected), (
        "still of the last epoch"
    )
    module.on_train_epoch_start()
    torch.testing.assert_close(logged_step(module, train_batch)[1]["counter_what_if"], expected)


def test_zero_weights_are_the_plain_id_encoder(catalogue: Catalogue, train_batch: TrainBatch) -> None:
    module = build(catalogue, w_fact=0.0, w_counter=0.0, w_align=0.0).eval()
    loss, terms = logged_step(module, train_batch)
    assert set(terms) == {"loss", "ce"}
    plain = SequentialRecommender(module.encoder, logits_precision="fp32")
    plain.bind(catalogue)
    plain.items.ids = module.ids
    torch.testing.assert_close(loss, plain.eval().training_step(train_batch, 0))


@pytest.mark.parametrize("counter", ["both", "non_target", "what_if", "none"])
def test_counter_forms(catalogue: Catalogue, train_batch: TrainBatch, counter: str) -> None:
    module = build(catalogue, counter=counter, w_fact=0.0, w_align=0.0).eval()
    loss, terms = logged_step(module, train_batch)
    named = {"non_target": "counter_non_target", "what_if": "counter_what_if"}
    expected = terms["ce"] + sum(terms[name] for form, name in named.items() if counter in (form, "both"))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("fact", {"w_fact": 0.0}),
        ("counter", {"counter": "none"}),
        ("align", {"w_align": 0.0}),
        ("start", {"init_from_teacher": False}),
    ],
)
def test_what_is_left_out_is_as_if_never_set(
    part: str, settings: dict[str, Any], catalogue: Catalogue, train_batch: TrainBatch
) -> None:
    def first_step(module: FKDDistiller) -> tuple[float, dict[str, float]]:
        module.eval().on_fit_start()
        module.on_train_epoch_start()
        loss, terms = logged_step(module, train_batch)
        return loss.item(), {name: value.item() for name, value in terms.items()}

    both = {"counter": "both"}
    whole, lessened, never = (build(catalogue, **kwargs) for kwargs in (both, both, {**both, **settings}))
    lessened.leave_out(part)
    expected = first_step(never)
    assert first_step(lessened) == expected
    assert first_step(whole) != expected
    assert [p.requires_grad for p in lessened.parameters()] == [p.requires_grad for p in never.parameters()]


def test_prefixes() -> None:
    history = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]])
    predicting = torch.tensor([[False, False, True, True], [True, False, False, True]])
    assert prefixes(history, predicting).tolist() == [[0, 0, 5, 0], [0, 0, 5, 6], [1, 0, 0, 0], [1, 2, 3, 4]]


def test_ranking_follows_the_phase(catalogue: Catalogue, rank_batch: RankBatch) -> None:
    module = build(catalogue).eval()
    assert isinstance(module, CatalogueRanker)
    assert isinstance(module, FederatedModule)
    by_student = module.rank(rank_batch)
    by_teacher = module.candidate_scores(rank_batch, "teacher")
    affinities = module.affinities(rank_batch)
    assert affinities.shape == (5, 10, len(module.affinity_names))
    torch.testing.assert_close(affinities[..., 0], by_student)
    torch.testing.assert_close(affinities[..., 1], by_teacher)
    text = text_affinities(module.teacher.text, rank_batch["history"], rank_batch["candidates"])
    torch.testing.assert_close(affinities[..., 2:], text)
    module.set_phase("teacher")
    torch.testing.assert_close(module.rank(rank_batch), by_teacher)
    for branch in ("", "student"):
        order = torch.randperm(10)
        shuffled = copy.copy(rank_batch)
        shuffled["candidates"] = rank_batch["candidates"][:, order]
        expected = module.candidate_scores(rank_batch, branch)[:, order]
        torch.testing.assert_close(module.candidate_scores(shuffled, branch), expected)


def test_left_padding_changes_nothing(catalogue: Catalogue, rank_batch: RankBatch) -> None:
    module = build(catalogue).eval()
    longer = copy.copy(rank_batch)
    longer["history"] = torch.cat([torch.zeros(5, 4, dtype=torch.int64), rank_batch["history"]], 1)
    torch.testing.assert_close(module.affinities(longer), module.affinities(rank_batch))


def test_frozen_teacher_stays_in_evaluation_mode(catalogue: Catalogue) -> None:
    module = build(catalogue).train()
    assert not module.teacher.training
    assert module.encoder.training
    module.set_phase("teacher")
    assert module.teacher.training
    assert not module.encoder.training


def test_semantics_round_trip(catalogue: Catalogue) -> None:
    """g = x leaves z as it was; another g changes it; rows keep their order."""
    module = build(catalogue).eval()
    before = module.item_tables()[1]
    assert torch.equal(module.semantics(), catalogue.text_embeddings[1:])
    module.receive_semantics(module.semantics())
    torch.testing.assert_close(module.item_tables()[1], before)
    changed = module.semantics()
    changed[3] = -changed[3]
    module.receive_semantics(changed)
    moved = (module.item_tables()[1] - before).abs().amax(1) > 1e-6
    assert moved.nonzero().flatten().tolist() == [4]
    with pytest.raises(MessageError, match=r"shape \(29, 12\), this domain needs \(30, 12\)"):
        module.receive_semantics(changed[1:])
    with pytest.raises(MessageError, match="not finite"):
        module.receive_semantics(changed / 0)


def test_a_teacher_starts_as_near_to_its_own_view_as_asked_for(catalogue: Catalogue) -> None:
    moved = []
    for share in (0.5, 0.9):
        module = build(catalogue, own_share=share).eval()
        before = module.item_tables()[1]
        module.receive_semantics(-module.semantics())
        moved.append((module.item_tables()[1] - before)[1:].norm())
    torch.testing.assert_close(moved[1], moved[0] / 5)  # .1 of the way to the other view instead of .5


def test_only_the_teacher_leaves_and_comes_back(catalogue: Catalogue) -> None:
    """T18: no table of ids, no text vector, no ID encoder in the shared state."""
    module = build(catalogue)
    shared = module.shared_state()
    assert {name.split(".")[0] for name in shared} == {"adaptor", "fusion", "encoder"}
    assert all(catalogue.num_items + 1 not in value.shape for value in shared.values())
    private = {name: p.clone() for name, p in module.named_parameters() if not name.startswith("teacher")}
    z = module.item_tables()[1]
    module.load_shared_state({name: value + 1 for name, value in shared.items()})
    assert all(torch.equal(value + 1, module.shared_state()[name]) for name, value in shared.items())
    assert all(torch.equal(value, dict(module.named_parameters())[name]) for name, value in private.items())
    assert not torch.equal(module.item_tables()[1], z)
    del shared["fusion.gate.bias"]
    with pytest.raises(MessageError, match=r"lacks 'fusion.gate.bias'"):
        module.load_shared_state(shared)


def test_table_can_start_from_the_teacher_once(catalogue: Catalogue, make_trainer: Callable[..., L.Trainer]) -> None:
    module = build(catalogue, "teacher", init_from_teacher=True)
    module.trainer = make_trainer()
    drawn = module.ids.weight.clone()
    module.on_fit_start()
    assert torch.equal(module.ids.weight, drawn)
    module.set_phase("student")
    module.on_fit_start()
    z = torch.nn.functional.normalize(module.item_tables()[1], dim=1)
    torch.testing.assert_close(module.ids.weight.detach(), z)
    with torch.no_grad():
        module.ids.weight.add_(1.0)
    module.on_fit_start()
    torch.testing.assert_close(module.ids.weight.detach(), z + 1.0)


@pytest.mark.parametrize("from_teacher", [True, False])
def test_table_can_start_from_cooccurrences(
    synthetic: DomainDataModule, make_trainer: Callable[..., L.Trainer], from_teacher: bool
) -> None:
    """Beside the teacher's vectors or alone, when the student starts; training then goes on from there."""
    module = FKDDistiller(
        SASRec(8, num_heads=1),
        init_from_teacher=from_teacher,
        cooccurrence=True,
        phase="student",
        logits_precision="fp32",
    )
    module.bind(synthetic.catalogue)
    with pytest.raises(ConfigError, match="training sequences"):
        make_trainer(max_epochs=0, limit_val_batches=0).fit(module, synthetic.train_dataloader())
    assert not module.student_started
    make_trainer(max_epochs=1, limit_train_batches=0, limit_val_batches=0).fit(module, synthetic)
    assert synthetic.catalogue.histories is not None
    expected = cooccurrence_vectors(synthetic.catalogue.histories, synthetic.num_items, 8, 0, length=1.0)
    if from_teacher:
        expected = expected + torch.nn.functional.normalize(module.item_tables()[1], dim=1)
    module.trainer.datamodule = synthetic  # type: ignore[attr-defined]
    module.on_fit_start()
    torch.testing.assert_close(module.ids.weight.detach(), expected)
    assert not module.ids.weight[0].any()


def test_items_without_neighbours_are_parted_by_a_short_random_start(
    synthetic: DomainDataModule, make_trainer: Callable[..., L.Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All zero, they would have the same gradients without COUNTER and tie for ever."""
    vectors = torch.ones(synthetic.num_items + 1, 8)
    vectors[[0, 3, 5]] = 0.0
    monkeypatch.setattr("lightning_sfubm.modules.fkd.cooccurrence_vectors", lambda *args, **kwargs: vectors)
    module = FKDDistiller(SASRec(8, num_heads=1), init_from_teacher=False, cooccurrence=True, phase="student")
    module.bind(synthetic.catalogue)
    drawn = module.ids.weight.detach().clone()
    make_trainer(max_epochs=1, limit_train_batches=0, limit_val_batches=0).fit(module, synthetic)
    module.trainer.datamodule = synthetic  # type: ignore[attr-defined]
    module.on_fit_start()
    table = module.ids.weight.detach()
    torch.testing.assert_close(table[[3, 5]], 0.1 * drawn[[3, 5]])
    assert table[3].any()
    assert not table[0].any()
    assert not torch.equal(table[3], table[5])
    torch.testing.assert_close(table[[1, 2, 4]], vectors[[1, 2, 4]])


@pytest.mark.parametrize("phase", ["teacher", "student", "joint"])
@pytest.mark.parametrize("received", [False, True])
def test_a_strategy_that_waits_for_the_idle_fusion_is_refused(
    catalogue: Catalogue, train_batch: TrainBatch, phase: str, received: bool
) -> None:
    """Refused are the phases in which a parameter asks for a gradient that no term gives it."""
    module = build(catalogue, phase)
    if received:
        module.receive_semantics(module.semantics().flip(0))
    logged_step(module, train_batch)[0].backward()
    idle = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == (
        [] if received or phase == "student" else ["teacher.fusion.gate.weight", "teacher.fusion.gate.bias"]
    )
    module.trainer = L.Trainer(accelerator="cpu", strategy="ddp_find_unused_parameters_true", devices=2, logger=False)
    module.on_fit_start()
    module.trainer = L.Trainer(accelerator="cpu", strategy="ddp", devices=2, logger=False)
    if idle:
        with pytest.raises(
            ConfigError, match=r"fusion gets no gradient .* trainer\.strategy .*ddp_find_unused_parameters_true"
        ):
            module.on_fit_start()
    else:
        module.on_fit_start()


@pytest.mark.parametrize("phase", ["teacher", "joint", "student", "alone"])
def test_an_item_without_text_has_no_overwhelming_gradient(phase: str) -> None:
    """Its vector is zero at the start: normalised, it would take AdamW's steps from what it shares with all others."""
    items, generator, norms = 300, torch_generator(0, "no text"), []
    text = torch.nn.functional.normalize(torch.randn(items + 1, 16, generator=generator), dim=1)
    rows = torch.randint(1, items + 1, (16, 21), generator=generator)
    rows[0, :2] = 3
    batch = TrainBatch(history=rows[:, :-1], targets=rows[:, 1:], user=torch.arange(16))
    for row in (text[3], torch.zeros(16)):
        text[3] = row
        catalogue = Catalogue("t", items, [""] * (items + 1), text.clone(), torch.ones(items + 1))
        if phase == "alone":
            torch.manual_seed(0)
            module = SequentialRecommender(SASRec(8, num_heads=1), features="text", logits="cosine")
            module.bind(catalogue)
            module.log_losses = lambda batch, **terms: None  # type: ignore[method-assign]
        else:
            module = build(catalogue, phase)
            module.log_losses = lambda batch, **terms: None  # type: ignore[method-assign]
            with torch.no_grad():
                module.ids.weight.copy_(module.item_tables()[1])  # as the student starts
        module.training_step(batch, 0).backward()
        norms.append(sum(p.grad.square().sum() for p in module.parameters() if p.grad is not None).sqrt())
    assert norms[1] < 10 * norms[0]


def test_wrong_settings_are_named(catalogue: Catalogue) -> None:
    for kwargs, message in (
        ({"counter": "fact"}, "counter='fact'"),
        ({"w_fact": -1.0}, "w_fact=-1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"own_share": 1.0}, "own_share=1.0"),
        ({"swap_probability": 1.5}, "swap_probability=1.5"),
        ({"phase": "warm-up"}, "phase='warm-up'"),
        ({"text_dropout": 2}, r"FKDDistiller: text_dropout=2 must lie in \[0, 1\)"),
        ({"teacher_encoder": GRU4Rec(4)}, "teacher_encoder has hidden_dim 4, the student's has 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            FKDDistiller(SASRec(8), **kwargs)
    with pytest.raises(ConfigError, match="needs text vectors"):
        FKDDistiller(SASRec(8)).bind(Catalogue("t", 3, ["", "a", "b", "c"], None, torch.ones(4)))


def test_phases_train_log_and_reload(
    synthetic: DomainDataModule, make_trainer: Callable[..., L.Trainer], tmp_path
) -> None:
    """T32 for the whole of stage 1: teacher, then student; both far over chance; everything survives a reload."""
    L.seed_everything(0, verbose=False)
    module = FKDDistiller(SASRec(16, dropout=0.1), num_experts=2, lr=1e-2)
    assert module.local_phases == ("teacher", "student")
    assert module.round_phase == "teacher"
    for phase in module.local_phases:
        module.set_phase(phase)
        trainer = make_trainer(max_epochs=12)
        trainer.fit(module, synthetic)
        assert trainer.callback_metrics["val/hit@1"] > 0.3, phase
    logged = set(trainer.callback_metrics)
    assert {"val/teacher_ndcg@10", "train/ce", "train/fact", "train/counter_non_target", "train/align"} <= logged
    module.receive_semantics(module.semantics().flip(0))

    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)
    again = FKDDistiller.load_from_checkpoint(path, weights_only=True).eval()
    assert again.phase == "student"
    batch = next(iter(synthetic.test_dataloader()))
    torch.testing.assert_close(again.affinities(batch), module.eval().affinities(batch), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="is of FKDDistiller, not of SequentialRecommender"):
        SequentialRecommender(SASRec(16)).on_load_checkpoint(torch.load(path, weights_only=True))
