import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lightning_sfubm.contracts import Catalogue, CatalogueRanker
from lightning_sfubm.datamodules.prompt_batch import CANDIDATE, ITEM, USER
from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.modules.baselines.a_llmrec import ALLMRec
from lightning_sfubm.modules.baselines.a_llmrec_alignment import ALLMRecAlignment
from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.llm_head import LLMHead
from lightning_sfubm.modules.sequential import SequentialRecommender
from lightning_sfubm.seeds import torch_generator

SMALL = {"template": "movies", "history_length": 4, "title_tokens": 8, "precision": "32"}


def aligned(recommender, catalogue, **options):
    module = ALLMRecAlignment(**{"latent_dim": 12, **options})
    module.attach_recommender(recommender, catalogue)
    return module


def make(llm, alignment, films, **options):
    head = ALLMRec(llm, **{**SMALL, **options})
    head.attach_stage1(alignment, films)
    return head


def hit(ranker, batch):
    return (ranker.rank(batch).argmax(1) == batch["target_index"]).float().mean().item()


@pytest.fixture
def train_batch():
    rows = torch.randint(1, 31, (6, 9), generator=torch_generator(0, "train batch"))
    history = rows[:, :-1].masked_fill(torch.arange(8) < torch.tensor([[0], [1], [3], [5], [6], [7]]), 0)
    targets = torch.where(history > 0, rows[:, 1:], 0)
    targets[0, -1] = 0
    return {"history": history, "targets": targets, "user": torch.arange(6)}


# ---------------------------------------------------------------------------------------------------- stage 1


@pytest.fixture(scope="module")
def domain_recommender(synthetic):
    """A SASRec trained on the planted chain of topics, some epochs."""
    torch.manual_seed(0)
    module = SequentialRecommender(SASRec(hidden_dim=32, num_layers=1, num_heads=2, max_length=20), lr=1e-2)
    module.bind(synthetic.catalogue)
    L.Trainer(
        accelerator="cpu",
        max_epochs=12,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    ).fit(module, datamodule=synthetic)
    return module.eval()


