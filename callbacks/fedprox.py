"""FedProx: hold a client's shared weights near the global ones while it trains."""

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sfubm.errors import ConfigError


class FedProx(Callback):
    """Add ``mu (w - w_global)`` to the gradients of the shared parameters before every optimiser step.

    That is the gradient of the proximal term ``mu / 2 ||w - w_global||^2`` (Li et al., MLSys 2020, arXiv 1812.06127), so
    training equals training with the term in the loss, whatever the optimiser; no graph is built for it. ``w_global`` is what
    the parameters hold when training starts: every round is a ``fit`` of its own, and the loop
    loads the global weights before it; after a round of too few updates there are no new ones, and a client stays near the
    weights it trained last. It is not kept in checkpoints, since those end one round and start the next.

    Only parameters that the module's ``shared_state`` names are touched, and of those only the ones being trained. The names
    are relative to ``module.teacher``, or to the module where it has none.

    The hook is ``on_before_optimizer_step``: after the backward passes of accumulated batches, after ranks have been
    averaged and, under float16, after gradients have been unscaled; **before gradient clipping**. So the clipped gradient is
    that of the whole objective, as with the term in the loss, and ``gradient_clip_val`` still bounds the step; clipping
    first would let the term add to it without bound. Gradients made private
    in the training step (clipped per user, noise added) get the term afterwards, as they should: it is computed from weights
    alone, which are private already, and needs neither.

    Args:
        mu: strength, at least 0; 0 changes nothing. To be tuned on validation; the paper's best values lie between 0.001
            and 1, by data set.

    Raises:
        ConfigError: mu is negative or not finite.
    """

    rounds_only = True  #: local phases and methods outside the federation have no global weights to stay near

    def __init__(self, mu: float = 0.01) -> None:
        if not math.isfinite(mu) or mu < 0:
            raise ConfigError(f"FedProx: mu = {mu} must be a finite number >= 0")
        self.mu = mu
        self._anchors: dict[nn.Parameter, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the global weights; Lightning has restored its checkpoint by now.

        Raises:
            ConfigError: the module shares no weights, or names one that it does not have.
        """
        self._anchors = {p: p.detach().clone() for p in shared_parameters(pl_module)} if self.mu else {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the term to the gradients of the shared parameters that ``optimizer`` moves."""
        if not self._anchors:
            return
        moved = [p for group in optimizer.param_groups for p in group["params"]]
        if all(p.grad is None for p in moved):  # training_step returned None: the batch is skipped, the term with it
            return
        strength = self.mu * _loss_scale(trainer, optimizer)
        for parameter in moved:
            anchor = self._anchors.get(parameter)
            if anchor is None or not parameter.requires_grad:
                continue
            if parameter.grad is None:  # not part of this step's loss, but part of the proximal term
                parameter.grad = (parameter.detach() - anchor) * strength
            else:
                parameter.grad.add_(parameter.detach() - anchor, alpha=strength)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the copy."""
        self._anchors = {}


def shared_parameters(module: LightningModule) -> list[nn.Parameter]:
    """The live parameters that ``module.shared_state()`` gives copies of.

    Raises:
        ConfigError: the module shares no weights, or names one that it does not have.
    """
    share: Any = getattr(module, "shared_state", None)
    names = sorted(share()) if share is not None else []
    if not names:
        raise ConfigError(f"{type(module).__name__} shares no weights to hold near the global ones: remove FedProx")
    root = getattr(module, "teacher", module)
    own = dict(root.named_parameters())
    unknown = [name for name in names if name not in own]
    if unknown:
        raise ConfigError(
            f"FedProx: shared_state of {type(module).__name__} names {unknown[:3]}, but {type(root).__name__} has no such "
            "parameters: name them relative to module.teacher, or to the module where it has none"
        )
    return [own[name] for name in names]


def _loss_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    # Fused optimisers under 16-mixed divide by the loss scale themselves, inside their step: until then gradients are scaled.
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())
