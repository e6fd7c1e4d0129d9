import json
import shutil

import lightning as L
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from lightning_sfubm.cli import SFUBMCLI
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.baselines.tallrec import TALLRec, TALLRecBinary
from lightning_sfubm.modules.llm.tiny import write_tiny_llm
from lightning_sfubm.modules.llm_head import LLMHead
from lightning_sfubm.seeds import torch_generator

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
SMALL = {"template": "movies", "history_length": 4, "title_tokens": 8, "precision": "32"}


def make(cls, llm, films, **options):
    head = cls(llm, **{**SMALL, **options})
    head.attach_stage1(None, films)
    return head


def copied(llm, tmp_path, chat=False, pad=True):
    """The tiny LLM with another tokenizer: with a chat format, or without a pad token."""
    folder = tmp_path / "llm"
    shutil.copytree(llm, folder)
    if chat:
        (folder / "chat_template.jinja").write_text(CHAT)
    if not pad:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            path = folder / name
            if path.is_file():
                path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
    return str(folder)


def judged(seed, rows=16, titles=1):
    """Users who like films with odd numbers ("film") or with even ones ("item"), and titles to be judged."""
    generator = torch_generator(seed, "judged")
    odd = torch.randint(0, 15, (rows, 6), generator=generator) * 2 + 1
    likes_odd = torch.randint(0, 2, (rows, 1), generator=generator)
    candidates = torch.randint(1, 31, (rows, titles), generator=generator)
    return {
        "history": torch.where(likes_odd > 0, odd, odd + 1)[:, :4],
        "disliked": torch.where(likes_odd > 0, odd + 1, odd)[:, 4:],
        "candidates": candidates,
        "labels": (candidates % 2 == likes_odd).long(),
        "user": torch.arange(rows),
    }


def spelled(head, prompts, branch=0, row=0):
    return head.lm.tokenizer.decode(prompts.tokens[row][prompts.branch[row] == branch])


# ---------------------------------------------------------------------------------------------------- candidate choice


def test_choice_learns_a_planted_rule(tiny_llm, films, film_batch, tune):
    """T32: the wanted film is always number 7; all three ways of answering find it, in words where words are asked for."""
    head = make(TALLRec, tiny_llm, films, adapter_learning_rate=1e-2, adapter_dropout=0.0)
    test = film_batch(rows=32, seed=999, target=7)
    _, _, valid = head.rank_with_validity(test)
    assert valid.float().mean() < 0.5
    tune(head, [film_batch(rows=8, seed=seed, target=7) for seed in range(60)])
    for mode in ("generate", "constrained", "score"):
        head.rank_mode = mode
        _, choice, valid = head.rank_with_validity(test)
        assert (choice == test["target_index"])[valid].float().mean() >= 0.9
        assert valid.float().mean() >= 0.95


@pytest.mark.parametrize("cls", [TALLRec, TALLRecBinary])
def test_from_head_takes_what_rows_share_and_nothing_else(tiny_llm, films, cls):
    shared = {"history_length": 3, "adapter_learning_rate": 7e-4, "seed": 5}
    template = LLMHead(tiny_llm, num_layers=1, adapter_rank=2, **{**SMALL, **shared})
    head = cls.from_head(template.hparams, adapter_alpha=64)
    assert isinstance(head, LLMHead)
    settings = vars(head.settings)
    assert {name: settings[name] for name in shared} == shared
    assert (settings["llm"], settings["template"]) == (tiny_llm, "movies")
    assert (settings["num_layers"], settings["adapter_rank"], settings["adapter_alpha"]) == (None, 8, 64)
    head.attach_stage1(None, films)
    trained = {name for name, parameter in head.named_parameters() if parameter.requires_grad}
    assert {name.split("self_attn.")[1] for name in trained} == {
        f"{part}_proj.lora_{side}.default.weight" for part in "qv" for side in "AB"
    }
    assert len(trained) == 8  # both layers


def test_reads_titles_only(tiny_llm, films, recommender):
    with pytest.raises(ConfigError, match="TALLRec reads titles only"):
        TALLRec(tiny_llm).attach_stage1(recommender, films)