def test_alignment_learns_a_shared_space_that_still_recommends(synthetic, domain_recommender, make_trainer):
    """T32: reconstructed items rank nearly as the recommender does, and items read from their *text* far over chance."""
    module = aligned(domain_recommender, synthetic.catalogue, latent_dim=64, lr=1e-2)
    before = {name: value.clone() for name, value in domain_recommender.state_dict().items()}
    test = next(iter(synthetic.rank_dataloader("test", 300)))
    assert hit(module, test) < 0.15  # chance is .05
    trainer = make_trainer(max_epochs=20, limit_val_batches=1)
    trainer.fit(module.train(), datamodule=synthetic)
    module.eval()
    assert hit(module, test) >= 0.8 * hit(domain_recommender, test) >= 0.2
    assert {"val/ndcg@10", "val/hit@1"} <= trainer.callback_metrics.keys()
    with torch.no_grad():
        from_text = module.item_autoencoder.decode(module.text_autoencoder.encode(module.text))
        states = domain_recommender.user_states(test)
        scores = (from_text[test["candidates"]] @ states.unsqueeze(-1)).squeeze(-1)
    assert (scores.argmax(1) == test["target_index"]).float().mean() >= 0.2
    assert all(torch.equal(value, before[name]) for name, value in domain_recommender.state_dict().items())


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.2), (2.0, 0.0)])
def test_four_losses_and_their_weights(recommender, films, train_batch, monkeypatch, alpha, beta):
    """The loss and each of its terms by a loop over positions, items taken and drawn."""
    assert (ALLMRecAlignment().alpha, ALLMRecAlignment().beta) == (0.5, 0.2)  # the published weights
    module = aligned(recommender, films, alpha=alpha, beta=beta)
    logged = {}
    monkeypatch.setattr(module, "log_losses", lambda batch, **terms: logged.update(terms))
    negatives = torch.randint(1, 31, (int((train_batch["targets"] > 0).sum()),), generator=torch_generator(0, "drawn"))
    monkeypatch.setattr(
        "lightning_sfubm.modules.baselines.a_llmrec_alignment.other_items", lambda targets, n, g: negatives
    )
    total = module.training_step(train_batch, 0)

    ids, sums = recommender.items.ids.weight, dict.fromkeys(("matching", "item", "text", "recommendation"), 0.0)
    states = recommender.encoder(ids[train_batch["history"]], train_batch["history"] > 0)
    number = 0
    for row in range(6):
        for place in range(8):
            if not train_batch["targets"][row, place]:
                continue
            for item, sign in ((train_batch["targets"][row, place], 1), (negatives[number], -1)):
                text = films.text_embeddings[item] * 12**0.5
                a, b = module.item_autoencoder, module.text_autoencoder
                latent, text_latent = a.encode(ids[item]), b.encode(text)
                sums["matching"] += F.mse_loss(latent, text_latent).item()
                sums["item"] += F.mse_loss(a.decode(latent), ids[item]).item()
                sums["text"] += F.mse_loss(b.decode(text_latent), text).item()
                sums["recommendation"] -= F.logsigmoid(sign * (states[row, place] * a.decode(latent)).mean()).item()
            number += 1
    means = {name: value / number for name, value in sums.items()}
    expected = means["matching"] + alpha * means["item"] + beta * means["text"] + means["recommendation"]
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert logged["matching"].item() == pytest.approx(means["matching"], rel=1e-5)
    assert logged["item_reconstruction"].item() == pytest.approx(means["item"], rel=1e-5)
    assert logged["text_reconstruction"].item() == pytest.approx(means["text"], rel=1e-5)
    assert logged["recommendation"].item() == pytest.approx(means["recommendation"], rel=1e-5)


def test_only_the_autoencoders_are_trained_and_stored(recommender, films, train_batch, tune, tmp_path):
    module = aligned(recommender, films)
    names = {f"{kind}_autoencoder.{part}" for kind in ("item", "text") for part in ("encoder", "decoder")}
    assert {name.rsplit(".", 1)[0] for name, _ in module.named_parameters()} == names
    before = recommender.state_dict()["items.ids.weight"].clone()
    tune(module, [train_batch] * 3).save_checkpoint(tmp_path / "alignment.ckpt")
    stored = torch.load(tmp_path / "alignment.ckpt", weights_only=True)["state_dict"]
    assert {name.rsplit(".", 1)[0] for name in stored} == names
    assert torch.equal(recommender.items.ids.weight, before)
    assert not recommender.training
    assert all(parameter.grad is None for parameter in recommender.parameters())


@pytest.mark.parametrize("latent_dim", [4, 12])
def test_stage1_contract(recommender, films, film_batch, latent_dim):
    """Widths differ between recommender (8) and latents: the narrower ones are padded with zeros."""
    module, batch = aligned(recommender, films, latent_dim=latent_dim).eval(), film_batch()
    assert isinstance(module, CatalogueRanker)
    width = max(8, latent_dim)
    assert module.hidden_dim == width
    with torch.no_grad():
        states, (ids, semantics) = module.user_states(batch), module.item_tables()
        assert states.shape == (3, width)
        torch.testing.assert_close(states[:, :8], recommender.user_states(batch))
        assert states[:, 8:].abs().sum() == 0
        for table in (ids, semantics):
            assert table.shape == (31, width)
            assert table[0].abs().sum() == 0
            assert table[:, latent_dim:].abs().sum() == 0
        items = module.item_autoencoder.encode(recommender.items.ids.weight[1:])
        torch.testing.assert_close(ids[1:, :latent_dim] * items.std(0, correction=0) + items.mean(0), items)
        texts = module.text_autoencoder.encode(films.text_embeddings[1:] * 12**0.5)
        torch.testing.assert_close(semantics[1:, :latent_dim] * items.std(0, correction=0) + items.mean(0), texts)
        assert module.affinities(batch).shape == (3, 5, 1)
        torch.testing.assert_close(module.affinities(batch)[..., 0], module.rank(batch))


