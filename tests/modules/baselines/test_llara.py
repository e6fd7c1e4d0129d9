import pytest
import torch

from lightning_sfubm.datamodules.prompt_batch import CANDIDATE, ITEM, USER
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.baselines.llara import LLaRA
from lightning_sfubm.modules.llm_head import LLMHead
from lightning_sfubm.seeds import torch_generator

SMALL = {"template": "movies", "history_length": 4, "title_tokens": 8, "precision": "32"}


def make(llm, recommender, films, **options):
    head = LLaRA(llm, **{**SMALL, **options})
    head.attach_stage1(recommender, films)
    return head


def hit(head, batch):
    return (head.rank(batch).argmax(1) == batch["target_index"]).float().mean()


@pytest.fixture
def hints(recommender):
    """What is planted: one coordinate of the ID embeddings, of which titles say nothing, announces the film wanted."""
    hints = torch.randperm(31, generator=torch_generator(0, "hints")) % 2 > 0
    with torch.no_grad():
        recommender.items.ids.weight[1:, 0] = torch.where(hints[1:], 3.0, -3.0)
    return hints


@pytest.mark.slow
def test_learns_what_only_id_embeddings_tell(tiny_llm, films, recommender, hints, hinted_batch, tune):
    """T32: from text-only prompts to hybrid ones; with the planted coordinate mirrored, the wrong film is chosen."""
    rates = {"adapter_learning_rate": 1e-2, "projector_learning_rate": 1e-2, "adapter_dropout": 0.0}
    head = make(tiny_llm, recommender, films, curriculum=0.3, **rates)
    test = hinted_batch(hints, rows=64, seed=999)
    head.rank_mode = "score"
    assert hit(head, test) < 0.5
    tune(head, [hinted_batch(hints, seed=seed) for seed in range(150)])
    assert hit(head, test) >= 0.9
    for mode in ("generate", "constrained"):
        head.rank_mode = mode
        _, choice, valid = head.rank_with_validity(test)
        assert valid.float().mean() >= 0.95
        assert (choice == test["target_index"])[valid].float().mean() >= 0.9
    head.id_table[:, 0] *= -1
    assert hit(head, test) <= 0.1


def test_every_title_is_followed_by_its_projected_static_embedding(tiny_llm, films, recommender, film_batch):
    head, batch = make(tiny_llm, recommender, films).eval(), film_batch()
    prompts = head._build(batch)
    assert (prompts.tokens == USER).sum() == 0
    assert (prompts.tokens == ITEM).sum() == (batch["history"][:, -4:] > 0).sum()
    assert (prompts.tokens == CANDIDATE).sum() == 15
    assert prompts.tokens[(prompts.tokens < 0).roll(-1, 1)].ge(0).all()  # a word stands before each
    places = prompts.tokens < 0
    with torch.no_grad():
        vectors = head._embed(prompts, batch, None)[places]
        table = recommender.items.ids.weight[prompts.items[places]]
        expected = torch.nn.functional.normalize(head.projector.item_map(table), dim=-1) * head.lm.token_norm
    torch.testing.assert_close(vectors, expected)