def test_loss_is_on_the_answer_only(tiny_llm, films, film_batch, tmp_path):
    head = make(TALLRec, copied(tiny_llm, tmp_path, chat=True), films).eval()
    batch = film_batch(rows=1)
    prompts = head.prompts.build(batch["history"], batch["candidates"], batch["target"].unsqueeze(1))
    answer = int((prompts.branch == 1).sum())
    assert spelled(head, prompts, branch=1) == f" {films.titles[batch['target'][0]]}</s>"
    with torch.no_grad():
        logits = head.lm.causal_lm(prompts.tokens).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[-answer - 1 : -1], prompts.tokens[0, -answer:])
        torch.testing.assert_close(head.loss(batch), expected, atol=1e-4, rtol=0)


def test_chat_format_where_the_tokenizer_has_one_and_plain_text_where_not(tiny_llm, films, film_batch, tmp_path):
    asking = tmp_path / "own.yaml"
    asking.write_text("chat: true\n")
    batch = film_batch(rows=1)
    for cls in (TALLRec, TALLRecBinary):
        plain = make(cls, tiny_llm, films, template=str(asking))
        text = spelled(plain, plain.prompts.build(batch["history"], batch["candidates"]))
        assert text.startswith("A user of a service")
        assert "<s>" not in text
    chatty = make(TALLRec, copied(tiny_llm, tmp_path, chat=True), films)
    text = spelled(chatty, chatty.prompts.build(batch["history"], batch["candidates"]))
    assert text.startswith("<s>user: A user of a film service")
    assert text.endswith("Answer:</s><s>assistant:")


@pytest.mark.parametrize("cls", [TALLRec, TALLRecBinary])
def test_tokenizer_without_a_pad_token(tiny_llm, films, film_batch, tmp_path, cls):
    bare = make(cls, copied(tiny_llm, tmp_path, pad=False), films)
    assert bare.lm.tokenizer.pad_token_id is None
    batch = film_batch(rows=4)
    padded = make(cls, tiny_llm, films)
    torch.testing.assert_close(bare.rank(batch), padded.rank(batch))
    bare.rank_mode = "score"
    scores = bare.rank(batch)
    for row in range(4):
        alone = bare.rank({name: value[row : row + 1] for name, value in batch.items()})
        torch.testing.assert_close(alone[0], scores[row], atol=1e-4, rtol=0)


@pytest.mark.parametrize("cls", [TALLRec, TALLRecBinary])
def test_reloaded_in_a_fresh_object_and_other_than_the_base(tiny_llm, films, film_batch, tune, tmp_path, cls):
    """The public code saved empty adapters: here the file's outputs equal the live model's and not the base model's."""
    options = {"rank_mode": "score"} if cls is TALLRec else {}
    head = make(cls, tiny_llm, films, adapter_learning_rate=1e-2, **options)
    samples = [film_batch(seed=seed) if cls is TALLRec else judged(seed) for seed in range(6)]
    tune(head, samples).save_checkpoint(tmp_path / "head.ckpt")
    batch = film_batch()
    live = head.rank(batch)
    stored = torch.load(tmp_path / "head.ckpt", weights_only=True)["state_dict"]
    assert stored.keys() == {name for name, p in head.named_parameters() if p.requires_grad}
    assert all(value.abs().sum() > 0 for value in stored.values())

    again = cls.load_from_checkpoint(tmp_path / "head.ckpt", weights_only=True)
    again.attach_stage1(None, films)
    torch.testing.assert_close(again.rank(batch), live)
    with head.lm.model.disable_adapter():
        assert (head.rank(batch) - live).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------- binary task


