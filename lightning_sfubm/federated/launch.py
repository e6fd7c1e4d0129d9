"""Run a function in every process of a trainer's strategy."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.ranks import close_at_exit, is_first

T = TypeVar("T")


def run_together(trainer: L.Trainer, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function in all processes of the trainer's strategy, which are started here where Lightning starts them.

    From then on each knows its rank, so that the first alone writes files. Called within itself it only calls.

    Returns:
        What the function returned in this process.

    Raises:
        ConfigError: the strategy sends what it runs to new processes instead of starting the program again, or divides
            a model among them.
    """
    strategy = trainer.strategy
    if isinstance(strategy, (ModelParallelStrategy, FSDPStrategy)):
        raise ConfigError(
            f"trainer.strategy: {type(strategy).__name__} divides a model among processes, which serves a fit of "
            "the LLM head alone: set it to ddp_find_unused_parameters_true for a federated run or an experiment"
        )
    if trainer.world_size == 1 or strategy.launcher is None:
        return function(*args, **kwargs)
    if not isinstance(strategy.launcher, _SubprocessScriptLauncher):
        raise ConfigError(
            f"trainer.strategy: {type(strategy).__name__} starts processes that do not run this program from its "
            "beginning, as a federated run needs: set it to ddp_find_unused_parameters_true"
        )
    return strategy.launcher.launch(  # type: ignore[no-any-return]
        _as_one_rank, strategy, function, *args, trainer=trainer, **kwargs
    )


def _as_one_rank(strategy: Strategy, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    strategy.setup_environment()
    close_at_exit()
    if not is_first():
        logging.getLogger("lightning_sfubm").setLevel(logging.ERROR)  # the first process says it
    return function(*args, **kwargs)
