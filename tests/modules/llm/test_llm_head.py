import json
import subprocess
import sys
import warnings
from dataclasses import replace

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_sfubm.contracts import TrainHistories
from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.evaluation.parsing import TitleParser
from lightning_sfubm.modules.layers.affinity import standardise
from lightning_sfubm.modules.layers.count_affinity import COUNT_AFFINITIES
from lightning_sfubm.modules.llm import ranking
from lightning_sfubm.modules.llm.calibration import fit_factor
from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from lightning_sfubm.modules.llm.tree import separate_states
from lightning_sfubm.modules.llm_head import LLMHead


def make(llm, stage1, catalogue, **options):
    head = LLMHead(llm, **{"template": "movies", "history_length": 4, "title_tokens": 8, "precision": "32", **options})
    head.attach_stage1(stage1, catalogue)
    return head


def train(head, batches, **options):
    settings = {"accelerator": "cpu", "max_steps": 4, "logger": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(**{**settings, **options})
    trainer.fit(head, torch.utils.data.DataLoader(batches, batch_size=None))
    return trainer


FORMS = [
    ("branch", "head"),
    ("branch", "score"),
    ("list", "score"),
    ("list", "constrained"),
]


def test_untrained_head_ranks_as_stage1(llm, stage1, catalogue, make_batch):
    head, batch = make(llm, stage1, catalogue), make_batch()
    affinity = stage1.affinities(batch)[..., 0]
    assert torch.equal(head.rank(batch).argsort(1), affinity.argsort(1))
    head.init_residual(torch.tensor([-2.0, 5.0]))
    assert torch.equal(head.rank(batch).argsort(1), (-affinity).argsort(1))
    torch.testing.assert_close(head.rank(batch).std(1, correction=0), torch.full((3,), 2.0))


def test_a_backbone_loaded_late_drops_nothing_where_the_head_does_not(llm, catalogue, make_batch):
    head = LLMHead(llm, template="movies", precision="32", adapter_dropout=0.5).eval()
    head.attach_stage1(None, catalogue)
    assert not any(module.training for module in head.modules())
    batch = make_batch()
    prompts = head.prompts.build(batch["history"], batch["candidates"])
    first, second = (
        head.lm.states(head.lm.embed(prompts.tokens), prompts.branch >= 0, prompts.positions) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_count_affinities_join_the_residual(llm, stage1, catalogue, make_batch, tmp_path):
    """Columns of the domain's counts beside those of stage 1; a checkpoint asks for them again."""
    histories = TrainHistories(np.arange(1, 31), np.array([0]), np.array([30]))
    shop = replace(catalogue, histories=histories, train_counts=torch.arange(31))
    head = make(llm, stage1, shop, count_affinities=True)
    assert head.residual_weights.shape == (2 + len(COUNT_AFFINITIES),)
    batch = make_batch()
    assert torch.equal(head.rank(batch).argsort(1), stage1.affinities(batch)[..., 0].argsort(1))
    head.init_residual(torch.tensor([0.0] * 6 + [1.0]))  # popularity alone: the item's own number here
    assert torch.equal(head.rank(batch).argsort(1), batch["candidates"].argsort(1))
    train(head, [batch]).save_checkpoint(tmp_path / "head.ckpt", weights_only=True)
    again = LLMHead.load_from_checkpoint(tmp_path / "head.ckpt", weights_only=True)
    again.attach_stage1(stage1, shop)
    torch.testing.assert_close(again.rank(batch), head.rank(batch))
    with pytest.raises(ConfigError, match=r"training sequences.*'tiny'"):
        make(llm, stage1, catalogue, count_affinities=True)


@pytest.mark.parametrize("mode", ["constrained", "generate"])
def test_an_answer_may_have_words_before_its_title(llm, stage1, catalogue, make_batch, tmp_path, mode):
    """The longest answer is that of the template, whose words count too."""
    template = tmp_path / "wordy.yaml"
    words = "{noun: film, nouns: films, verb: watch, past: watched, service: a film service}"
    template.write_text(
        json.dumps({**yaml.safe_load(words), "list": {"answer": " The right one of these is: {title}"}})
    )
    head = make(llm, stage1, catalogue, form="list", rank_mode=mode, template=str(template))
    assert head.prompts.longest_answer > head.settings.title_tokens + 4
    if mode == "constrained":
        _, choice, valid = head.rank_with_validity(make_batch(rows=4))
        assert valid.all()
        assert (choice < 5).all()
        return
    batch = make_batch(rows=1)
    said = head.prompts.answers(batch["candidates"].numpy())[0][2][:-1]
    with pytest.MonkeyPatch.context() as patched:  # a model that says just this
        patched.setattr("lightning_sfubm.modules.llm.ranking.greedy", lambda *a, **k: [said[: a[3]]])
        _, choice, valid = head.rank_with_validity(batch)
    assert valid.all()
    assert choice.tolist() == [2]


def test_loss_tells_how_many_terms_it_is_the_mean_of(llm, stage1, catalogue, make_batch):
    """T9: ranks weigh their losses by these; titles, and so answers, differ in length."""
    batch = make_batch(rows=4)
    assert make(llm, stage1, catalogue)._loss_and_terms(batch)[1] == 4
    head = make(llm, stage1, catalogue, form="list", title_tokens=24)
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    (first, n), (second, m) = (head._loss_and_terms(part) for part in parts)
    whole, total = head._loss_and_terms(batch)
    assert n != m
    assert n + m == total
    torch.testing.assert_close((first * n + second * m) / total, whole)


def test_products_join_the_residual(llm, stage1, catalogue, make_batch):
    head, batch = make(llm, stage1, catalogue, residual_products=True), make_batch()
    assert head.residual_weights.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    score = standardise(stage1.affinities(batch))[..., 0]
    assert torch.equal(head.rank(batch).argsort(1), score.argsort(1))
    head.init_residual(torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0]))  # the square of the score
    torch.testing.assert_close(head.rank(batch), score.square(), atol=1e-5, rtol=0)
    train(head, [batch])
    assert head.residual_weights[2] != 3.0
    head.calibrate([make_batch(seed=1)])


