"""The processes of a distributed run: how many there are, which one writes files, and where they wait for each other."""

import atexit
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from lightning import LightningDataModule
from lightning.pytorch.strategies import DDPStrategy, Strategy

from lightning_sfubm.errors import SFUBMError


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def num_ranks() -> int:
    """Processes that train together; 1 outside a distributed run."""
    return dist.get_world_size() if _distributed() else 1


def rank() -> int:
    """Number of this process among them, from 0."""
    return dist.get_rank() if _distributed() else 0


def is_first() -> bool:
    """Whether this process writes: files, ledgers and the terminal belong to the first one."""
    return rank() == 0


def wait_for_all() -> None:
    """Return once every process has come here; at once outside a distributed run."""
    if _distributed():
        dist.barrier()


@contextmanager
def refused_by_all() -> Iterator[None]:
    """What one process refuses within, all refuse at its end: the others would wait for it at their next meeting.

    Every process has to come here, and there is no such block within another. Where an earlier process has the same to say,
    the error has the attribute ``said_elsewhere``.
    """
    refused: SFUBMError | None = None
    try:
        yield
    except SFUBMError as error:
        refused = error
    if _distributed():
        everyone: list[SFUBMError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, refused)
        first = next((number for number, error in enumerate(everyone) if error is not None), rank())
        refused = refused or everyone[first]
        if refused is not None and first < rank() and str(refused) == str(everyone[first]):
            refused.said_elsewhere = True  # type: ignore[attr-defined]
    if refused is not None:
        raise refused


def first_prepares(datamodule: LightningDataModule) -> None:
    """Prepare data in the first process, and in the others once it is there: they find what it has stored."""
    with refused_by_all():
        if is_first():
            datamodule.prepare_data()
    if not is_first():
        datamodule.prepare_data()


def needs_every_gradient(strategy: Strategy) -> bool:
    """Whether a step fails where a parameter that asks for a gradient gets none: DDP that does not look for such ones."""
    return isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters")


def close_at_exit() -> None:
    """Take leave of the other processes before the interpreter ends.

    Threads of gloo that are still there when it ends may ask for its lock and abort a program that has done its work
    (https://github.com/pytorch/pytorch/pull/179291). Lightning does the same for NCCL alone.
    """
    if _distributed() and dist.get_backend() == "gloo":
        atexit.unregister(_close)
        atexit.register(_close)


def _close() -> None:
    if _distributed():
        dist.destroy_process_group()
