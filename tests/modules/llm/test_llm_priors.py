"""Title priors, cached for ``subtract_prior``, are those of the weights and the catalogue at hand."""

from dataclasses import replace

import lightning as L
import pytest
import torch

from lightning_sfubm.modules.llm_head import LLMHead

SMALL = {"template": "movies", "history_length": 4, "title_tokens": 8, "precision": "32", "rank_mode": "score"}
ITEMS = torch.tensor([[3, 7, 9]])


def make(llm, catalogue):
    head = LLMHead(llm, subtract_prior=True, adapter_learning_rate=0.1, adapter_dropout=0.0, **SMALL)
    head.attach_stage1(None, catalogue)
    return head


def fresh(head):
    head._prior = None
    return head._priors(ITEMS)


class Batches(torch.utils.data.Dataset):
    """The same batch, again and again."""

    def __init__(self, batch, count):
        self.batch, self.count = batch, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.batch


class Watched(L.Callback):
    """Compares the scores that validation sees with those of priors computed anew."""

    def __init__(self, batch):
        self.batch, self.differences = batch, []

    def on_validation_batch_end(self, trainer, head, outputs, batch, batch_idx, dataloader_idx=0):
        cached = head.rank(self.batch)
        head._prior = None
        self.differences.append((cached - head.rank(self.batch)).abs().max().item())


def test_priors_are_computed_anew_as_training_goes_on(llm, catalogue, make_batch):
    head, batch = make(llm, catalogue), make_batch()
    watched = Watched(batch)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", max_epochs=3, callbacks=[watched], num_sanity_val_steps=1, **quiet)
    train, val = (torch.utils.data.DataLoader(Batches(batch, 2), batch_size=None) for _ in range(2))
    trainer.fit(head, train, val)
    assert len(watched.differences) == 7
    assert max(watched.differences) < 1e-5


@torch.no_grad()
def test_priors_belong_to_weights_and_catalogue(llm, catalogue):
    head, other = make(llm, catalogue), make(llm, catalogue)
    for name, parameter in other.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter)
    before = head._priors(ITEMS).clone()
    head.load_state_dict(other.state_dict())
    assert not torch.allclose(head._priors(ITEMS), before)
    assert torch.equal(head._priors(ITEMS), fresh(head))
    before = head._priors(ITEMS).clone()
    head.attach_stage1(None, replace(catalogue, titles=["", *(f"another {i}" for i in range(1, 31))]))
    assert not torch.allclose(head._priors(ITEMS), before)


@torch.no_grad()
def test_priors_are_of_the_titles_that_the_context_leaves(llm, catalogue, make_batch):
    head = make(llm, catalogue).eval()  # a change of mode forgets them too
    before = head._priors(ITEMS).clone()
    head.lm.config.max_position_embeddings = head.prompts._longest(5) - 6
    with pytest.warns(UserWarning, match="titles are cut to"):
        head.rank(make_batch(rows=1))
    assert torch.equal(head._priors(ITEMS), fresh(head))
    assert not torch.allclose(head._priors(ITEMS), before)


@pytest.mark.parametrize("start", ["on_validation_start", "on_test_start", "on_predict_start"])
def test_an_evaluation_starts_without_priors(llm, catalogue, start):
    head = make(llm, catalogue).eval()
    with torch.no_grad():
        head._priors(ITEMS)
    getattr(head, start)()
    assert head._prior is None
