"""Differentially private gradients: each user's whole gradient clipped, summed, and noise added to the sum.

Abadi et al., "Deep learning with differential privacy" (CCS 2016, arXiv 1607.00133, algorithm 1), with a user in the place
of an example. A user's gradient spans all trained parameters together, those behind the shared item table included.

The trap is that table. Every item vector is computed from the same few parameters and stands at the encoder's input and in the
logits, so a user moves all N rows, and tools that read per-sample gradients off a layer's input and output (hooks) see a tied
embedding used twice. Here the table is computed once and each user's gradient is pulled back through it on its own:

    microbatch   one user after the other by autograd; right for every encoder.
    vectorized   ``torch.func`` over a chunk of users gives their gradients by encoder and table, one batched backward pass
                 takes the latter to the adaptor's parameters. Equal up to the rounding of float32.

Either way a user's gradient is held in full before it is clipped, so that the norm that is bounded is the norm of what is added
to the sum, in the very numbers. Tricks that know only the norms ("ghost clipping") save nothing here: pulling a user's N x H
cotangent back through the adaptor is the cost, and the norm needs it too. CPU-milliseconds a user on one thread (AVX512-BF16,
SASRec of width 64, 8 to 10 items a user), one after the other and vectorised: 3.4 and .8 with 300 items, 4.9 and 3.2 with
1,700, 13 and 19 with 12,086; with 8 experts in place of one 10 and 7 (1,700 items), 45 and 66 (12,086).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_sfubm.errors import ConfigError, PrivacyError
from lightning_sfubm.modules.layers.modes import evaluating
from lightning_sfubm.privacy.noise import NoiseStream
from lightning_sfubm.privacy.teacher_loss import TeacherLoss

Method = Literal["auto", "microbatch", "vectorized"]
Gradients = dict[str, Tensor]  #: by parameter name; per user with a leading axis of users

#: Entries (users x items x width) of a vectorised chunk's table gradients, and the users below which a loop is quicker.
_CHUNK_CPU, _CHUNK_GPU, _MIN_CHUNK = 1 << 20, 1 << 28, 5


@dataclass(frozen=True)
class ClippedSum:
    """A sum of clipped user gradients.

    Attributes:
        total: the sum, by parameter name.
        norms: (B,) norm of each user's gradient before clipping, in the batch's order. Private: not covered by the noise.
    """

    total: Gradients
    norms: Tensor


class PerUserGradients:
    """Gradients of each user of a batch with respect to all parameters that a loss trains.

    Parameters that do not take part (the fusion before a global view has arrived) are left out; which those are depends on the
    model alone.

    Args:
        loss: the teacher's loss by user.
        method: ``"microbatch"``, ``"vectorized"``, or ``"auto"``: vectorised where the encoder allows it and enough users
            fit a chunk.

    Raises:
        ConfigError: the method is unknown or does not know the encoder.
    """

    def __init__(self, loss: TeacherLoss, method: Method = "auto") -> None:
        if method not in get_args(Method):
            raise ConfigError(f"per-user gradients by {method!r} are unknown; choose one of {get_args(Method)}")
        if method == "vectorized" and not loss.vectorizable:
            raise ConfigError(
                "a recurrent encoder cannot be vectorised over users: set gradients to 'microbatch' or 'auto'"
            )
        self.loss = loss
        self.method = method
        self._direct = loss.direct_parameters()
        self._behind: dict[str, torch.nn.Parameter] | None = None

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The parameters whose gradients :meth:`__call__` yields, by name; known after the first call."""
        return {**self._direct, **(self._behind or {})}

    def __call__(self, history: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Gradients]]:
        """Yield the gradients of some users at a time.

        Args:
            history: (B, L) one user a row, left-padded.
            targets: (B, L).

        Yields:
            Rows of the batch (m,), and per parameter the gradients (m, *shape) of those users' losses.
        """
        table = self.loss.table()
        if self._behind is None:
            candidates = self.loss.table_parameters()
            reached = torch.autograd.grad(table.sum(), list(candidates.values()), retain_graph=True, allow_unused=True)
            self._behind = {n: p for (n, p), g in zip(candidates.items(), reached, strict=True) if g is not None}
        lengths = (history != 0).sum(1).clamp_min(1)
        order = lengths.argsort(descending=True, stable=True)
        chunk = self._chunk(table)
        for rows in order.split(chunk or 1) if len(order) else ():
            width = int(lengths[rows[0]])  # rows of similar length together: the padding in front is cut off
            batch = history[rows, -width:], targets[rows, -width:]
            yield rows, (self._vectorized(table, *batch) if chunk else self._alone(table, *batch))

    def _chunk(self, table: Tensor) -> int:
        """Users a vectorised chunk, or 0 for one after the other."""
        if self.method == "microbatch" or not self.loss.vectorizable:
            return 0
        users = (_CHUNK_CPU if table.device.type == "cpu" else _CHUNK_GPU) // table.numel()
        return 0 if self.method == "auto" and users < _MIN_CHUNK else max(1, users)

    def _alone(self, table: Tensor, history: Tensor, targets: Tensor) -> Gradients:
        parameters = self.parameters()
        grads = torch.autograd.grad(
            self.loss.alone(table, history, targets), list(parameters.values()), retain_graph=True, allow_unused=True
        )
        return {
            name: (torch.zeros_like(parameter) if g is None else g).unsqueeze(0)
            for (name, parameter), g in zip(parameters.items(), grads, strict=True)
        }

    def _vectorized(self, table: Tensor, history: Tensor, targets: Tensor) -> Gradients:
        def user_loss(parameters: Gradients, table: Tensor, history: Tensor, targets: Tensor) -> Tensor:
            return functional_call(self.loss, parameters, (table, history, targets))

        direct = {name: parameter.detach() for name, parameter in self._direct.items()}
        by_user = vmap(grad(user_loss, argnums=(0, 1)), in_dims=(None, None, 0, 0), randomness="different")
        try:
            # The fused attention kernels have no batching rule and would run user by user.
            with sdpa_kernel(SDPBackend.MATH):
                grads, cotangents = by_user(direct, table.detach(), history, targets)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ConfigError(
                f"{type(self.loss.teacher.encoder).__name__} cannot be vectorised over users ({str(error)[:200]}): set "
                "gradients to 'microbatch'"
            ) from error
        behind = self._behind or {}
        if behind:
            pulled = torch.autograd.grad(
                table, list(behind.values()), cotangents, retain_graph=True, is_grads_batched=True
            )
            grads = {**grads, **dict(zip(behind, pulled, strict=True))}
        return grads


