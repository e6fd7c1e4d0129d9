"""FFMSR: its formulas, what each ablation removes, the federated run with K-means, and learning on planted data."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lightning_sfubm.callbacks.privacy_noise import PrivacyNoise
from lightning_sfubm.contracts import Catalogue, CatalogueRanker, FederatedModule, RankBatch, TrainBatch
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader
from lightning_sfubm.errors import CheckpointError, ConfigError, MessageError
from lightning_sfubm.federated.aggregation import KMeans
from lightning_sfubm.federated.checkpoint import find_state
from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.modules.baselines.ffmsr import FFMSR, orthogonality
from lightning_sfubm.modules.encoders.filter_mixer import FilterMixer
from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.layers.text_affinity import text_affinities
from lightning_sfubm.seeds import torch_generator

SMALL: dict[str, Any] = {"num_experts": 2, "text_dropout": 0.0, "logits_precision": "fp32"}
ABLATIONS = {
    "attention": ("items.attention.",),
    "filters": ("prompt_filter.", "filter_layers."),
    "gate": ("items.id_gate.",),
}


def centroids(num_items: int = 30, dim: int = 4) -> torch.Tensor:
    return F.normalize(torch.randn(num_items, dim, generator=torch_generator(0, "centroids")), dim=1)


class Layers:
    """Two bags of words with directions of their own, side by side: what a text encoder with ``layers=2`` returns."""

    dim = 32
    fingerprint = "two hashing layers"

    def __init__(self) -> None:
        self.parts = [HashingTextEncoder(dim=16, seed=seed) for seed in range(2)]

    def encode(self, texts: list[str]) -> torch.Tensor:
        return torch.cat([part.encode(texts) for part in self.parts], 1) / 2**0.5


def layered(catalogue: Catalogue, layers: int) -> Catalogue:
    parts = F.normalize(catalogue.text_embeddings.unflatten(1, (layers, -1)), dim=-1)
    return replace(catalogue, text_embeddings=parts.flatten(1) / layers**0.5)


def build(catalogue: Catalogue, received: bool = True, **kwargs) -> FFMSR:
    torch.manual_seed(0)
    module = FFMSR(SASRec(8, num_layers=1, num_heads=1), **{**SMALL, **kwargs})
    module.bind(layered(catalogue, module.text_layers))
    if received:
        module.receive_semantics(centroids(dim=12 // module.text_layers))
    return module


def shaken(module: FFMSR) -> FFMSR:
    """Weights away from their special starting values, as training would leave them."""
    generator = torch_generator(0, "shake")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        module.items.ids.weight[0] = 0.0
    return module


def logged_step(module: FFMSR, batch: TrainBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logged: dict[str, torch.Tensor] = {}
    module.log_losses = lambda batch, **terms: logged.update(terms)  # type: ignore[method-assign]
    return module.training_step(batch, 0), logged


# ------------------------------------------------------------------ the item side


def test_item_vectors_are_the_formulas(catalogue: Catalogue) -> None:
    """Item by item, from the definitions."""
    module = shaken(build(catalogue)).eval()
    items, tables = module.items, module.items()
    for item in (1, 17, 30):
        layers = F.normalize(catalogue.text_embeddings[item].view(3, 4), dim=1)
        e = items.ids.weight[item]
        adapted = items.adaptor(layers)
        scores = torch.stack([items.attention.score(torch.cat([e, t])) for t in adapted])
        weights = torch.softmax(scores, 0)
        assert weights.std() > 1e-3
        t = (weights * adapted).sum(0)
        v = torch.sigmoid(items.id_gate(e)) * e + t
        p = items.global_adaptor(centroids()[item - 1 : item])[0]
        c = v + torch.sigmoid(items.prompt_gate(p)) * p
        for table, expected in zip(tables, (t, v, p, c), strict=True):
            torch.testing.assert_close(table[item], expected, atol=1e-5, rtol=1e-5)
        uploaded = F.normalize((weights * layers).sum(0), dim=0)
        torch.testing.assert_close(module.semantics()[item - 1], uploaded, atol=1e-5, rtol=1e-5)
    assert all((table[0] == 0).all() for table in tables)
    for fresh, frozen in zip(tables, items.frozen(), strict=True):
        torch.testing.assert_close(frozen, fresh.detach())


@pytest.mark.parametrize("kwargs", [{}, {"attention": False}])
def test_layers_start_with_equal_weights(catalogue: Catalogue, kwargs: dict) -> None:
    module = build(catalogue, received=False, **kwargs)
    layers = F.normalize(catalogue.text_embeddings[1:].view(30, 3, 4), dim=2)
    torch.testing.assert_close(module.semantics(), F.normalize(layers.mean(1), dim=1))
    torch.testing.assert_close(module.semantics().norm(dim=1), torch.ones(30))


def test_the_attention_does_not_train_the_ids(catalogue: Catalogue) -> None:
    module = shaken(build(catalogue))
    module.items().text.square().sum().backward()
    assert module.items.attention.score[0].weight.grad.any()
    assert module.items.ids.weight.grad is None


def test_one_layer_is_plain_text(catalogue: Catalogue) -> None:
    module = build(catalogue, text_layers=1)
    assert module.items.attention is None
    torch.testing.assert_close(module.semantics(), catalogue.text_embeddings[1:])


def test_the_two_adaptors_start_apart(catalogue: Catalogue) -> None:
    items = build(catalogue).items
    assert not torch.allclose(items.adaptor.experts.weight, items.global_adaptor.experts.weight)


# ------------------------------------------------------------------ training


def test_first_weights_follow_the_seed_alone(catalogue: Catalogue) -> None:
    module = FFMSR(SASRec(8, num_heads=1), text_layers=2, seed=3, **SMALL)
    drawn = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        bound = copy.deepcopy(module)
        bound.bind(layered(catalogue, 2))
        drawn.append(dict(bound.named_parameters()))
    assert any(name.startswith("items.id_gate.") for name in drawn[0])
    assert all(torch.equal(p, drawn[1][name]) for name, p in drawn[0].items())


@pytest.mark.parametrize("flag", [None, *ABLATIONS])
def test_an_ablation_removes_its_parameters_and_no_others(
    catalogue: Catalogue, train_batch: TrainBatch, flag: str | None
) -> None:
    full = dict(build(catalogue).named_parameters())
    module = build(catalogue, **({flag: False} if flag else {})).train()
    left = dict(module.named_parameters())
    removed = {name for name in full if name.startswith(ABLATIONS.get(flag, ()))}
    assert left.keys() == full.keys() - removed
    assert bool(removed) == bool(flag)
    loss = shaken(module).training_step(train_batch, 0)
    assert loss.isfinite()
    loss.backward()
    assert [name for name, p in left.items() if p.grad is None or not p.grad.any()] == []


def test_without_filters_the_prompts_are_added_as_they_are(catalogue: Catalogue, rank_batch: RankBatch) -> None:
    module = shaken(build(catalogue, filters=False)).eval()
    history, items = rank_batch["history"], module.items.frozen()
    expected = module.encoder((items.inputs + items.prompts)[history], history != 0)[:, -1]
    torch.testing.assert_close(module.user_states(rank_batch), expected)


def test_filters_read_the_history(catalogue: Catalogue, rank_batch: RankBatch) -> None:
    """Filtered prompts plus inputs, through the filter layers, into the encoder."""
    module = shaken(build(catalogue, num_filters=1)).eval()
    history, items = rank_batch["history"], module.items.frozen()
    mask = history != 0
    x = items.inputs[history] + module.prompt_filter(items.prompts[history])
    x = module.filter_layers[0](x, mask)
    torch.testing.assert_close(module.user_states(rank_batch), module.encoder(x, mask)[:, -1])


def test_filter_layers_keep_the_length_of_item_vectors(catalogue: Catalogue) -> None:
    module = build(catalogue, num_filters=2).eval()
    x, mask = module.items.frozen().inputs[1:11].unsqueeze(0), torch.ones(1, 10, dtype=torch.bool)
    for layer in module.filter_layers:
        x = layer(x, mask)
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(1, 10), atol=1e-2, rtol=1e-2)


def test_later_items_change_no_earlier_state(catalogue: Catalogue, train_batch: TrainBatch) -> None:
    module = shaken(build(catalogue)).eval()
    history = train_batch["history"]
    changed = history.clone()
    changed[:, 5:] = torch.where(history[:, 5:] > 0, history[:, 5:] % 30 + 1, 0)
    items = module.items.frozen()
    before, after = module._states(history, items), module._states(changed, items)
    real = history[:, :5] != 0
    torch.testing.assert_close(before[:, :5][real], after[:, :5][real], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[:, -1], after[:, -1])


@pytest.mark.parametrize("phase", ["federated", "finetune"])
def test_terms_add_up_and_are_logged_by_name(catalogue: Catalogue, train_batch: TrainBatch, phase: str) -> None:
    module = build(catalogue, phase=phase, w_orthogonal=0.3).eval()
    loss, terms = logged_step(module, train_batch)
    apart = ["orthogonal_text", "orthogonal_prompt"][: 1 + (phase == "finetune")]
    assert set(terms) == {"loss", "ce", *apart}
    torch.testing.assert_close(loss, terms["ce"] + 0.3 * sum(terms[name] for name in apart))
    plain, terms = logged_step(build(catalogue, phase=phase, w_orthogonal=0.0).eval(), train_batch)
    assert set(terms) == {"loss", "ce"}
    assert plain == terms["ce"]


def test_the_loss_is_the_cross_entropy_of_what_ranks(catalogue: Catalogue, train_batch: TrainBatch) -> None:
    """Position by position: the history up to there, scored as validation scores it."""
    module = shaken(build(catalogue, w_orthogonal=0.0)).eval()
    losses = []
    for history, targets in zip(train_batch["history"], train_batch["targets"], strict=True):
        for position in targets.nonzero().flatten():
            states, table = module.logit_inputs(history[None, : position + 1])
            losses.append(F.cross_entropy((states @ table.T)[:, 1:], targets[position : position + 1] - 1))
    torch.testing.assert_close(module.training_step(train_batch, 0), torch.stack(losses).mean(), atol=1e-4, rtol=1e-4)


def test_orthogonality_is_the_formula() -> None:
    generator = torch_generator(0, "tables")
    left, right = (torch.randn(6, 3, generator=generator) for _ in range(2))
    left[0] = right[0] = 0.0
    a, b = F.normalize(left[1:], dim=1), F.normalize(right[1:], dim=1)
    expected = sum(sum(a[i, j] * b[i, k] for i in range(5)) ** 2 for j in range(3) for k in range(3)) / 9
    torch.testing.assert_close(orthogonality(left, right), expected, atol=1e-5, rtol=1e-5)
    assert orthogonality(left, torch.zeros(6, 3)) == 0


# ------------------------------------------------------------------ contracts


@pytest.mark.parametrize("kwargs", [{}, {"filters": False}, {"gate": False}, {"attention": False, "text_layers": 2}])
def test_ranking_contracts(catalogue: Catalogue, rank_batch: RankBatch, kwargs: dict) -> None:
    """T13, T14, rank == score_all at the candidates, and what stage 2 reads."""
    module = shaken(build(catalogue, **kwargs)).eval()
    assert isinstance(module, CatalogueRanker)
    assert isinstance(module, FederatedModule)
    scores = module.rank(rank_batch)
    torch.testing.assert_close(scores, module.score_all(rank_batch).gather(1, rank_batch["candidates"]))
    order = torch.randperm(10)
    shuffled, longer = copy.copy(rank_batch), copy.copy(rank_batch)
    shuffled["candidates"] = rank_batch["candidates"][:, order]
    torch.testing.assert_close(module.rank(shuffled), scores[:, order])
    longer["history"] = torch.cat([torch.zeros(5, 4, dtype=torch.int64), rank_batch["history"]], 1)
    torch.testing.assert_close(module.affinities(longer), module.affinities(rank_batch), atol=1e-4, rtol=1e-4)
    affinities = module.affinities(rank_batch)
    assert affinities.shape == (5, 10, len(module.affinity_names))
    torch.testing.assert_close(affinities[..., 0], scores)
    text = text_affinities(module.items.text, rank_batch["history"], rank_batch["candidates"])
    torch.testing.assert_close(affinities[..., 1:], text)
    assert module.user_states(rank_batch).shape == (5, 8)
    assert [table.shape for table in module.item_tables()] == [(31, 8), (31, 8)]


def test_the_servers_vectors_reach_their_items(catalogue: Catalogue, rank_batch: RankBatch) -> None:
    """Nothing before anything was sent; then row i of the answer is item i + 1."""
    module = shaken(build(catalogue, received=False)).eval()
    items = module.items.frozen()
    assert not items.prompts.any()
    torch.testing.assert_close(items.outputs, items.inputs)
    module.receive_semantics(centroids())
    before = module.items.frozen().outputs
    assert not torch.allclose(before, items.outputs)
    changed = centroids()
    changed[3] = -changed[3]
    module.receive_semantics(changed)
    moved = (module.items.frozen().outputs - before).abs().amax(1) > 1e-6
    assert moved.nonzero().flatten().tolist() == [4]
    with pytest.raises(MessageError, match=r"shape \(29, 4\), this domain needs \(30, 4\)"):
        module.receive_semantics(changed[1:])
    with pytest.raises(MessageError, match="not finite"):
        module.receive_semantics(changed / 0)


def test_no_weights_leave(catalogue: Catalogue) -> None:
    module = build(catalogue)
    assert module.shared_state() == {}
    module.load_shared_state({})
    with pytest.raises(MessageError, match=r"holds 'encoder\.weight'"):
        module.load_shared_state({"encoder.weight": torch.ones(1)})


@pytest.mark.parametrize("phase", ["federated", "finetune"])
@pytest.mark.parametrize("received", [False, True])
def test_a_strategy_that_waits_for_the_idle_adaptor_is_refused(
    catalogue: Catalogue, train_batch: TrainBatch, phase: str, received: bool
) -> None:
    module = build(catalogue, received, phase=phase)
    logged_step(module, train_batch)[0].backward()
    idle = {name.split(".")[1] for name, p in module.named_parameters() if p.grad is None}
    assert idle == (set() if received else {"global_adaptor"})
    module.trainer = L.Trainer(accelerator="cpu", strategy="ddp_find_unused_parameters_true", devices=2, logger=False)
    module.on_fit_start()
    module.trainer = L.Trainer(accelerator="cpu", strategy="ddp", devices=2, logger=False)
    if idle:
        with pytest.raises(
            ConfigError, match=r"adaptor gets no gradient .* trainer\.strategy .*ddp_find_unused_parameters_true"
        ):
            module.on_fit_start()
    else:
        module.on_fit_start()


def test_wrong_settings_are_named(catalogue: Catalogue) -> None:
    for kwargs, message in (
        ({"text_layers": 0}, "text_layers=0"),
        ({"num_filters": -1}, "num_filters=-1"),
        ({"max_length": 0}, "max_length=0"),
        ({"tau": 0.0}, r"tau=0\.0"),
        ({"w_orthogonal": -1.0}, r"w_orthogonal=-1\.0"),
        ({"phase": "warm-up"}, "phase='warm-up'"),
        ({"text_dropout": 1.0}, r"FFMSR: text_dropout=1\.0 must lie in"),
        ({"filter_dropout": -0.1}, r"FFMSR: filter_dropout=-0\.1 must lie in"),
    ):
        with pytest.raises(ConfigError, match=message):
            FFMSR(SASRec(8), **kwargs)
    with pytest.raises(ConfigError, match="12 dimensions cannot be text_layers=5"):
        FFMSR(SASRec(8), text_layers=5).bind(catalogue)
    for layers in (1, 2):  # vectors of fewer layers than expected, whose length happens to be divisible
        with pytest.raises(ConfigError, match="not text_layers=3 layers side by side"):
            FFMSR(SASRec(8)).bind(layered(catalogue, layers))
    with pytest.raises(ConfigError, match="needs text vectors"):
        FFMSR(SASRec(8)).bind(Catalogue("t", 3, ["", "a", "b", "c"], None, torch.ones(4)))


def test_defaults_are_the_documented_ones() -> None:
    """T20: the full method, with the authors' sizes where they do not depend on the backbone."""
    module = FFMSR()
    assert (module.text_layers, len(module.filter_layers), module.num_experts, module.tau) == (3, 2, 8, 0.07)
    assert module.attention
    assert module.gate
    assert module.prompt_filter is not None
    assert type(module.encoder) is SASRec
    assert (module.local_phases, module.round_phase, module.phase) == (("finetune",), "federated", "federated")