@pytest.mark.parametrize(
    "options", [{"encoder": GRU4Rec(8)}, {"logits": "cosine"}, {"features": "id+text"}], ids=["gru", "cosine", "text"]
)
def test_any_sequential_recommender_will_do(films, film_batch, train_batch, options):
    model = SequentialRecommender(**{"encoder": SASRec(8, num_layers=1, num_heads=1), **options})
    model.bind(films)
    module = aligned(model.eval(), films)
    module.training_step(train_batch, 0).backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
    with torch.no_grad():  # with a perfect reconstruction the scores are the recommender's own
        module.item_autoencoder.encode = module.item_autoencoder.decode = lambda vectors: vectors
        torch.testing.assert_close(module.rank(film_batch()), model.rank(film_batch()))


def test_alignment_reloaded_in_a_fresh_object(recommender, films, film_batch, train_batch, tune, tmp_path):
    module = aligned(recommender, films)
    untrained = aligned(recommender, films)
    tune(module, [train_batch] * 3).save_checkpoint(tmp_path / "alignment.ckpt")
    again = ALLMRecAlignment.load_from_checkpoint(tmp_path / "alignment.ckpt", weights_only=True)
    again.attach_recommender(recommender, films)
    for own, loaded, fresh in zip(module.item_tables(), again.item_tables(), untrained.item_tables(), strict=True):
        assert torch.equal(own, loaded)
        assert (own - fresh).abs().max() > 1e-4
    assert torch.equal(module.rank(film_batch()), again.rank(film_batch()))
    wide = SequentialRecommender(SASRec(hidden_dim=16, num_layers=1, num_heads=1))
    wide.bind(films)
    with pytest.raises(CheckpointError, match="recommender of width 8, got 16"):
        ALLMRecAlignment.load_from_checkpoint(tmp_path / "alignment.ckpt", weights_only=True).attach_recommender(
            wide, films
        )


def test_alignment_refuses_what_it_cannot_use(recommender, films, train_batch, tune):
    with pytest.raises(ConfigError, match="alpha=-1"):
        ALLMRecAlignment(alpha=-1)
    without_text = Catalogue("films", 30, films.titles, None, films.train_counts)
    plain = SequentialRecommender(SASRec(8, num_heads=1))
    plain.bind(without_text)
    with pytest.raises(ConfigError, match="no text encoder"):
        aligned(plain, without_text)
    with pytest.raises(ConfigError, match="has 0 items"):
        aligned(SequentialRecommender(SASRec(8, num_heads=1)), films)
    with pytest.raises(ConfigError, match="no recommender"):
        ALLMRecAlignment().bind(films)


# ---------------------------------------------------------------------------------------------------- stage 2


@pytest.fixture
def alignment(recommender, films):
    return aligned(recommender, films).eval()


@pytest.mark.slow
def test_frozen_llm_learns_what_the_soft_tokens_tell(tiny_llm, films, alignment, hinted_batch, tune):
    """T32: the newest item's embedding, not its title, announces the film wanted; the projectors alone pass it on."""
    hints = torch.randperm(31, generator=torch_generator(0, "hints")) % 2 > 0
    model = alignment.recommender
    with torch.no_grad():
        model.items.ids.weight[1:, 0] = torch.where(hints[1:], 3.0, -3.0)
    head = make(tiny_llm, alignment, films, rank_mode="score", projector_learning_rate=2e-2)
    test = hinted_batch(hints, rows=64, seed=999)
    assert hit(head, test) < 0.5
    tune(head, [hinted_batch(hints, seed=seed) for seed in range(200)])
    assert hit(head, test) >= 0.9
    head.rank_mode = "constrained"
    assert hit(head, test) >= 0.8  # chance is .2
    with torch.no_grad():
        model.items.ids.weight[1:, 0] *= -1
    head.attach_stage1(alignment, films)
    head.rank_mode = "score"
    assert hit(head, test) <= 0.2


