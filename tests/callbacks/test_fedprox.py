"""FedProx equals the proximal term in the loss (T29) and touches nothing but the shared parameters."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sfubm.callbacks.fedprox import FedProx, shared_parameters
from lightning_sfubm.errors import ConfigError
from tests.conftest import small_distiller

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, fused=True),
}


class Toy(L.LightningModule):
    """A shared teacher and a private head. ``explicit`` puts the proximal term into the loss."""

    def __init__(self, optimizer: str = "momentum", explicit: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.teacher = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.teacher.register_parameter("unused", nn.Parameter(torch.ones(2)))
        self.private = nn.Linear(4, 3)
        self.to(dtype)
        self.optimizer, self.explicit = optimizer, explicit
        self.anchor: dict[str, Tensor] = {}

    def shared_state(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.teacher.named_parameters()}

    def on_train_start(self) -> None:
        self.anchor = self.shared_state()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        # Two terms without a parameter in common: the head must train as if the teacher were not there.
        loss = (self.teacher(x) - y).square().mean() + (self.private(x) - y).square().mean()
        if self.explicit:
            gaps = [(p - self.anchor[n]).square().sum() for n, p in self.teacher.named_parameters()]
            loss = loss + self.explicit / 2 * sum(gaps)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self.parameters())


def train(module: L.LightningModule, *callbacks: Any, epochs: int = 3, ckpt: Any = None, **flags: Any) -> L.Trainer:
    """Six batches an epoch, always the same."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(module.parameters()).dtype
    data = TensorDataset(*(torch.randn(24, n, generator=generator, dtype=torch.float64).to(dtype) for n in (4, 3)))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **flags,
    )
    trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


def gap(one: nn.Module, other: nn.Module) -> float:
    theirs = dict(other.named_parameters())
    return max(float((p - theirs[n]).abs().max().detach()) for n, p in one.named_parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.3},
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2},
    ],
    ids=["plain", "accumulated", "clipped by norm", "clipped by value"],
)
def test_equals_the_term_in_the_loss(optimizer: str, flags: dict) -> None:
    mu = 0.7
    hooked, explicit, plain = Toy(optimizer), Toy(optimizer, explicit=mu), Toy(optimizer)
    train(hooked, FedProx(mu), **flags)
    train(explicit, **flags)
    train(plain, **flags)
    assert gap(hooked, explicit) < 1e-12
    assert gap(hooked.teacher, plain.teacher) > 1e-4


def test_equals_the_term_in_the_loss_under_float16_with_a_fused_optimizer() -> None:
    # A fused optimiser divides by the loss scale inside its step, after every hook.
    def half() -> MixedPrecision:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    for optimizer in ("momentum", "fused adamw"):
        hooked, explicit, plain = (Toy(optimizer, mu, torch.float32) for mu in (0.0, 5.0, 0.0))
        train(hooked, FedProx(5.0), plugins=[half()])
        train(explicit, plugins=[half()])
        train(plain, plugins=[half()])
        assert gap(hooked, explicit) < 0.02 * gap(plain, explicit)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_only_shared_parameters_are_touched(optimizer: str) -> None:
    hooked, plain = Toy(optimizer), Toy(optimizer)
    train(hooked, FedProx(2.0))
    train(plain)
    assert gap(hooked.private, plain.private) == 0
    assert gap(hooked.teacher[0], plain.teacher[0]) > 1e-4


def test_frozen_shared_parameters_stay() -> None:
    module = Toy()
    module.teacher[0].requires_grad_(False)
    before = module.shared_state()
    train(module, FedProx(2.0))
    assert torch.equal(module.shared_state()["0.weight"], before["0.weight"])
    assert module.teacher[0].weight.grad is None


def test_mu_zero_changes_nothing() -> None:
    hooked, plain = Toy(), Toy()
    train(hooked, FedProx(0.0))
    train(plain)
    assert gap(hooked, plain) == 0