@contextmanager
def without_user_draws(encoder: nn.Module) -> Iterator[None]:
    """No dropout for a while, so that a user's gradient does not depend on who else is in the batch.

    Recurrent layers stay in training mode, as cuDNN computes no gradients in the other, with their own dropout at 0.
    """
    recurrent = [(part, part.dropout) for part in encoder.modules() if isinstance(part, nn.RNNBase)]
    with evaluating(encoder):
        for part, _ in recurrent:
            part.training, part.dropout = True, 0.0
        try:
            yield
        finally:
            for part, probability in recurrent:
                part.dropout = probability


def clip_users(grads: Gradients, clip_norm: float) -> ClippedSum:
    """Scale each user's gradient to a norm of at most ``clip_norm`` and sum over the users.

    Args:
        grads: (m, *shape) by name.
        clip_norm: C, positive; infinity clips nothing.

    Returns:
        The sum and the norms (m,) before clipping.

    Raises:
        PrivacyError: a user's gradient is not finite, so that its share of the sum cannot be bounded.
    """
    flat = [g.flatten(1) for g in grads.values()]
    squares = [torch.linalg.vector_norm(g, dim=1, dtype=torch.float64).square() for g in flat]
    norms = torch.stack(squares).sum(0).sqrt()
    if not norms.isfinite().all():
        raise PrivacyError("the gradient of a user is not finite: nothing is released; lower the learning rate")
    factors = (clip_norm / norms.clamp_min(1e-30)).clamp_max(1.0)
    # Element by element: a matrix product may round to fewer bits (TF32, bf16), and past the bound.
    total = {name: (g * factors.to(g.dtype).view(-1, *[1] * (g.dim() - 1))).sum(0) for name, g in grads.items()}
    return ClippedSum(total, norms)


def clipped_sum(gradients: PerUserGradients, history: Tensor, targets: Tensor, clip_norm: float) -> ClippedSum:
    """Sum of the clipped gradients of a batch of users, of zeros for an empty batch.

    Args:
        gradients: of the loss.
        history: (B, L) one user a row.
        targets: (B, L).
        clip_norm: C.

    Returns:
        The sum over the batch and the norms (B,).
    """
    total: Gradients = {}
    norms = torch.zeros(len(history), dtype=torch.float64, device=history.device)
    for rows, grads in gradients(history, targets):
        part = clip_users(grads, clip_norm)
        norms[rows] = part.norms
        for name, value in part.total.items():
            total[name] = total[name] + value if name in total else value
    zeros = {name: torch.zeros_like(parameter) for name, parameter in gradients.parameters().items()}
    return ClippedSum(zeros | total, norms)


def add_noise(total: Gradients, std: float, noise: NoiseStream) -> Gradients:
    """Add independent N(0, std^2) to every coordinate of a sum.

    Args:
        total: by name.
        std: noise multiplier times clipping norm; 0 returns the sum as it is.
        noise: stream of this release alone.

    Returns:
        Tensors of the same shapes. The noise is that of floating-point numbers, not of the continuous Gaussian the proofs are
        about (Mironov, CCS 2012); no defence against an attacker who reads the last bits is attempted.
    """
    if std == 0:
        return dict(total)
    return {
        name: value + (noise.normal(tuple(value.shape)) * std).to(value.device, value.dtype)
        for name, value in total.items()
    }


def private_gradient(
    gradients: PerUserGradients,
    history: Tensor,
    targets: Tensor,
    *,
    clip_norm: float,
    noise_multiplier: float,
    expected_users: float,
    noise: NoiseStream,
) -> ClippedSum:
    """Clip each user, sum, add noise, divide by the *expected* number of users.

    The divisor is public. Dividing by the number that happened to be sampled would release that number.

    Args:
        gradients: of the loss.
        history: (B, L) the sampled users, possibly none.
        targets: (B, L).
        clip_norm: C.
        noise_multiplier: standard deviation of the noise over C.
        expected_users: sample rate times number of users.
        noise: stream of this step alone.

    Returns:
        The private gradient as ``total``, and the (not private) norms.

    Raises:
        ConfigError: a number is out of range; noise needs a finite clipping norm.
    """
    if not clip_norm > 0 or noise_multiplier < 0 or not expected_users > 0:
        raise ConfigError(
            f"clip_norm = {clip_norm} (> 0), noise_multiplier = {noise_multiplier} (>= 0) and expected_users = "
            f"{expected_users} (> 0) are required"
        )
    if noise_multiplier and not math.isfinite(clip_norm):
        raise ConfigError("noise is a multiple of clip_norm: give a finite clip_norm or noise_multiplier 0")
    clipped = clipped_sum(gradients, history, targets, clip_norm)
    noisy = add_noise(clipped.total, noise_multiplier * clip_norm if noise_multiplier else 0.0, noise)
    return ClippedSum({name: value / expected_users for name, value in noisy.items()}, clipped.norms)
