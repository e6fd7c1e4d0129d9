"""The encoder contract as runnable checks, for the shipped encoders and for anyone's plug-in.

Example:
    >>> from lightning_sfubm.modules.encoders.gru4rec import GRU4Rec
    >>> check_encoder(GRU4Rec(hidden_dim=8))
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from lightning_sfubm.contracts import Encoder
from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.encoders.arguments import constructor_arguments
from lightning_sfubm.seeds import torch_generator

BATCH, LENGTH = 4, 7
PADDED = 3
LONGEST = LENGTH + PADDED  #: history that an encoder has to take here


def _inputs(encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Random embeddings (B, L, H) and a mask (B, L) with 0, 2, 4 and L - 1 padded positions."""
    x = torch.randn(BATCH, LENGTH, encoder.hidden_dim, generator=torch_generator(0, "check_encoder"))
    padding = torch.tensor([[0], [2], [4], [LENGTH - 1]])
    return x, torch.arange(LENGTH) >= padding


def _require_close(left: Tensor, right: Tensor, tolerance: float, broken: str) -> None:
    worst = (left - right).abs().max().item()
    if not worst <= tolerance:
        raise AssertionError(f"{broken} (largest difference {worst:.2e}, allowed {tolerance:.0e})")


def check_shape(encoder: Encoder, tolerance: float) -> None:
    """States have the shape of the embeddings and are finite everywhere, padding and empty rows included."""
    x, mask = _inputs(encoder)
    for real in (mask, torch.zeros_like(mask)):
        states = encoder(x, real)
        if not isinstance(states, Tensor):
            raise AssertionError(f"forward returns a {type(states).__name__}, not a tensor of states")
        if states.dtype != x.dtype:
            raise AssertionError(f"states are {states.dtype}, embeddings {x.dtype}")
        if states.shape != x.shape:
            raise AssertionError(f"states have shape {tuple(states.shape)}, embeddings {tuple(x.shape)}")
        if not states.isfinite().all():
            raise AssertionError("states are not finite, most likely at padded positions")


def check_causality(encoder: Encoder, tolerance: float) -> None:
    """Changing later items leaves earlier states unchanged, and does change the later ones."""
    x, mask = _inputs(encoder)
    changed = torch.cat([x[:, : LENGTH // 2], x[:, LENGTH // 2 :].flip(-1)], 1)
    before, after = encoder(x, mask), encoder(changed, mask)
    _require_close(
        before[:, : LENGTH // 2], after[:, : LENGTH // 2], tolerance, "later items change earlier states: not causal"
    )
    if torch.allclose(before[:, -1], after[:, -1], atol=tolerance):
        raise AssertionError("the last state ignores the items of the history")


def check_padding_content(encoder: Encoder, tolerance: float) -> None:
    """What stands at padded positions is not read."""
    x, mask = _inputs(encoder)
    noisy = torch.where(mask.unsqueeze(-1), x, 3.0 * x.flip(-1))
    _require_close(encoder(x, mask)[mask], encoder(noisy, mask)[mask], tolerance, "padding is read")


def check_left_padding(encoder: Encoder, tolerance: float) -> None:
    """Three more padded positions on the left change no state of a real position."""
    x, mask = _inputs(encoder)
    longer = torch.cat([x.new_zeros(BATCH, PADDED, x.shape[-1]), x], 1)
    longer_mask = torch.cat([mask.new_zeros(BATCH, PADDED), mask], 1)
    _require_close(
        encoder(x, mask)[mask],
        encoder(longer, longer_mask)[:, PADDED:][mask],
        tolerance,
        "the amount of left padding changes the states of real positions",
    )


def check_batching(encoder: Encoder, tolerance: float) -> None:
    """A row encoded alone and without its padding has the states it has in the batch."""
    x, mask = _inputs(encoder)
    together = encoder(x, mask)
    for row in range(BATCH):
        alone = encoder(x[row : row + 1, mask[row]], mask[row : row + 1, mask[row]])
        _require_close(alone[0], together[row, mask[row]], tolerance, f"row {row} depends on the rest of its batch")


def check_gradients(encoder: Encoder, tolerance: float) -> None:
    """The loss reaches the item embeddings of every real position and every parameter that asks for a gradient."""
    x, mask = _inputs(encoder)
    x.requires_grad_(True)
    states = encoder(x, mask)
    weights = torch.randn(states.shape, generator=torch_generator(0, "check_encoder", "weights"))
    parameters = dict(encoder.named_parameters()) if isinstance(encoder, nn.Module) else {}
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    grads = torch.autograd.grad((states * weights)[mask].sum(), [x, *trained.values()], allow_unused=True)
    if grads[0] is None or not grads[0].isfinite().all() or (grads[0][mask].abs().sum(-1) == 0).any():
        raise AssertionError("no finite gradient reaches the item embeddings")
    idle = [name for name, grad in zip(trained, grads[1:], strict=True) if grad is None]
    if idle:
        raise AssertionError(f"no gradient reaches the parameters {idle}")


def check_arguments(encoder: Encoder, tolerance: float) -> None:
    """What the constructor was given is kept as attributes of the same names: a checkpoint is loaded with it."""
    if isinstance(encoder, nn.Module):
        try:
            constructor_arguments(encoder)
        except ConfigError as error:
            raise AssertionError(str(error)) from None


CHECKS: dict[str, Callable[[Encoder, float], None]] = {
    "shape": check_shape,
    "causality": check_causality,
    "padding_content": check_padding_content,
    "left_padding": check_left_padding,
    "batching": check_batching,
    "gradients": check_gradients,
    "arguments": check_arguments,
}


#: checks of what an encoder computes
STATES = ("shape", "causality", "padding_content", "left_padding", "batching")


def check_encoder(encoder: Encoder, tolerance: float = 1e-5, checks: Collection[str] = tuple(CHECKS)) -> None:
    """Run the checks of the encoder contract, in evaluation mode.

    Args:
        encoder: any implementation of :class:`lightning_sfubm.contracts.Encoder` on the CPU.
        tolerance: largest absolute difference that counts as equal.
        checks: which; all by default.

    Raises:
        AssertionError: naming the check and what is broken.
    """
    if not isinstance(getattr(encoder, "hidden_dim", None), int):
        raise AssertionError(
            f"{type(encoder).__name__} breaks the encoder contract: it has no integer attribute 'hidden_dim'"
        )
    was_training = getattr(encoder, "training", False)
    if isinstance(encoder, nn.Module):
        encoder.eval()
    try:
        for name in checks:
            try:
                CHECKS[name](encoder, tolerance)
            except AssertionError as error:
                raise AssertionError(f"{type(encoder).__name__} breaks the encoder contract, {name}: {error}") from None
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
                said = f"{type(error).__name__}, {' '.join(str(error).split())}"
                raise AssertionError(
                    f"{type(encoder).__name__} breaks the encoder contract, {name}: forward raised {said}, on embeddings of "
                    f"shape ({BATCH}, {LENGTH}, {encoder.hidden_dim}) or with {PADDED} more positions"
                ) from error
    finally:
        if isinstance(encoder, nn.Module):
            encoder.train(was_training)