@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "adamw"])
def test_each_round_is_held_near_the_weights_it_started_from(optimizer: str, tmp_path: Any) -> None:
    """The second round goes on with the momentum of the first."""

    def rounds(explicit: float, *callbacks: FedProx) -> Toy:
        module = Toy(optimizer, explicit)
        first = train(module, *callbacks, epochs=2)
        with torch.no_grad():  # the server's answer
            for parameter in module.teacher.parameters():
                parameter.add_(0.5)
        first.save_checkpoint(tmp_path / "round.ckpt")
        resumed = Toy(optimizer, explicit)  # other weights until Lightning restores the checkpoint
        with torch.no_grad():
            for parameter in resumed.parameters():
                parameter.zero_()
        train(resumed, *callbacks, epochs=4, ckpt=tmp_path / "round.ckpt")
        return resumed

    callback = FedProx(0.7)
    assert gap(rounds(0.0, callback), rounds(0.7)) < 1e-12
    assert gap(rounds(0.0), rounds(0.7)) > 1e-4


def test_a_strong_term_pins_the_teacher() -> None:
    held, free = Toy("sgd"), Toy("sgd")
    start = Toy("sgd")
    train(held, FedProx(15.0))
    train(free)
    assert gap(held.teacher, start.teacher) < 0.3 * gap(free.teacher, start.teacher)


def test_a_skipped_batch_takes_no_step() -> None:
    class Skipping(Toy):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
            return super().training_step(batch, batch_idx) if batch_idx else None

    hooked, explicit = Skipping("adamw"), Skipping("adamw", explicit=0.7)
    train(hooked, FedProx(0.7))
    train(explicit)
    assert gap(hooked, explicit) < 1e-12


def test_two_optimizers_get_the_term_once_each() -> None:
    class TwoOptimizers(Toy):
        def __init__(self, explicit: float = 0.0) -> None:
            super().__init__("momentum", explicit)
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(p.parameters(), lr=0.05, momentum=0.9) for p in (self.private, self.teacher)]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in optimizers:
                optimizer.step()

    hooked, explicit = TwoOptimizers(), TwoOptimizers(explicit=0.7)
    train(hooked, FedProx(0.7))
    train(explicit)
    assert gap(hooked, explicit) < 1e-12


def test_the_distiller_shares_its_teacher_and_only_that_is_held(federated_data: Any) -> None:
    def trained(*callbacks: Any) -> tuple[Any, dict[str, Tensor]]:
        domain = federated_data(domains=1, num_users=30).domains["alpha"]
        domain.prepare_data()
        domain.setup("fit")
        module = small_distiller(phase="joint", w_align=0.0)
        module.bind(domain.catalogue)
        torch.manual_seed(0)
        start = module.shared_state()
        L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            limit_train_batches=4,
            limit_val_batches=0,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        ).fit(module, datamodule=domain)
        return module, start

    held, start = trained(FedProx(1e4))
    free, _ = trained()
    assert [id(p) for p in shared_parameters(held)] == [id(p) for _, p in sorted(held.teacher.named_parameters())]

    def moved(module: Any) -> float:
        return sum(float((x - start[n]).square().sum()) for n, x in module.shared_state().items()) ** 0.5

    assert moved(held) < 0.8 * moved(free)


def test_a_module_without_shared_weights_is_refused() -> None:
    class Private(Toy):
        def shared_state(self) -> dict[str, Tensor]:
            return {}

    class Misnamed(Toy):
        def shared_state(self) -> dict[str, Tensor]:
            return {f"teacher.{name}": value for name, value in super().shared_state().items()}

    with pytest.raises(ConfigError, match="Private shares no weights"):
        train(Private(), FedProx())
    with pytest.raises(ConfigError, match=r"Misnamed names \['teacher.0.bias'.*relative to module.teacher"):
        train(Misnamed(), FedProx())


@pytest.mark.parametrize("mu", [-0.1, float("nan"), float("inf")])
def test_mu_out_of_range_is_refused(mu: float) -> None:
    with pytest.raises(ConfigError, match="mu ="):
        FedProx(mu)