def test_binary_prompt_spelled_out(tiny_llm, films, tmp_path):
    history, disliked, judge = torch.tensor([[0, 1, 3]]), torch.tensor([[2]]), torch.tensor([[5]])
    head = make(TALLRecBinary, tiny_llm, films)
    prompts = head.prompts.build(history, judge, disliked=disliked)
    assert spelled(head, prompts) == (
        "A user of a film service tells what they liked and disliked. Say whether they will like one more film: Yes or "
        "No.\nLiked: 1 film; 3 film;\nDisliked: 2 item;\nWill the user like this film:"
    )
    # the tiny tokenizer spells " Yes" as " ", "Y", "e", "s": the space belongs to the prompt, the answer is "Y" or "N"
    assert spelled(head, prompts, branch=1) == " 5 film?\nAnswer: "
    assert [head.lm.tokenizer.decode(token) for token in head.prompts.answer_ids] == ["Y", "N"]

    chatty = make(TALLRecBinary, copied(tiny_llm, tmp_path, chat=True), films)
    prompts = chatty.prompts.build(history, judge)
    assert spelled(chatty, prompts).startswith("<s>user: A user")
    assert spelled(chatty, prompts).endswith("Disliked:\nWill the user like this film:")
    assert spelled(chatty, prompts, branch=1) == " 5 film?\nAnswer:</s><s>assistant:"