@pytest.mark.parametrize(("form", "mode"), FORMS)
def test_scores_are_exact_and_independent_of_batch(llm, stage1, catalogue, make_batch, form, mode):
    """T14, T28: batched rows, shorter prefixes and separate forwards give the same scores."""
    head = make(llm, stage1, catalogue, form=form, rank_mode=mode, affinity_token=True)
    if head.head is not None:
        torch.nn.init.normal_(head.head.weight)
    batch = make_batch(rows=4)
    scores, choice, valid = head.rank_with_validity(batch)
    assert valid.all()
    assert torch.equal(scores, head.rank(batch))
    for row in range(4):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        torch.testing.assert_close(head.rank(one)[0], scores[row], atol=1e-4, rtol=0)
    if mode != "constrained":
        assert torch.equal(choice, scores.argmax(1))
        head._tree = False
        torch.testing.assert_close(head.rank(batch), scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("form", "mode"), [*FORMS, ("list", "generate")])
def test_a_rank_without_a_user_has_no_scores(llm, stage1, catalogue, make_batch, monkeypatch, form, mode):
    """Fewer users than ranks: nothing is computed, except where the others wait for the parameters."""
    head = make(llm, stage1, catalogue, form=form, rank_mode=mode, subtract_prior=mode == "score")
    nobody = {name: value[:0] for name, value in make_batch(rows=1).items()}
    passes = []
    monkeypatch.setattr(head.lm, "states", lambda *given, states=head.lm.states: passes.append(1) or states(*given))
    for sharded in (False, True):
        monkeypatch.setattr("lightning_sfubm.modules.llm.ranking.is_sharded", lambda _, sharded=sharded: sharded)
        scores, choice, valid = head.rank_with_validity(nobody)
        assert (scores.shape, choice.shape, valid.shape) == ((0, 5), (0,), (0,))
        assert (scores.dtype, choice.dtype, valid.dtype) == (torch.float32, torch.long, torch.bool)
        assert bool(passes) == (sharded and mode != "constrained")  # one title in all the places: nothing to decide
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    monkeypatch.setattr("lightning_sfubm.modules.llm.ranking.is_sharded", lambda _: False)
    (logged,) = trainer.test(head, torch.utils.data.DataLoader([make_batch(), nobody], batch_size=None), verbose=False)
    (alone,) = trainer.test(head, torch.utils.data.DataLoader([make_batch()], batch_size=None), verbose=False)
    assert logged == alone


