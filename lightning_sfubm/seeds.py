"""Named random streams: every draw in the product comes from a generator with a seed and a name.

A stream depends on its names alone, never on how many draws another stream has made, on dict order, on worker
count or on the order in which clients run.
"""

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive_seed(seed: int, *names: object) -> int:
    """Derive a 63-bit seed from a root seed and the names of a stream.

    Args:
        seed: root seed of the run.
        names: what the stream is for, for instance ``("client", "beauty", "round", 3)``.

    Returns:
        An integer in ``[0, 2**63)``.
    """
    text = "\x1f".join([str(int(seed)), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_generator(seed: int, *names: object) -> torch.Generator:
    """A CPU :class:`torch.Generator` for the named stream."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))


def numpy_generator(seed: int, *names: object) -> np.random.Generator:
    """A NumPy generator (PCG64) for the named stream."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *names)))


@contextmanager
def seeded(seed: int, *names: object) -> Iterator[None]:
    """Run a block with torch's global streams set to the named one and restore their former states afterwards."""
    # All devices: manual_seed reaches every CUDA generator, and what is not forked would not be restored.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, *names))
        yield


def follow_seed(module: Any, seed: int) -> None:
    """Give a module that is not bound yet a run's seed for its named streams: item tables, negatives, gate noise."""
    if hasattr(module, "seed"):
        module.seed = seed


def drawn_again(module: Any, seed: int, *names: object) -> Any:
    """A module of the same settings whose first weights are of a named stream, whatever was drawn before it was made.

    Args:
        module: a LightningModule that is not bound or trained, with all its settings in ``hparams``.
        seed: root seed of the run.
        names: of the stream.
    """
    from lightning.pytorch.cli import instantiate_module

    # What a class above it was given by its own constructor stands in `hparams` too, under names that it does not take.
    taken = inspect.signature(type(module).__init__).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    settings = {
        name: value
        for name, value in module.hparams.items()
        if (passes_on or name in taken) and not name.startswith("_")
    }
    with seeded(seed, *names):
        return instantiate_module(type(module), settings)


def step_of(module: Any) -> tuple[int, ...]:
    """Names of the training step at work, for a stream that is drawn from anew in each.

    The optimiser's step; where gradients are accumulated over several batches, the number of the batch besides, since all
    batches of a step have the same number of the step.

    Args:
        module: a LightningModule, in training or, without a trainer, at step 0.
    """
    try:
        trainer = module.trainer
    except RuntimeError:  # not attached to one
        return (int(module.global_step),)
    step = int(trainer.global_step)
    return (step,) if trainer.accumulate_grad_batches == 1 else (step, int(trainer.fit_loop.total_batch_idx))


def own_step_of(module: Any) -> tuple[int, ...]:
    """As :func:`step_of`, for what is drawn row by row: each process of a distributed training has rows of its own."""
    names = step_of(module)
    try:
        trainer = module.trainer
    except RuntimeError:
        return names
    return (*names, int(trainer.global_rank)) if trainer.world_size > 1 else names