def test_answers_that_cannot_be_told_apart(tiny_llm, films, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("binary: {answer_yes: ' Yes', answer_no: ' Yes, not'}\n")
    with pytest.raises(ConfigError, match="begin with the same tokens"):
        make(TALLRecBinary, tiny_llm, films, template=str(own))


@pytest.mark.parametrize("settings", [{}, {"architecture": "gemma3", "final_logit_softcapping": 2.0}])
def test_binary_loss_and_score_are_the_answer_tokens_own(tmp_path, films, settings):
    llm = str(write_tiny_llm(tmp_path / "llm", **settings))
    head, batch = make(TALLRecBinary, llm, films).eval(), judged(0, rows=2, titles=3)
    expected_scores, losses = torch.zeros(2, 3), []
    yes, no = head.prompts.answer_ids
    for row in range(2):
        for title in range(3):
            one = {k: batch[k][row : row + 1] for k in ("history", "disliked")}
            prompts = head.prompts.build(
                one["history"], batch["candidates"][row : row + 1, title : title + 1], disliked=one["disliked"]
            )
            with torch.no_grad():
                logits = head.lm.causal_lm(prompts.tokens).logits[0, -1]
            expected_scores[row, title] = logits[[yes, no]].softmax(0)[0]
            losses.append(-logits.log_softmax(0)[yes if batch["labels"][row, title] else no])
    torch.testing.assert_close(head.rank(batch), expected_scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(head.loss(batch).detach(), torch.stack(losses).mean(), atol=1e-4, rtol=0)


def test_a_rank_without_a_user_adds_nothing_to_the_auc(tiny_llm, films):
    head, batch = make(TALLRecBinary, tiny_llm, films), judged(0, rows=8, titles=2)
    nobody = {name: value[:0] for name, value in batch.items()}
    assert head.rank(nobody).shape == (0, 2)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    found = [
        trainer.test(head, torch.utils.data.DataLoader(given, batch_size=None), verbose=False)
        for given in ([batch], [batch, nobody], [nobody, batch])
    ]
    assert found[0] == found[1] == found[2]


def test_a_prompt_with_more_dislikes_than_history_fits_the_model(tiny_llm, films, monkeypatch):
    head, batch = make(TALLRecBinary, tiny_llm, films), judged(0, rows=2)
    monkeypatch.setattr(head.lm.config, "max_position_embeddings", 300)
    head.rank(batch)
    assert head.prompts.title_tokens == 8
    with pytest.warns(UserWarning, match="titles are cut to"):
        head.rank({**batch, "disliked": torch.arange(1, 21).expand(2, 20)})
    assert head.prompts._longest(1, 20) <= 300


def test_scores_do_not_tie_in_bf16(tiny_llm, films):
    head = make(TALLRecBinary, tiny_llm, films, precision="bf16")
    scores = head.rank(judged(0, rows=8, titles=20))
    exact = make(TALLRecBinary, tiny_llm, films).rank(judged(0, rows=8, titles=20))
    torch.testing.assert_close(scores, exact, atol=0.1, rtol=0)
    assert len(torch.unique(scores)) > 100


@pytest.mark.slow
def test_binary_learns_from_likes_and_dislikes(tiny_llm, films, tune):
    """T32: a title is liked where its last word is that of the liked titles; neither alone tells."""
    head = make(TALLRecBinary, tiny_llm, films, adapter_learning_rate=5e-3, adapter_dropout=0.0)
    test = judged(10**6, rows=64, titles=4)
    assert binary_auroc(head.rank(test).flatten(), test["labels"].flatten()) < 0.65
    trainer = tune(head, [judged(seed) for seed in range(300)])
    auc = binary_auroc(head.rank(test).flatten(), test["labels"].flatten())
    assert auc >= 0.9
    swapped = {**test, "history": test["disliked"], "disliked": test["history"]}
    assert binary_auroc(head.rank(swapped).flatten(), test["labels"].flatten()) <= 0.2
    loader = torch.utils.data.DataLoader([test], batch_size=None)
    (logged,) = trainer.test(head, loader, verbose=False)
    assert logged["test/auc"] == pytest.approx(auc.item(), abs=1e-6)


def test_binary_prompts_are_fitted_to_a_short_context(tiny_llm, films):
    head, batch = make(TALLRecBinary, tiny_llm, films, title_tokens=12), judged(0)
    head.lm.config.max_position_embeddings = context = head.prompts._longest(1) - 3
    before = head.prompts.title_tokens
    with pytest.warns(UserWarning, match="titles are cut to"):
        head.loss(batch)
    assert head.prompts.title_tokens < before
    assert head.prompts._longest(1) <= context


def test_binary_task_on_the_command_line(tiny_llm, tmp_path, monkeypatch):
    """A few shots of a generated domain; the checkpoint brings its settings along; and as a ranker of candidates."""
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    config = {
        "seed_everything": 5,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": str(tmp_path / "run"),
            "logger": False,
        },
        "model": {
            "class_path": "lightning_sfubm.modules.baselines.tallrec.TALLRecBinary",
            "init_args": {"llm": tiny_llm, **SMALL},
        },
        "data": {
            "class_path": "lightning_sfubm.datamodules.preference_datamodule.PreferenceDataModule",
            "init_args": {
                "shots": 16,
                "max_val_users": 10,
                "max_test_users": 10,
                "source": {
                    "class_path": "lightning_sfubm.datamodules.domain_datamodule.DomainDataModule",
                    "init_args": {
                        "name": "alpha",
                        "reader": {
                            "class_path": "lightning_sfubm.datamodules.synthetic.SyntheticReader",
                            "init_args": {"num_users": 40, "num_items": 36, "mean_length": 8},
                        },
                        "k_core": 0,
                        "stage2_positions": 1,
                    },
                },
            },
        },
    }
    fitted = SFUBMCLI(["fit"] + [f"--{part}={json.dumps(value)}" for part, value in config.items()])
    data, trainer = fitted.datamodule, fitted.trainer
    assert 0 <= trainer.callback_metrics["val/auc"] <= 1
    (path,) = (tmp_path / "run").rglob("*.ckpt")
    again = TALLRecBinary.load_from_checkpoint(path, weights_only=True)
    again.attach_stage1(None, data.catalogue)
    (logged,) = trainer.test(again, datamodule=data, verbose=False)
    (live,) = trainer.test(fitted.model, datamodule=data, verbose=False)
    assert logged == live
    assert again.rank(next(iter(data.source.rank_dataloader("val", 8, max_users=8)))).shape == (8, 20)


def test_binary_on_rows_without_labels_is_refused_in_a_sentence(tiny_llm, films):
    head, batch = make(TALLRecBinary, tiny_llm, films), judged(0, rows=2)
    del batch["labels"]
    for step in (head.training_step, head.validation_step, head.test_step):
        with pytest.raises(ConfigError, match=r"TALLRecBinary judges titles .* use .*PreferenceDataModule"):
            step(batch, 0)
