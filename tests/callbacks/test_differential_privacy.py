"""The teacher trained with DP-SGD by ``Trainer.fit``: it learns, spends what it says, resumes bitwise, and fails closed."""

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_sfubm.callbacks.differential_privacy import DifferentialPrivacy, privacy_of
from lightning_sfubm.datamodules.batching import BatchIndex
from lightning_sfubm.datamodules.domain_datamodule import DomainDataModule
from lightning_sfubm.datamodules.synthetic import HashingTextEncoder, SyntheticReader
from lightning_sfubm.errors import ConfigError, PrivacyError
from lightning_sfubm.federated.hooks import FederatedCallback
from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
from lightning_sfubm.modules.encoders.sasrec import SASRec
from lightning_sfubm.modules.fkd import FKDDistiller
from lightning_sfubm.modules.sequential import SequentialRecommender
from lightning_sfubm.privacy.accounting import PrivacyAccountant
from lightning_sfubm.privacy.poisson import PoissonSampler
from tests.conftest import small_distiller

USERS = 300


@pytest.fixture
def domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A factory of one small planted domain."""
    monkeypatch.setenv("SFUBM_CACHE", str(tmp_path / "cache"))

    def make(name: str = "alpha", **settings: Any) -> DomainDataModule:
        reader = SyntheticReader(0, num_users=USERS, num_items=48, mean_length=10, order=0.95)
        defaults = {"k_core": 0, "batch_size": 50, "max_length": 16}
        return DomainDataModule(name, reader, text_encoder=HashingTextEncoder(dim=32), **{**defaults, **settings})

    return make


def distiller(encoder: torch.nn.Module | None = None, **settings: Any) -> FKDDistiller:
    torch.manual_seed(0)
    encoder = (
        SASRec(hidden_dim=16, num_layers=1, num_heads=2, max_length=16, dropout=0.1) if encoder is None else encoder
    )
    return FKDDistiller(encoder, **{"num_experts": 1, "lr": 0.01, "logits_precision": "fp32", **settings})


def trainer(*callbacks: Callback, epochs: int = 1, **flags: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    fixed = {"use_distributed_sampler": False, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    return L.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**quiet, **fixed, **flags})


def private(**settings: Any) -> DifferentialPrivacy:
    return DifferentialPrivacy(**{"noise_multiplier": 1.0, "delta": 1e-3, "accounting": "rdp", **settings})


def fit(callback: Callback, data: DomainDataModule, *more: Callback, **flags: Any) -> tuple[FKDDistiller, L.Trainer]:
    module, run = distiller(), trainer(callback, *more, **flags)
    run.fit(module, datamodule=data)
    return module, run


def teacher_of(module: FKDDistiller) -> dict[str, torch.Tensor]:
    return module.shared_state()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


class StopAfter(FederatedCallback):
    """Die after a round, as a killed process does."""

    def __init__(self, round: int) -> None:
        self.round = round

    def on_round_end(self, loop: Any, round: int, metrics: Any) -> None:
        if round == self.round:
            raise KeyboardInterrupt


class Spy(Callback):
    """Keep what the optimiser is given, and how many users each batch holds."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.sizes: list[int] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})
        assert len(self.gradients) < 500, "training goes on without end"

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.sizes.append(len(batch["user"]))


# ---------------------------------------------------------------------- learning and accounting


def test_the_teacher_learns_at_a_large_epsilon(domain: Any) -> None:
    data = domain()
    before = trainer().validate(distiller(), datamodule=data, verbose=False)[0]["val/ndcg@10"]
    callback = private(noise_multiplier=0.4)
    _, run = fit(callback, data, epochs=12)
    after = float(run.callback_metrics["val/ndcg@10"])
    assert before < 0.33  # chance is .23
    assert after > 0.42
    assert 10 < callback.accountant.epsilon() < 500
    assert float(run.callback_metrics["train/clipped_share"]) > 0