@pytest.mark.parametrize(("latents", "part"), [("items", "item_map"), ("texts", "semantic_map")])
def test_trains_projectors_only(tiny_llm, films, alignment, film_batch, tune, latents, part):
    head = make(tiny_llm, alignment, films, latents=latents)
    trained = {name for name, parameter in head.named_parameters() if parameter.requires_grad}
    assert {".".join(name.split(".")[:2]) for name in trained} == {"projector.user_map", f"projector.{part}"}
    assert not any("lora" in name for name, _ in head.named_parameters())
    values = {name: p.detach().clone() for name, p in [*head.named_parameters(), *alignment.named_parameters()]}
    tune(head, [film_batch(seed=seed) for seed in range(3)])
    after = dict([*head.named_parameters(), *alignment.named_parameters()])
    assert {name for name in values if not torch.equal(values[name], after[name])} == trained


def test_prompt_holds_the_user_and_every_item(tiny_llm, films, alignment, film_batch):
    head, batch = make(tiny_llm, alignment, films).eval(), film_batch()
    prompts = head._build(batch)
    assert (prompts.tokens == USER).sum(1).tolist() == [1, 1, 1]
    assert (prompts.tokens == ITEM).sum() == (batch["history"][:, -4:] > 0).sum()
    assert (prompts.tokens == CANDIDATE).sum() == 15


def test_loss_is_on_the_answer_only(tiny_llm, films, alignment, film_batch):
    head, batch = make(tiny_llm, alignment, films).eval(), film_batch(rows=1)
    prompts = head._build(batch, branches=batch["target"].unsqueeze(1))
    answer = int((prompts.branch == 1).sum())
    with torch.no_grad():
        logits = head.lm.causal_lm(inputs_embeds=head._embed(prompts, batch, None)).logits[0]
        expected = F.cross_entropy(logits[-answer - 1 : -1], prompts.tokens[0, -answer:])
        torch.testing.assert_close(head.loss(batch), expected, atol=1e-4, rtol=0)


def test_reloaded_in_a_fresh_object_and_other_than_untrained(tiny_llm, films, alignment, film_batch, tune, tmp_path):
    head = make(tiny_llm, alignment, films, rank_mode="score", latents="texts")
    batch = film_batch()
    untrained = head.rank(batch)
    tune(head, [film_batch(seed=seed) for seed in range(6)]).save_checkpoint(tmp_path / "head.ckpt")
    live = head.rank(batch)
    assert (live - untrained).abs().max() > 1e-3
    again = ALLMRec.load_from_checkpoint(tmp_path / "head.ckpt", weights_only=True)
    again.attach_stage1(alignment, films)
    torch.testing.assert_close(again.rank(batch), live)


def test_from_head_and_bad_settings(tiny_llm, films):
    template = LLMHead(tiny_llm, num_layers=1, tuning="lora", projector_learning_rate=3e-3, **SMALL)
    head = ALLMRec.from_head(template.hparams, rank_mode="score")
    settings = vars(head.settings)
    assert (settings["llm"], settings["num_layers"], settings["projector_learning_rate"]) == (tiny_llm, None, 3e-3)
    assert (settings["form"], settings["tuning"], settings["rank_mode"]) == ("list", "frozen", "score")
    assert settings["user_token"]
    assert settings["item_tokens"]
    assert not any(settings[name] for name in ("semantic_token", "affinity_token", "residual", "curriculum"))
    with pytest.raises(ConfigError, match="latents 'both'"):
        ALLMRec(latents="both")
    with pytest.raises(ConfigError, match="ALLMRec reads a trained recommender"):
        head.attach_stage1(None, films)
