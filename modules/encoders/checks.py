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
LONGEST = LENGTH + PADDED  #: history that an encoder is asked to take here, unless its ``max_length`` is shorter


def _lengths(encoder: Encoder) -> tuple[int, int]:
    """Length L of the histories, and by how many positions they are padded further."""
    most = getattr(encoder, "max_length", LONGEST)
    if not isinstance(most, int) or most >= LONGEST:
        return LENGTH, PADDED
    padded = max(most // 3, int(most > 1))
    return max(most - padded, 1), padded


def _inputs(encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Random embeddings (B, L, H) and a mask (B, L) with 0, 2, 4 and L - 1 padded positions, L - 1 at most."""
    length, _ = _lengths(encoder)
    x = torch.randn(BATCH, length, encoder.hidden_dim, generator=torch_generator(0, "check_encoder"))
    padding = torch.tensor([[0], [2], [4], [length - 1]]).clamp(max=length - 1)
    return x, torch.arange(length) >= padding


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
    half = x.shape[1] // 2
    changed = torch.cat([x[:, :half], x[:, half:].flip(-1)], 1)
    before, after = encoder(x, mask), encoder(changed, mask)
    if half:
        _require_close(before[:, :half], after[:, :half], tolerance, "later items change earlier states: not causal")
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
    _, padded = _lengths(encoder)
    longer = torch.cat([x.new_zeros(BATCH, padded, x.shape[-1]), x], 1)
    longer_mask = torch.cat([mask.new_zeros(BATCH, padded), mask], 1)
    _require_close(
        encoder(x, mask)[mask],
        encoder(longer, longer_mask)[:, padded:][mask],
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


def check_differentiable(encoder: Encoder, tolerance: float) -> None:
    """Some finite gradient reaches the item embeddings."""
    x, mask = _inputs(encoder)
    with torch.enable_grad():
        (grad,) = _gradients(encoder, x.requires_grad_(True), mask, [x])
    if grad is None or not grad.isfinite().all() or not grad.any():
        raise AssertionError("no finite gradient reaches the item embeddings")


def check_gradients(encoder: Encoder, tolerance: float) -> None:
    """The loss reaches the item embeddings of every real position."""
    x, mask = _inputs(encoder)
    with torch.enable_grad():
        (grad,) = _gradients(encoder, x.requires_grad_(True), mask, [x])
    if grad is None or not grad.isfinite().all() or (grad[mask].abs().sum(-1) == 0).any():
        raise AssertionError("no finite gradient reaches the item embeddings of every real position")


def check_parameters(encoder: Encoder, tolerance: float) -> None:
    """The loss reaches every parameter that asks for a gradient."""
    x, mask = _inputs(encoder)
    parameters = dict(encoder.named_parameters()) if isinstance(encoder, nn.Module) else {}
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    with torch.enable_grad():
        grads = _gradients(encoder, x, mask, list(trained.values()))
    if idle := [name for name, grad in zip(trained, grads, strict=True) if grad is None]:
        raise AssertionError(f"no gradient reaches the parameters {idle}")


def _gradients(encoder: Encoder, x: Tensor, mask: Tensor, of: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Of a random weighing of all states at real positions; ``None`` for what it does not depend on."""
    states = encoder(x, mask)
    weights = torch.randn(states.shape, generator=torch_generator(0, "check_encoder", "weights"))
    if not states.requires_grad or not of:
        return (None,) * len(of)
    return torch.autograd.grad((states * weights)[mask].sum(), of, allow_unused=True)


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
    "differentiable": check_differentiable,
    "gradients": check_gradients,
    "parameters": check_parameters,
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
                length, padded = _lengths(encoder)
                raise AssertionError(
                    f"{type(encoder).__name__} breaks the encoder contract, {name}: forward raised {said}, on embeddings of "
                    f"shape ({BATCH}, {length}, {encoder.hidden_dim}) or with {padded} more positions"
                ) from error
    finally:
        if isinstance(encoder, nn.Module):
            encoder.train(was_training)