def test_without_noise_and_clipping_it_learns_as_the_ordinary_teacher(domain: Any) -> None:
    """The same batch of all users: every step is the ordinary one, up to the weight of long histories."""
    callback = private(noise_multiplier=0.0, clip_norm=math.inf, expected_batch_size=USERS)
    module, run = fit(callback, domain(batch_size=USERS), epochs=10)
    ordinary = distiller()
    plain = trainer(epochs=10)
    plain.fit(ordinary, datamodule=domain(batch_size=USERS))
    found, expected = (float(r.callback_metrics["val/ndcg@10"]) for r in (run, plain))
    assert found == pytest.approx(expected, abs=0.05)
    moved = [teacher_of(m)["adaptor.experts.weight"] for m in (module, ordinary)]
    assert float(torch.cosine_similarity(moved[0].flatten(), moved[1].flatten(), dim=0)) > 0.95


def test_one_user_a_step_without_noise_and_clipping_is_ordinary_training_bit_for_bit(
    domain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def user(step: int) -> np.ndarray:
        return np.array([7 * step % USERS])

    def module() -> FKDDistiller:
        torch.manual_seed(0)
        return distiller(SASRec(hidden_dim=16, num_layers=1, num_heads=2, max_length=16, dropout=0.0))

    flags = {"limit_train_batches": 12, "limit_val_batches": 0}
    monkeypatch.setattr(PoissonSampler, "draw", lambda self, step: user(step))
    unprotected = private(noise_multiplier=0.0, clip_norm=math.inf, expected_batch_size=1, gradients="microbatch")
    found, expected = module(), module()
    trainer(unprotected, **flags).fit(found, datamodule=domain())
    assert unprotected.accountant.epsilon() == math.inf

    data = domain()
    data.prepare_data()
    data.setup("fit")
    steps = [BatchIndex(step, user(step)) for step in range(12)]
    loader = DataLoader(data.train_dataloader().dataset, sampler=steps, batch_size=None)
    expected.bind(data.catalogue)
    started = teacher_of(expected)
    trainer(**flags).fit(expected, train_dataloaders=loader)
    assert same(teacher_of(found), teacher_of(expected))
    assert not same(teacher_of(found), started)


@pytest.mark.parametrize("accounting", ["rdp", "prv"])
def test_epsilon_is_that_of_the_steps_taken_and_is_logged(accounting: str, domain: Any) -> None:
    callback = private(noise_multiplier=2.0, accounting=accounting)
    _, run = fit(callback, domain(), epochs=2)
    assert run.global_step == 2 * 6
    assert callback.accountant.history == [(2.0, 50 / USERS, 12)]
    expected = PrivacyAccountant(accounting)
    expected.step(2.0, 50 / USERS, 12)
    assert float(run.callback_metrics["privacy/epsilon"]) == pytest.approx(expected.epsilon(1e-3), rel=1e-6)
    assert float(run.progress_bar_metrics["privacy/epsilon"]) == pytest.approx(expected.epsilon(1e-3), rel=1e-6)
    said = privacy_of(run)
    assert said is not None
    assert said["epsilon"] == expected.epsilon(1e-3)
    assert (said["steps"], said["noise_multiplier"], said["delta"]) == (12, 2.0, 1e-3)
    assert "simulation only" in str(said["secret"])


def test_the_noise_is_set_for_the_budget_of_all_epochs(domain: Any) -> None:
    callback = private(noise_multiplier=None, target_epsilon=4.0, total_epochs=3)
    fit(callback, domain(), epochs=3)
    assert 3.9 < callback.accountant.epsilon() <= 4.0


def test_an_epoch_past_the_budget_is_refused_before_it_starts(domain: Any) -> None:
    spy, callback = Spy(), private(noise_multiplier=None, target_epsilon=4.0, total_epochs=3)
    with pytest.raises(PrivacyError, match="over the budget of 4"):
        fit(callback, domain(), spy, epochs=4)
    assert not spy.gradients
    assert callback.accountant.steps == 0


def test_a_step_past_the_budget_is_refused_where_the_plan_has_no_end(domain: Any) -> None:
    spy, callback = Spy(), private(noise_multiplier=1.0, target_epsilon=6.0)
    with pytest.raises(PrivacyError, match="over the budget of 6"):
        fit(callback, domain(), spy, epochs=-1, limit_val_batches=0)
    assert len(spy.gradients) == callback.accountant.steps > 3
    assert callback.accountant.epsilon() <= 6.0
    callback.accountant.step(1.0, 50 / USERS)
    assert callback.accountant.epsilon() > 6.0


def test_a_plan_is_no_longer_than_the_first_of_its_two_ends(domain: Any) -> None:
    accountant = PrivacyAccountant("rdp", delta=1e-3)
    accountant.step(1.0, 50 / USERS, 6)
    for ends in ({"epochs": 1, "max_steps": 1000}, {"epochs": 100, "max_steps": 6}):
        callback = private(target_epsilon=accountant.epsilon())
        fit(callback, domain(), limit_val_batches=0, **ends)
        assert callback.accountant.steps == 6


# ---------------------------------------------------------------------- sampling, noise, what the optimiser sees


def test_users_are_drawn_by_poisson_and_an_empty_batch_is_a_noisy_step(domain: Any) -> None:
    spy, callback = Spy(), private(expected_batch_size=2, noise_multiplier=1.0)
    fit(callback, domain(), spy, limit_val_batches=0)
    assert len(spy.sizes) == callback.accountant.steps == USERS // 2
    assert 0 in spy.sizes
    assert sum(spy.sizes) / len(spy.sizes) == pytest.approx(2, abs=0.6)
    noise = spy.gradients[spy.sizes.index(0)]
    values = torch.cat([g.flatten() for g in noise.values()]).double() * 2  # by the expected two users
    count = len(values)
    # n squared standard normals have mean n and standard deviation sqrt(2 n); six of them.
    assert abs(float(values.square().sum()) - count) < 6 * math.sqrt(2 * count)


def test_the_optimiser_sees_the_teacher_s_private_gradient_and_nothing_else(domain: Any) -> None:
    """With no noise the gradient's norm is at most C times the users drawn over the users expected."""
    spy = Spy()
    fit(private(noise_multiplier=0.0, clip_norm=0.01), domain(), spy, limit_val_batches=0)
    for size, gradient in zip(spy.sizes, spy.gradients, strict=True):
        assert {name.split(".")[0] for name in gradient} == {"teacher"}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient.values()))
        assert 0 < norm <= 0.01 * size / 50 * (1 + 1e-5)


