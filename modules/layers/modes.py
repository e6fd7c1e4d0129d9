"""Evaluation for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards, also after an error, every part has the mode it had.

    ``module.train(mode)`` alone would give all parts the mode of the outermost: a container of finished models, itself in
    training mode as all new modules are, would switch their dropout on.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        module.train(modes[0][1])  # modules may do more on a change of mode than set it
        for part, mode in modes:
            part.training = mode