@pytest.mark.parametrize(("form", "mode"), [("branch", "head"), ("branch", "score")])
def test_candidate_order_is_irrelevant(llm, stage1, catalogue, make_batch, form, mode):
    """T13."""
    head = make(llm, stage1, catalogue, form=form, rank_mode=mode, affinity_token=True)
    if head.head is not None:
        torch.nn.init.normal_(head.head.weight)
    batch = make_batch()
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = {**batch, "candidates": batch["candidates"][:, order]}
    scores = head.rank(batch)
    torch.testing.assert_close(head.rank(shuffled), scores[:, order], atol=1e-4, rtol=0)
    assert scores.std(1).min() > 1e-3


def test_each_soft_token_matters(llm, stage1, catalogue, make_batch):
    batch = make_batch()

    def scores(**flags):
        off = {"user_token": False, "item_tokens": False, "semantic_token": False, "residual": False}
        head = make(llm, stage1, catalogue, **{**off, **flags})
        torch.nn.init.constant_(head.head.weight, 1.0)
        return head, head.rank(batch)

    _, text_only = scores()
    for flag in ("user_token", "item_tokens", "semantic_token", "affinity_token"):
        head, changed = scores(**{flag: True})
        assert (changed - text_only).abs().max() > 1e-3, flag
        assert [n.split(".")[1] for n, _ in head.named_parameters() if n.startswith("projector.")]


def test_text_only_needs_no_stage1(llm, catalogue, make_batch):
    head = make(llm, None, catalogue)
    assert head.projector is None
    assert head.residual_weights is None
    assert head.rank(make_batch()).abs().max() == 0
    with pytest.raises(ConfigError, match="no residual"):
        head.init_residual(torch.ones(2))


def test_a_short_context_shortens_titles_and_says_so(llm, catalogue, make_batch):
    head = make(llm, None, catalogue)
    batch = make_batch()
    head.lm.config.max_position_embeddings = head.prompts._longest(batch["candidates"].shape[1]) - 3
    before = head.prompts.title_tokens
    with pytest.warns(UserWarning, match="titles are cut to"):
        scores = head.rank(batch)
    assert scores.shape == batch["candidates"].shape
    assert head.prompts.title_tokens < before


def test_prompts_with_and_without_soft_tokens_are_cut_alike(llm, stage1, catalogue, make_batch):
    """The prior of a title is that of the tokens that are scored; a curriculum's two prompts show the same titles."""
    head = make(llm, stage1, catalogue, title_tokens=12)
    batch = make_batch()
    head.lm.config.max_position_embeddings = head.prompts._longest(batch["candidates"].shape[1]) - 1
    assert head.text_prompts._longest(batch["candidates"].shape[1]) < head.lm.config.max_position_embeddings
    with pytest.warns(UserWarning, match="titles are cut to"):
        head.rank(batch)
    assert head.prompts.title_tokens == head.text_prompts.title_tokens < 12


def test_words_of_a_model_cut_short_are_warned_of(llm, tmp_path, catalogue):
    settings = {"num_layers": 1, "precision": "32", "template": "movies"}
    for form, mode in (("list", "constrained"), ("branch", "score")):
        head = LLMHead(llm, form=form, rank_mode=mode, **settings)
        with pytest.warns(
            UserWarning, match=f"rank_mode '{mode}' reads .* num_layers = 1 leaves out 1: set num_layers"
        ):
            head.attach_stage1(None, catalogue)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*leaves out.*")
        LLMHead(llm, **settings).attach_stage1(None, catalogue)
        LLMHead(llm, form="list", **{**settings, "num_layers": 2}).attach_stage1(None, catalogue)