def test_noise_differs_by_step_client_and_seed_and_repeats_with_them(domain: Any) -> None:
    def steps(name: str = "alpha", seed: int = 1) -> list[torch.Tensor]:
        """Gradients of two epochs, a thousand times more noise than gradient."""
        spy, callback = Spy(), private(seed=seed, clip_norm=1e-3, noise_multiplier=1e3)
        fit(callback, domain(name), spy, epochs=2, limit_val_batches=0)
        return [torch.cat([g.flatten() for g in gradient.values()]) for gradient in spy.gradients]

    first, again, client, seed = steps(), steps(), steps(name="beta"), steps(seed=2)
    assert len(first) == 12
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    everything = torch.nn.functional.normalize(torch.stack([*first, *client, *seed]), dim=1)
    overlap = (everything @ everything.T - torch.eye(len(everything))).abs().max()
    assert float(overlap) < 6 / math.sqrt(everything.shape[1])  # independent directions: sd 1 / sqrt(n)


class Change(Callback):
    """Another item in the place of the first one of a batch, in the tensor of a name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        place = tuple(batch["targets"].nonzero()[0])
        batch[self.name][place] = batch[self.name][place] % 40 + 1


def test_no_noise_is_added_to_two_sums_that_differ(domain: Any) -> None:
    """A step taken again from another teacher, on other data or under another bound: the difference would have no noise."""

    def step(*more: Callback, module_seed: int = 0, **settings: Any) -> torch.Tensor:
        """Gradient of the first step, a thousand times more noise than gradient."""
        spy, loud = Spy(), private(**{"seed": 1, "clip_norm": 1e-3, "noise_multiplier": 1e3, **settings})
        trainer(loud, spy, *more, max_steps=1).fit(distiller(seed=module_seed), datamodule=domain())
        return torch.cat([g.flatten() for g in spy.gradients[0].values()])

    first = step()
    assert torch.equal(first, step())
    others = [
        step(Change("history")),
        step(Change("targets")),
        step(module_seed=1),
        step(clip_norm=2e-3),
        step(noise_multiplier=2e3),
        step(expected_batch_size=60),
    ]
    noise = torch.nn.functional.normalize(torch.stack([first, *others]), dim=1)
    overlap = (noise @ noise.T - torch.eye(len(noise))).abs().max()
    assert float(overlap) < 6 / math.sqrt(noise.shape[1])  # independent directions: sd 1 / sqrt(n)


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_users_gradient_does_not_depend_on_who_else_is_in_the_batch(domain: Any, recurrent: bool) -> None:
    """Masks of dropout would be drawn one user after the other: the bound holds for the sum only where they do not shift."""

    def gradient(part: slice) -> torch.Tensor:
        """Sum over the chosen users of a step of all, without noise and clipping, times 1 / expected users."""
        rows, callback = domain(), private(noise_multiplier=0.0, clip_norm=math.inf, expected_batch_size=USERS)
        torch.manual_seed(0)
        encoder = GRU4Rec(16, 2, dropout=0.5) if recurrent else SASRec(16, 1, 2, 16, dropout=0.5)
        module, spy = distiller(encoder, lr=1e-12), Spy()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PoissonSampler, "draw", lambda sampler, step: np.arange(USERS)[part])
            trainer(callback, spy, epochs=1, limit_val_batches=0).fit(module, datamodule=rows)
        assert module.teacher.encoder.drop.p == 0.5
        if recurrent:
            assert module.teacher.encoder.gru.dropout == 0.5  # is back
        return torch.cat([g.flatten() for g in spy.gradients[0].values()])

    first, others, everybody = gradient(slice(0, 1)), gradient(slice(1, None)), gradient(slice(None))
    torch.testing.assert_close(first + others, everybody, rtol=1e-3, atol=1e-6)
    assert first.norm() > 0.001 * everybody.norm()


class Collect(Callback):
    """Gradients of the rounds of a federated run, by client: its trainers get copies of the callback."""

    rounds_only = True
    gradients: dict[str, list[torch.Tensor]] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        grads = [p.grad.flatten().clone() for p in pl_module.parameters() if p.grad is not None]
        self.gradients.setdefault(trainer.datamodule.name, []).append(torch.cat(grads))


def test_noise_of_a_federated_run_differs_by_round_and_client(federated_data: Any, federated_trainer: Any) -> None:
    Collect.gradients = {}
    loud = private(clip_norm=1e-3, noise_multiplier=1e3)  # a thousand times more noise than gradient
    made = federated_trainer(rounds=3, exchange="teacher", callbacks=[loud, Collect()], local_max_epochs=1)
    made.fit(small_distiller(), datamodule=federated_data(num_users=30))
    assert sorted(Collect.gradients) == ["alpha", "beta"]
    noise = torch.stack([step for steps in Collect.gradients.values() for step in steps])
    assert len(noise) == 2 * 3 * 2  # clients, rounds, steps a round
    overlap = torch.nn.functional.normalize(noise, dim=1)
    overlap = (overlap @ overlap.T - torch.eye(len(noise))).abs().max()
    assert float(overlap) < 6 / math.sqrt(noise.shape[1])  # independent directions: sd 1 / sqrt(n)


def test_a_secret_takes_the_seed_s_place(domain: Any, tmp_path: Path) -> None:
    def run(folder: str, **settings: Any) -> tuple[FKDDistiller, DifferentialPrivacy]:
        callback = private(secret_dir=str(tmp_path / folder), **settings)
        return fit(callback, domain(), limit_val_batches=0)[0], callback

    (first, callback), (second, other) = run("keys"), run("keys")
    assert (tmp_path / "keys" / "alpha.key").exists()
    assert callback.describe()["secret"] == "kept by the client"
    # The same secret and seed, and yet another stream: the difference of two runs must not be free of noise.
    assert not same(teacher_of(first), teacher_of(second))
    assert callback.state_dict()["nonce"] != other.state_dict()["nonce"]


def test_neighbours_are_told_to_be_among_the_users_drawn(domain: Any) -> None:
    """A subset is drawn from everybody, so that one user more changes the others' places too: no noise covers that."""
    spoken = {}
    for settings in (
        {},
        {"max_users": 40, "stage2_positions": 1, "stage2_users": 10},
        {"stage2_users": 10},
        {"train_users": 30},
    ):
        callback = private(expected_batch_size=8)
        fit(callback, domain(**settings), limit_val_batches=0)
        spoken[str(settings)] = str(callback.describe()["neighbours"])
    plain, several, none_held_out, one = spoken.values()
    assert plain == none_held_out == "one user's whole sequence added or removed"
    assert several.startswith(plain + ", among the users that max_users and stage2_users drew")
    assert one.startswith(plain + ", among the users that train_users drew")


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("secret", [False, True])
def test_a_resumed_fit_equals_one_that_never_stopped(secret: bool, domain: Any, tmp_path: Path) -> None:
    settings = {"secret_dir": str(tmp_path / "keys")} if secret else {}
    half = private(**settings)
    _, run = fit(half, domain(), epochs=2)
    run.save_checkpoint(tmp_path / "half.ckpt")

    straight = private(**settings)
    straight.load_state_dict({**straight.state_dict(), "nonce": half.state_dict()["nonce"]})
    whole, _ = fit(straight, domain(), epochs=4)
    torch.manual_seed(999)  # another process has another global stream
    resumed, module = private(**settings), distiller()
    trainer(resumed, epochs=4).fit(module, datamodule=domain(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert same(teacher_of(module), teacher_of(whole))
    assert resumed.state_dict() == straight.state_dict()
    assert resumed.accountant.epsilon() == straight.accountant.epsilon()
    assert resumed.accountant.steps == 24


def test_steps_that_were_not_private_are_not_passed_over(domain: Any, tmp_path: Path) -> None:
    run = trainer(epochs=1, limit_train_batches=1)  # one is enough
    run.fit(distiller(), datamodule=domain())
    run.save_checkpoint(tmp_path / "open.ckpt")
    spy = Spy()
    with pytest.raises(PrivacyError, match="only 0 of them are accounted for"):
        trainer(private(), spy, epochs=2).fit(
            distiller(), datamodule=domain(), ckpt_path=tmp_path / "open.ckpt", weights_only=True
        )
    assert not spy.gradients


def test_a_checkpoint_of_another_accounting_is_refused(domain: Any, tmp_path: Path) -> None:
    _, run = fit(private(accounting="rdp"), domain(), limit_val_batches=0)
    run.save_checkpoint(tmp_path / "rdp.ckpt")
    with pytest.raises(PrivacyError, match=r"'rdp'.*'prv'"):
        trainer(private(accounting="prv"), epochs=2).fit(
            distiller(), datamodule=domain(), ckpt_path=tmp_path / "rdp.ckpt", weights_only=True
        )


def test_federated_rounds_add_up_and_local_phases_spend_nothing(federated_data: Any, federated_trainer: Any) -> None:
    def run(folder: str, *more: Callback, **flags: Any) -> Any:
        made = federated_trainer(folder, rounds=3, exchange="teacher", callbacks=[private(), *more])
        made.fit(small_distiller(), datamodule=federated_data(), **flags)
        return made

    straight = run("straight")
    spent: dict[str, list[float]] = {"alpha": [], "beta": []}
    for line in (straight.run_dir / "history.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["round"] is None:
            assert "privacy/epsilon" not in entry["metrics"]
        else:
            spent[entry["client"]].append(entry["metrics"]["privacy/epsilon"])
    for client, figures in spent.items():
        data = straight.loop.clients[client].datamodule
        users = len(data.train_dataloader().dataset)
        expected = []
        for number in (1, 2, 3):
            accountant = PrivacyAccountant("rdp")
            accountant.step(1.0, 16 / users, number * round(users / 16))
            expected.append(accountant.epsilon(1e-3))
        assert figures == pytest.approx(expected, rel=1e-6)

    with pytest.raises(KeyboardInterrupt):
        run("broken", StopAfter(2))
    bare = federated_trainer("broken", rounds=3, exchange="teacher", callbacks=[])
    with pytest.raises(PrivacyError, match="would go on without"):
        bare.fit(small_distiller(), datamodule=federated_data(), ckpt_path="last")
    resumed = run("broken", ckpt_path="last")
    for client in ("alpha", "beta"):
        first, second = (t.loop.clients[client].module.state_dict() for t in (straight, resumed))
        assert same(first, second)
    assert (straight.run_dir / "history.jsonl").read_text() == (resumed.run_dir / "history.jsonl").read_text()


# ---------------------------------------------------------------------- what is left alone, and what is refused


class Breaking(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        raise KeyError("stop")


def test_module_and_data_are_put_back(domain: Any) -> None:
    data, module = domain(), distiller()
    trainer(private(), limit_val_batches=0).fit(module, datamodule=data)
    assert not {"training_step", "train_dataloader"} & (vars(module).keys() | vars(data).keys())
    with pytest.raises(KeyError):
        trainer(private(), Breaking()).fit(module, datamodule=data)
    assert not {"training_step", "train_dataloader"} & (vars(module).keys() | vars(data).keys())
    assert sum(len(batch["user"]) for batch in data.train_dataloader()) == USERS


def test_the_student_s_phase_is_left_as_it_is(domain: Any) -> None:
    callback, results = private(), []
    for callbacks in ((callback,), ()):
        module = distiller(phase="student")
        run = trainer(*callbacks)
        L.seed_everything(1, verbose=False)
        run.fit(module, datamodule=domain())
        results.append({name: p.detach() for name, p in module.named_parameters()})
        assert privacy_of(run) is None
    assert same(results[0], results[1])
    assert callback.accountant.steps == 0


def test_a_phase_that_trains_shared_and_private_parameters_is_refused(domain: Any) -> None:
    with pytest.raises(PrivacyError, match="'joint'"):
        trainer(private()).fit(distiller(phase="joint"), datamodule=domain())


def test_a_recurrent_teacher_is_trained_user_by_user(domain: Any) -> None:
    spy, callback = Spy(), private()
    run = trainer(callback, spy, limit_train_batches=2, limit_val_batches=0)
    run.fit(distiller(GRU4Rec(16, dropout=0.0)), datamodule=domain())
    assert callback.accountant.steps == run.global_step == 2
    assert any("gru" in name for name in spy.gradients[0])
    with pytest.raises(ConfigError, match="'microbatch'"):
        trainer(private(gradients="vectorized")).fit(distiller(GRU4Rec(16)), datamodule=domain())


def test_other_modules_are_refused(domain: Any) -> None:
    with pytest.raises(ConfigError, match="SequentialRecommender"):
        trainer(private()).fit(SequentialRecommender(SASRec(16)), datamodule=domain())


def test_data_with_several_rows_a_user_is_refused(domain: Any) -> None:
    with pytest.raises(PrivacyError, match="windows of every domain to 'last'"):
        fit(private(), domain(windows="all", max_length=4))


def test_a_delta_of_one_user_is_refused(domain: Any) -> None:
    with pytest.raises(PrivacyError, match="300 users"):
        fit(private(delta=1 / USERS), domain())


def test_a_batch_of_more_users_than_there_are_is_refused(domain: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be drawn from 300"):
        fit(private(expected_batch_size=USERS + 1), domain())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches"),
        ({"strategy": "ddp", "devices": 2}, "one process"),
        ({"precision": "16-true"}, "precision 16-true"),
        ({"precision": "bf16-true"}, "precision bf16-true"),
    ],
)
def test_a_trainer_that_changes_what_a_step_is_is_refused(flags: dict, message: str, domain: Any) -> None:
    callback, module = private(), distiller()
    run = trainer(callback, **flags)
    run.datamodule = domain()
    with pytest.raises(ConfigError, match=message):
        callback.setup(run, module, "fit")


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_norm": 0.0},
        {"clip_norm": math.inf},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": None},
        {"noise_multiplier": None, "target_epsilon": 1.0},
        {"noise_multiplier": None, "target_epsilon": 1.0, "total_epochs": 0},
        {"target_epsilon": -1.0},
        {"delta": 0.0},
        {"accounting": "moments"},
    ],
)
def test_impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ConfigError):
        private(**settings)
