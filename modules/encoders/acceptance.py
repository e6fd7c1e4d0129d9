"""What a module asks of the encoder it is given, before anything is trained."""

from typing import Any

from torch import nn

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.modules.encoders.checks import STATES, check_encoder


def encoder_width(encoder: nn.Module) -> int:
    """H of an encoder; what one from outside this package computes is held to the contract first, in milliseconds.

    Args:
        encoder: as a module was given it.

    Raises:
        ConfigError: if the module is no encoder, or breaks the contract.
    """
    width = getattr(encoder, "hidden_dim", None)
    if not isinstance(width, int):
        raise ConfigError(
            f"{type(encoder).__name__} is no encoder: it has no integer attribute 'hidden_dim' (see the Encoder contract)."
        )
    foreign = not type(encoder).__module__.startswith("lightning_sfubm.")
    if foreign:
        try:
            # Trained, one that looks ahead would seem good: what it is to predict stands in its input. A position
            # or a parameter without a gradient may be so by chance (ReLU), or costs memory alone.
            check_encoder(encoder, 1e-3, (*STATES, "differentiable", "arguments"))  # type: ignore[arg-type]
        except AssertionError as error:
            raise ConfigError(f"{error}; what an encoder has to do is in lightning_sfubm.contracts.Encoder") from None
    return width


def check_lengths(module: nn.Module, datamodule: Any) -> None:
    """Refuse an encoder for shorter histories than the data have.

    Those of training are shorter than the one that ``predict`` gives, so that it would be found out once all is trained.

    Args:
        module: with one encoder or more in it; those that have a limit have an integer attribute
            ``max_length``.
        datamodule: of a domain.

    Raises:
        ConfigError: naming both lengths.
    """
    longest = getattr(datamodule, "longest_history", 0)
    for part in module.modules():
        most = getattr(part, "max_length", None)
        if isinstance(most, int) and longest > most:
            raise ConfigError(
                f"{type(part).__name__} takes histories of max_length={most} items, and domain "
                f"{datamodule.catalogue.name!r} has some of {longest}: raise the encoder's max_length, or lower the data's"
            )