def test_a_model_that_cannot_go_on_from_what_it_has_read_is_not_asked_to_write(tmp_path, catalogue):
    folder = str(write_tiny_llm(tmp_path / "mamba", "mamba"))
    settings = {"precision": "32", "template": "movies", "tuning": "frozen", "form": "list"}
    for mode in ("generate", "constrained"):
        with pytest.raises(
            ConfigError, match=rf"\(mamba\) does not go on .* rank_mode '{mode}': use .* rank_mode score"
        ):
            LLMHead(folder, rank_mode=mode, **settings).attach_stage1(None, catalogue)
    LLMHead(folder, rank_mode="score", **settings).attach_stage1(None, catalogue)


def test_calibration_scales_what_the_llm_adds(llm, stage1, catalogue, make_batch):
    head = make(llm, stage1, catalogue)
    batch = make_batch()
    with torch.no_grad():
        head.head.weight.normal_(std=0.1)
        base = head._affinities(batch) @ head.residual_weights
        added = head.rank(batch) - base
    factor = head.calibrate([batch])
    assert 0 <= factor <= 4
    torch.testing.assert_close(head.rank(batch), base + factor * added, rtol=1e-3, atol=1e-3)
    with pytest.raises(ConfigError, match="only a head with a residual"):
        make(llm, None, catalogue).calibrate([batch])


def test_calibration_finds_the_likeliest_factor_of_what_the_llm_adds(llm, stage1, catalogue, make_batch):
    head, batches = make(llm, stage1, catalogue), [make_batch(rows=8, seed=seed) for seed in range(3)]
    torch.nn.init.normal_(head.head.weight, std=2.0, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base = torch.cat([head._affinities(batch) @ head.residual_weights for batch in batches])
        added = torch.cat([head.rank(batch) for batch in batches]) - base
        target = torch.cat([batch["target_index"] for batch in batches])
        if fit_factor(base, added, target) == 0:
            head.head.weight.neg_()
            added = -added
    expected = fit_factor(base, added, target)
    assert 0 < expected < 4
    assert head.calibrate(batches) == pytest.approx(expected, rel=1e-3)


def test_an_affinity_token_that_says_nothing_leaves_the_items_soft_token(llm, stage1, catalogue, make_batch):
    head, plain = (make(llm, stage1, catalogue, affinity_token=flag) for flag in (True, False))
    torch.nn.init.zeros_(head.projector.affinity_map.weight)
    trained = dict(head.named_parameters())
    with torch.no_grad():
        plain.head.weight.fill_(1.0)
        for name, parameter in plain.named_parameters():
            trained[name].copy_(parameter)
    torch.testing.assert_close(head.rank(make_batch()), plain.rank(make_batch()))


def test_zero_shot_minus_prior(llm, catalogue, make_batch):
    batch = make_batch()
    plain = make(llm, None, catalogue, rank_mode="score").rank(batch)
    head = make(llm, None, catalogue, rank_mode="score", subtract_prior=True)
    difference = plain - head.rank(batch)
    by_item = {}
    for item, value in zip(batch["candidates"].flatten().tolist(), difference.flatten().tolist(), strict=True):
        assert by_item.setdefault(item, value) == pytest.approx(value, abs=1e-4)  # a prior belongs to the item alone
    prompts = head.prompts.build(
        torch.zeros(1, 1, dtype=torch.long),
        torch.zeros(1, 0, dtype=torch.long),
        torch.tensor([[7]]),
        with_history=False,
    )
    title = (prompts.branch[0] == 1).sum()
    with torch.no_grad():
        logits = head.lm.causal_lm(prompts.tokens).logits[0].log_softmax(-1)
    steps = logits[-title - 1 : -1].gather(1, prompts.tokens[0, -title:, None])
    assert head._priors(torch.tensor([[7]])).item() == pytest.approx(steps.mean().item(), abs=1e-4)
    assert head._prior is not None
    head.train()
    assert head._prior is None


def test_generate_is_parsed(llm, catalogue, make_batch, monkeypatch):
    head, batch = make(llm, None, catalogue, form="list", rank_mode="generate"), make_batch()
    titles = [catalogue.titles[item] for item in batch["candidates"][1]]
    said = ["nothing of the kind", f"I say {titles[2].upper()}!", f"{titles[0]} or {titles[1]}"]
    monkeypatch.setattr(type(head.lm.tokenizer), "batch_decode", lambda self, *a, **k: said)
    scores, choice, valid = head.rank_with_validity(batch)
    assert valid.tolist() == [False, True, False]
    assert choice[1] == 2
    assert scores[1].tolist() == [0, 0, 1, 0, 0]
    assert scores[0].abs().sum() == 0
    assert TitleParser(titles).parse(said[1]) == 2


def test_the_cut_title_that_the_prompt_shows_is_a_valid_answer(llm, catalogue, make_batch, monkeypatch):
    whole = [title and f"{title} with a long tail of words, pack of 12" for title in catalogue.titles]
    catalogue = replace(catalogue, titles=whole)
    head, batch = make(llm, None, catalogue, form="list", rank_mode="generate", title_tokens=6), make_batch()
    target = [
        answers[index] for answers, index in zip(head.prompts.answers(batch["candidates"]), (2, 0, 4), strict=True)
    ]
    assert all(len(answer) == 7 for answer in target)  # six tokens of the title and the end
    said = head.lm.tokenizer.batch_decode(target, skip_special_tokens=True)
    completed = [whole[batch["candidates"][row, index]] for row, index in enumerate((2, 0, 4))]
    for answers in (said, completed):
        monkeypatch.setattr(type(head.lm.tokenizer), "batch_decode", lambda self, *a, said=answers, **k: said)
        _, choice, valid = head.rank_with_validity(batch)
        assert valid.tolist() == [True, True, True]
        assert choice.tolist() == [2, 0, 4]
    before = head.prompts.spoken_titles[0]
    head.prompts.fit_context(130, batch["candidates"].shape[1])
    assert head.prompts.title_tokens < 6
    shorter, cut = head.prompts.spoken_titles
    assert all(cut[1:])
    assert shorter != before
    assert all(long.startswith(short) for long, short in zip(before[1:], shorter[1:], strict=True))


def test_every_trainable_parameter_gets_a_gradient_and_no_other(llm, stage1, catalogue, make_batch):
    head = make(llm, stage1, catalogue, affinity_token=True, adapter_dropout=0.0)
    torch.nn.init.normal_(head.head.weight)
    for name, parameter in head.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    head.train()
    head.loss(make_batch()).backward()
    for name, parameter in head.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
        elif name == "residual_weights":
            assert parameter.grad[0] != 0  # the constant affinity has none
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    trained = {name.split(".")[0] for name, p in head.named_parameters() if p.requires_grad}
    assert trained == {"backbone", "projector", "head", "residual_weights"}
    assert any("q_proj.lora_A" in name for name, _ in head.named_parameters())
    assert any("down_proj.lora_B" in name for name, _ in head.named_parameters())


@pytest.mark.parametrize("form", ["branch", "list"])
def test_frozen_llm_trains_projectors_only(llm, stage1, catalogue, make_batch, form):
    head = make(llm, stage1, catalogue, tuning="frozen", form=form)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    train(head, [make_batch(seed=i) for i in range(3)])
    changed = {name.split(".")[0] for name, p in head.named_parameters() if not torch.equal(p, before[name])}
    assert "backbone" not in changed
    assert "projector" in changed
    with pytest.raises(ConfigError, match="no adapters"):
        head.export_adapter("nowhere")


@pytest.mark.parametrize("form", ["branch", "list"])
def test_learns_a_planted_rule(llm, catalogue, make_batch, form):
    """The wanted film is always number 7: after some steps the head takes it."""
    batches = []
    for seed in range(60):
        batch = make_batch(rows=8, seed=seed)
        batch["candidates"][batch["candidates"] == 7] = 8
        batch["candidates"].scatter_(1, batch["target_index"].unsqueeze(1), 7)
        batches.append({**batch, "target": torch.full((8,), 7)})
    head = make(
        llm, None, catalogue, form=form, adapter_learning_rate=1e-2, head_learning_rate=3e-2, adapter_dropout=0.0
    )
    before = (head.rank(batches[-1]).argmax(1) == batches[-1]["target_index"]).float().mean()
    train(head, batches[:-1], max_steps=59, gradient_clip_val=1.0)
    after = (head.rank(batches[-1]).argmax(1) == batches[-1]["target_index"]).float().mean()
    assert after >= 0.9
    assert before < 0.9


def test_list_loss_is_the_answers_own(llm, catalogue, make_batch):
    head, batch = make(llm, None, catalogue, form="list").eval(), make_batch(rows=1)
    prompts = head.prompts.build(batch["history"], batch["candidates"], batch["target"].unsqueeze(1))
    answer = int((prompts.branch == 1).sum())
    with torch.no_grad():
        logits = head.lm.causal_lm(prompts.tokens).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[-answer - 1 : -1], prompts.tokens[0, -answer:])
        torch.testing.assert_close(head.loss(batch), expected, atol=1e-4, rtol=0)
    assert prompts.tokens[0, -1] == head.lm.tokenizer.eos_token_id