def test_trains_adapters_and_the_item_projector_only(tiny_llm, films, recommender, film_batch, tune):
    head = make(tiny_llm, recommender, films, curriculum=0.0)
    before = {name: value.clone() for name, value in recommender.state_dict().items()}
    trained = {name for name, parameter in head.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"backbone", "projector"}
    assert {name.split(".")[1] for name in trained if name.startswith("projector")} == {"item_map"}
    layers = {name.split(".")[-4] for name in trained if name.startswith("backbone")}
    assert layers == {f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")}
    assert all("lora_" in name for name in trained if name.startswith("backbone"))
    values = {name: parameter.detach().clone() for name, parameter in head.named_parameters()}
    tune(head, [film_batch(seed=seed) for seed in range(3)])
    moved = {name for name, parameter in head.named_parameters() if not torch.equal(parameter, values[name])}
    assert moved == trained
    assert all(torch.equal(value, before[name]) for name, value in recommender.state_dict().items())


def test_curriculum_covers_the_whole_training_by_default(tiny_llm, films, recommender, film_batch, tune, monkeypatch):
    """The published schedule: the chance of a hybrid batch is the share of the steps done; the projector waits."""
    head = make(tiny_llm, recommender, films)
    assert head.settings.curriculum == 1.0
    start = [parameter.detach().clone() for parameter in head.projector.parameters()]
    hybrid, untouched, embed = [], [], head._embed

    def watched(prompts, *rest):
        now = list(head.projector.parameters())
        untouched.append(all(torch.equal(a, b) for a, b in zip(start, now, strict=True)))
        hybrid.append(bool((prompts.tokens < 0).any()))
        return embed(prompts, *rest)

    monkeypatch.setattr(head, "_embed", watched)
    tune(head, [film_batch(rows=1, seed=seed) for seed in range(60)])
    assert not hybrid[0]
    assert sum(hybrid[:20]) < 10 < sum(hybrid[40:])
    assert all(untouched[: hybrid.index(True) + 1])
    assert not untouched[-1]
    head.eval()
    assert (head._build(film_batch()).tokens < 0).any()


def test_loss_is_on_the_answer_only(tiny_llm, films, recommender, film_batch):
    head, batch = make(tiny_llm, recommender, films).eval(), film_batch(rows=1)
    prompts = head._build(batch, branches=batch["target"].unsqueeze(1))
    answer = int((prompts.branch == 1).sum())
    with torch.no_grad():
        logits = head.lm.causal_lm(inputs_embeds=head._embed(prompts, batch, None)).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[-answer - 1 : -1], prompts.tokens[0, -answer:])
        torch.testing.assert_close(head.loss(batch), expected, atol=1e-4, rtol=0)
    assert prompts.tokens[0, -1] == head.lm.tokenizer.eos_token_id


def test_reloaded_in_a_fresh_object_and_other_than_the_base(tiny_llm, films, recommender, film_batch, tune, tmp_path):
    head = make(tiny_llm, recommender, films, rank_mode="score", adapter_learning_rate=1e-2, curriculum=0.0)
    tune(head, [film_batch(seed=seed) for seed in range(6)]).save_checkpoint(tmp_path / "head.ckpt")
    batch = film_batch()
    live = head.rank(batch)
    again = LLaRA.load_from_checkpoint(tmp_path / "head.ckpt", weights_only=True)
    again.attach_stage1(recommender, films)
    torch.testing.assert_close(again.rank(batch), live)
    stored = torch.load(tmp_path / "head.ckpt", weights_only=True)["state_dict"]
    assert stored.keys() == {name for name, parameter in head.named_parameters() if parameter.requires_grad}
    with head.lm.model.disable_adapter():
        assert (head.rank(batch) - live).abs().max() > 1e-3


def test_from_head_and_without_a_recommender(tiny_llm, films):
    template = LLMHead(tiny_llm, num_layers=1, adapter_targets=".*q_proj", user_token=True, **SMALL)
    head = LLaRA.from_head(template.hparams, rank_mode="constrained", curriculum=0.5)
    settings = vars(head.settings)
    assert (settings["llm"], settings["history_length"], settings["num_layers"]) == (tiny_llm, 4, None)
    assert (settings["form"], settings["rank_mode"], settings["curriculum"]) == ("list", "constrained", 0.5)
    assert (settings["adapter_rank"], settings["adapter_alpha"], settings["adapter_targets"]) == (8, 32, "all-linear")
    assert not any(settings[name] for name in ("user_token", "semantic_token", "affinity_token", "residual"))
    with pytest.raises(ConfigError, match="LLaRA reads a trained recommender"):
        head.attach_stage1(None, films)