# ------------------------------------------------------------------ whole runs


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DomainDataModule:
    """300 users whose next item follows a planted chain of topics; chance of Hit@1 is .05."""
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))
    reader = SyntheticReader(num_items=60, order=0.95)
    data = DomainDataModule("planted", reader, text_encoder=Layers(), batch_size=32, max_length=20)
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("encoder", [SASRec(16, dropout=0.1), FilterMixer(16, dropout=0.1)], ids=["sasrec", "fmlp"])
def test_learns_and_reloads(
    planted: DomainDataModule, make_trainer: Callable[..., L.Trainer], tmp_path: Path, encoder: torch.nn.Module
) -> None:
    """T32, and T3: far over chance (.05), equal after a reload without a datamodule."""
    L.seed_everything(0, verbose=False)
    module = FFMSR(copy.deepcopy(encoder), text_layers=2, num_experts=2, filter_dropout=0.1, text_dropout=0.0, lr=1e-2)
    module.bind(planted.catalogue)
    module.receive_semantics(module.semantics())
    module.set_phase("finetune")
    trainer = make_trainer(max_epochs=8)
    trainer.fit(module, planted)
    logged = set(trainer.callback_metrics)
    assert {"val/hit@1", "val/full_ndcg@10", "train/ce", "train/orthogonal_text", "train/orthogonal_prompt"} <= logged
    scores = trainer.test(module, planted, verbose=False)[0]
    assert scores["test/hit@1"] > 0.3
    assert scores["test/full_ndcg@10"] > 0.2

    path = tmp_path / "model.ckpt"
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    again = FFMSR.load_from_checkpoint(path, weights_only=True).eval()
    assert (again.phase, type(again.encoder)) == ("finetune", type(encoder))
    batch = next(iter(planted.test_dataloader()))
    torch.testing.assert_close(again.affinities(batch), module.eval().affinities(batch), rtol=0, atol=0)
    assert torch.equal(again.semantics(), module.semantics())
    with pytest.raises(CheckpointError, match="lacks 'encoder"):
        FFMSR(GRU4Rec(16), text_layers=2, num_experts=2).on_load_checkpoint(content)