def test_curriculum_moves_from_text_to_hybrid(llm, stage1, catalogue, make_batch, monkeypatch):
    head = make(llm, stage1, catalogue, form="list", curriculum=0.5)
    kinds = []
    original = head._embed
    monkeypatch.setattr(
        head, "_embed", lambda p, *rest: (kinds.append(bool((p.tokens < 0).any())), original(p, *rest))[1]
    )
    train(head, [make_batch(rows=1, seed=i) for i in range(20)], max_steps=20)
    assert not kinds[0]
    assert False in kinds[:10]
    assert all(kinds[10:])
    head.eval()
    assert (head._build(make_batch()).tokens < 0).any()


def test_a_curriculum_over_a_training_without_a_known_end_is_refused(llm, stage1, catalogue, make_batch):
    """A share of it is nothing: no prompt would ever have had a soft token."""
    head = make(llm, stage1, catalogue, form="list", curriculum=0.5)
    with pytest.raises(ConfigError, match="their number is unknown"):
        train(head, [make_batch(rows=1)], max_steps=-1, max_epochs=-1, max_time={"seconds": 30})


def test_an_answer_that_does_not_stop_ends_with_the_context(tmp_path, stage1, catalogue, make_batch, monkeypatch):
    head = make(str(write_tiny_llm(tmp_path / "llm", "gpt2")), stage1, catalogue, form="list", rank_mode="generate")
    batch, lengths = make_batch(), []
    width = head._build(batch, branches=batch["target"].new_zeros(len(batch["target"]), 0)).tokens.shape[1]
    monkeypatch.setattr(ranking, "greedy", lambda lm, e, p, length, *rest: (lengths.append(length), [[5]] * len(e))[1])
    for context in (width + 3, width + 400):
        monkeypatch.setattr(head.lm.config, "n_positions", context)
        head.rank_with_validity(batch)
    assert lengths[0] == 3 < lengths[1]


@pytest.mark.parametrize(
    ("strategy", "words"),
    [("ddp", "ddp_find_unused_parameters_true"), ("ddp_find_unused_parameters_true", "number is unknown")],
)
def test_a_curriculum_is_refused_where_ddp_looks_for_no_unused_parameters(llm, stage1, catalogue, strategy, words):
    head = make(llm, stage1, catalogue, curriculum=0.5)
    head.trainer = L.Trainer(accelerator="cpu", strategy=strategy, devices=2, max_epochs=-1, logger=False)
    with pytest.raises(ConfigError, match=words):
        head.on_fit_start()


# ---------------------------------------------------------------------------------------------------- checkpoints


RELOAD = """
import sys, torch
from lightning_sfubm.contracts import Catalogue
from lightning_sfubm.modules.llm_head import LLMHead
folder = sys.argv[1]
given = torch.load(folder + "/given.pt", weights_only=True)
head = LLMHead.load_from_checkpoint(folder + "/head.ckpt", weights_only=True)
head.attach_stage1(None, Catalogue(**given["catalogue"]))
torch.save(head.rank(given["batch"]), folder + "/scores.pt")
"""


def test_fresh_process_gives_the_live_models_scores(llm, catalogue, make_batch, tmp_path):
    """T8: adapters are really in the file, and the base is not."""
    batch = make_batch()
    head = make(llm, None, catalogue, adapter_learning_rate=1e-2, head_learning_rate=1e-1)
    trainer = train(head, [make_batch(seed=i) for i in range(4)])
    trainer.save_checkpoint(tmp_path / "head.ckpt")
    live = head.rank(batch)
    torch.save({"catalogue": vars(catalogue), "batch": batch}, tmp_path / "given.pt")
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path)], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "scores.pt"), live, atol=1e-5, rtol=0)

    head.lm.model.merge_adapter()
    torch.testing.assert_close(head.rank(batch), live, atol=1e-4, rtol=0)
    head.lm.model.unmerge_adapter()
    with head.lm.model.disable_adapter():
        assert (head.rank(batch) - live).abs().max() > 1e-3

    stored = torch.load(tmp_path / "head.ckpt", weights_only=True)["state_dict"]
    trainable = {name for name, p in head.named_parameters() if p.requires_grad}
    assert stored.keys() == trainable
    assert not any("base_layer" in name or "embed_tokens" in name for name in stored)


def test_exported_adapter_is_a_peft_folder(llm, catalogue, make_batch, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    head = make(llm, None, catalogue, form="list", adapter_learning_rate=1e-2)
    train(head, [make_batch(seed=i) for i in range(4)])
    head.eval()
    head.export_adapter(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(llm)
    tokens = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        without = base(tokens).logits
        peft = PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(peft(tokens).logits, head.lm.model(tokens).logits, atol=1e-5, rtol=0)
        assert (without - peft(tokens).logits).abs().max() > 1e-3


def test_hybrid_checkpoint_round_trip(llm, stage1, catalogue, make_batch, tmp_path):
    head = make(llm, stage1, catalogue, affinity_token=True)
    train(head, [make_batch(seed=i) for i in range(4)]).save_checkpoint(tmp_path / "head.ckpt")
    again = LLMHead.load_from_checkpoint(tmp_path / "head.ckpt", weights_only=True)
    again.attach_stage1(stage1, catalogue)
    torch.testing.assert_close(again.rank(make_batch()), head.rank(make_batch()), atol=1e-5, rtol=0)
    wrong = LLMHead.load_from_checkpoint(tmp_path / "head.ckpt", weights_only=True)
    with pytest.raises(CheckpointError, match="trained on a stage 1"):
        wrong.attach_stage1(None, catalogue)


def test_training_resumes_from_a_checkpoint(llm, stage1, catalogue, make_batch, tmp_path):
    batches = [make_batch(seed=i) for i in range(2)]

    def run(epochs, ckpt=None):
        head = make(llm, stage1, catalogue, adapter_dropout=0.0, warmup=0.0)
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False,
        )  # fmt: skip
        head.configure_optimizers = lambda: torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], 1e-3)
        trainer.fit(head, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=ckpt)
        return head, trainer

    straight, _ = run(2)
    _, trainer = run(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, _ = run(2, tmp_path / "one.ckpt")
    for (name, a), (_, b) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_checkpoint_of_another_model_is_refused(llm, catalogue, make_batch, tmp_path):
    head = make(llm, None, catalogue)
    train(head, [make_batch()], max_steps=1).save_checkpoint(tmp_path / "head.ckpt")
    other = str(write_tiny_llm(tmp_path / "other", seed=1))
    with pytest.raises(CheckpointError, match="another base model"):
        LLMHead.load_from_checkpoint(tmp_path / "head.ckpt", llm=other, weights_only=True)
    merged = AutoModelForCausalLM.from_pretrained(llm)  # the same embeddings
    with torch.no_grad():
        merged.model.layers[0].self_attn.q_proj.weight += 0.1
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(llm).save_pretrained(tmp_path / "merged")
    with pytest.raises(CheckpointError, match="another base model"):
        LLMHead.load_from_checkpoint(tmp_path / "head.ckpt", llm=str(tmp_path / "merged"), weights_only=True)
    earlier = torch.load(tmp_path / "head.ckpt", weights_only=True)
    del earlier["sfubm_llm"]["weights"]  # as versions before wrote it
    torch.save(earlier, tmp_path / "earlier.ckpt")
    LLMHead.load_from_checkpoint(tmp_path / "earlier.ckpt", weights_only=True)
    with pytest.raises(CheckpointError, match="has shape"):
        LLMHead.load_from_checkpoint(tmp_path / "head.ckpt", adapter_rank=4, weights_only=True)
    with pytest.raises(CheckpointError, match="holds the unknown"):
        LLMHead.load_from_checkpoint(tmp_path / "head.ckpt", tuning="frozen", weights_only=True)
    content = torch.load(tmp_path / "head.ckpt", weights_only=True)
    content["state_dict"].pop("head.weight")
    torch.save(content, tmp_path / "torn.ckpt")
    with pytest.raises(CheckpointError, match=r"lacks parameter 'head\.weight'"):
        LLMHead.load_from_checkpoint(tmp_path / "torn.ckpt", weights_only=True)
    content.pop("sfubm_llm")
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint of an LLM head"):
        LLMHead.load_from_checkpoint(tmp_path / "foreign.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tuning": "full"}, "tuning 'full'"),
        ({"form": "tree"}, "prompt form 'tree'"),
        ({"rank_mode": "generate"}, "rank_mode 'generate' is not one of"),
        ({"form": "list", "rank_mode": "head"}, "rank_mode 'head' is not one of"),
        ({"subtract_prior": True}, "subtract_prior is of title likelihoods, which rank_mode 'head' has none of"),
        ({"adapter_rank": 0}, "adapter_rank must be at least 1"),
        ({"curriculum": 2.0}, "curriculum"),
        ({"template": "absent"}, "no prompt template"),
    ],
)
def test_bad_settings(llm, options, message):
    with pytest.raises(ConfigError, match=message):
        LLMHead(llm, **options)


def test_without_catalogue(llm, make_batch):
    with pytest.raises(ConfigError, match="no catalogue yet"):
        LLMHead(llm).rank(make_batch())
    with pytest.raises(ConfigError, match="datamodule with a catalogue"):
        train(LLMHead(llm), [make_batch()])


def test_validation_logs_metrics(llm, stage1, catalogue, make_batch):
    head = make(llm, stage1, catalogue)
    batch = make_batch(rows=8)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    (result,) = trainer.validate(head, torch.utils.data.DataLoader([batch], batch_size=None), verbose=False)
    expected = (stage1.affinities(batch)[..., 0].argmax(1) == batch["target_index"]).float().mean()
    assert result["val/hit@1"] == pytest.approx(expected.item())


@pytest.mark.models
def test_smollm2_shared_prefix_equals_separate_rows(catalogue, make_batch):
    head = make("smollm2-135m", None, catalogue, num_layers=4)
    prompts = head._build(make_batch(rows=1, candidates=3))
    head.eval()
    with torch.no_grad():
        embeddings = head.lm.embed(prompts.tokens)
        shared, plain = head._states(prompts, embeddings), separate_states(head.lm, embeddings, prompts)
    torch.testing.assert_close(shared, plain, atol=1e-3, rtol=1e-4)


def test_predicting_without_candidates_is_refused_in_a_sentence(llm, stage1, catalogue, make_batch):
    head = make(llm, stage1, catalogue)
    without = {key: value for key, value in make_batch().items() if not key.startswith("candidates")}
    with pytest.raises(ConfigError, match="an LLM predicts among candidates, which these data do not give"):
        head.predict_step(without, 0)


def test_training_without_candidates_is_refused_in_a_sentence(llm, catalogue, make_batch):
    sequences = {key: make_batch()[key] for key in ("history", "user")}
    with pytest.raises(ConfigError, match=r"an LLM is tuned among candidates, .* use .*RankingDataModule"):
        train(make(llm, None, catalogue), [{**sequences, "targets": sequences["history"]}])


def test_judgements_of_single_titles_are_refused_in_a_sentence(llm, catalogue, make_batch):
    judged = {key: make_batch()[key] for key in ("history", "user", "candidates")}
    judged["labels"] = torch.zeros_like(judged["candidates"])
    head = make(llm, None, catalogue)
    with pytest.raises(ConfigError, match=r"an LLM is tuned among candidates, .* use .*RankingDataModule"):
        train(head, [judged])
    for step in (head.validation_step, head.test_step):
        with pytest.raises(ConfigError, match="an LLM is evaluated among candidates, which these data do not give"):
            step(judged, 0)