@pytest.mark.parametrize("flag", list(ABLATIONS))
def test_every_ablation_learns(planted: DomainDataModule, make_trainer: Callable[..., L.Trainer], flag: str) -> None:
    """T32 of what is left without a part: it ranks far over chance (.05) too."""
    L.seed_everything(0, verbose=False)
    settings = {"text_layers": 2, "num_experts": 2, "filter_dropout": 0.1, "text_dropout": 0.0, "lr": 1e-2, flag: False}
    module = FFMSR(SASRec(16, dropout=0.1), **settings)
    module.bind(planted.catalogue)
    module.receive_semantics(module.semantics())
    module.set_phase("finetune")
    trainer = make_trainer(max_epochs=8)
    trainer.fit(module, planted)
    scores = trainer.test(module, planted, verbose=False)[0]
    assert scores["test/hit@1"] > 0.3


def federation(federated_data: Any, **settings: Any) -> Any:
    data = federated_data(**settings)
    for domain in data.domains.values():
        domain.text_encoder = Layers()
    return data


def client_model() -> FFMSR:
    torch.manual_seed(0)
    return FFMSR(SASRec(16, num_layers=1, num_heads=2, max_length=16), text_layers=2, num_experts=2, lr=1e-2)


def test_a_federated_run_with_kmeans(federated_data: Any, federated_trainer: Any) -> None:
    """One upload a client, answers are shared centroids, each client learns, its checkpoint ranks as the run does."""
    model, server = client_model(), KMeans(num_clusters=6, min_members=2)
    trainer = federated_trainer(exchange="semantics", aggregator=server, local_max_epochs=10, patience=10)
    trainer.fit(model, datamodule=federation(federated_data, num_users=200))

    ledger = [json.loads(line) for line in (trainer.run_dir / "ledger.jsonl").read_text().splitlines()]
    assert sorted((e["direction"], e["kind"], e["client"]) for e in ledger) == [
        (direction, "semantics", name) for direction in ("down", "up") for name in ("alpha", "beta")
    ]
    assert all(e["tensors"]["vectors"]["shape"][1] == 16 for e in ledger)
    history = [json.loads(line) for line in (trainer.run_dir / "history.jsonl").read_text().splitlines()]
    assert {e["phase"] for e in history} == {"federated", "finetune"}

    state = find_state(trainer.run_dir / "checkpoints")
    clients = {name: client.module for name, client in trainer.loop.clients.items()}
    received = {name: module.items.global_text[1:] for name, module in clients.items()}
    distinct = torch.unique(torch.cat(list(received.values())), dim=0)
    assert 2 <= len(distinct) <= 6
    assert all(len(torch.unique(vectors, dim=0)) == len(distinct) for vectors in received.values())
    for name, module in clients.items():
        data = trainer.loop.clients[name].datamodule
        assert module.phase == "finetune"
        assert F.cosine_similarity(received[name], module.semantics()).mean() > 0.5
        batch = next(iter(data.test_dataloader()))
        again = FFMSR.load_from_checkpoint(state / "clients" / f"{name}.ckpt", weights_only=True).eval()
        torch.testing.assert_close(again.score_all(batch), module.score_all(batch), rtol=0, atol=0)
        scores = trainer.make_trainer(label=name, max_epochs=1).test(module, datamodule=data, verbose=False)[0]
        assert scores["test/hit@1"] > 0.25, name
    assert trainer.local_twin(model, "alpha").module.items.global_text is None


class Dies(FederatedCallback):
    """Stops the process after the first round."""

    def on_round_end(self, loop: Any, round: int, metrics: Any) -> None:
        raise KeyboardInterrupt


def test_a_resumed_run_keeps_what_the_server_sent(federated_data: Any, federated_trainer: Any) -> None:
    """T1: the answer came before the first round and is not asked for again."""
    settings = {"exchange": "semantics", "aggregator": KMeans(num_clusters=6, min_members=2)}
    straight = federated_trainer("straight", **settings)
    straight.fit(client_model(), datamodule=federation(federated_data))
    broken = federated_trainer("broken", callbacks=[PrivacyNoise(0.05), Dies()], **settings)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(client_model(), datamodule=federation(federated_data))
    torch.manual_seed(999)  # a new process has another global stream
    resumed = federated_trainer("broken", **settings)
    resumed.fit(client_model(), datamodule=federation(federated_data), ckpt_path="last")
    for name, client in straight.loop.clients.items():
        first, second = client.module.state_dict(), resumed.loop.clients[name].module.state_dict()
        assert first["items.global_text"].any()
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []
