"""Validate, test and predict with the clients of a federated run, also in a process after the one that trained them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L

from lightning_sfubm.errors import CheckpointError
from lightning_sfubm.federated.checkpoint import find_state, load_state
from lightning_sfubm.federated.loop import FederatedLoop
from lightning_sfubm.modules.stage1 import CatalogueModule

MakeTrainer = Callable[..., L.Trainer]


def restore_trained(loop: FederatedLoop, ckpt_path: str | Path) -> None:
    """Give the clients what a finished run has stored.

    Args:
        loop: with clients as built, untrained.
        ckpt_path: ``last`` or a state folder.

    Raises:
        CheckpointError: there is no whole state, or a client has not been through all its phases there.
    """
    state = find_state(loop.states(ckpt_path))
    done = load_state(state, loop.server, loop.clients).get("counters", {}).get("phases", {})
    for name, client in loop.clients.items():
        if missing := [phase for phase in client.module.local_phases if phase not in done.get(name, ())]:
            raise CheckpointError(
                f"{state}: client '{name}' has not been through {missing[-1]} there, so what it ranks by is untrained: "
                "finish the run by fit --ckpt_path last"
            )
        client.finish()


def evaluate_clients(
    stage: str, loop: FederatedLoop, make_trainer: MakeTrainer, verbose: bool
) -> list[dict[str, float]]:
    """Metrics of each client, keys prefixed by its name.

    Args:
        stage: ``"validate"`` or ``"test"``.
        loop: with trained clients.
        make_trainer: see :meth:`~lightning_sfubm.federated.trainer.FederatedTrainer.make_trainer`.
        verbose: print them as a table.
    """
    results = []
    for name, client in loop.clients.items():
        trainer = make_trainer(label=f"{stage}, {name}", max_epochs=1)
        values = getattr(trainer, stage)(client.module, datamodule=client.datamodule, verbose=False)[0]
        results.append({f"{name}/{key}": float(value) for key, value in values.items()})
    if verbose:
        from lightning_sfubm.evaluation.terminal import print_metrics

        print_metrics(stage, results)
    return results


def predict_clients(loop: FederatedLoop, make_trainer: MakeTrainer, top_k: int) -> dict[str, Any]:
    """Recommendations by client.

    Args:
        loop: with trained clients.
        make_trainer: as of :func:`evaluate_clients`.
        top_k: items for each user.
    """
    answers = {}
    for name, client in loop.clients.items():
        set_top_k(client.module, top_k)
        trainer = make_trainer(label=name, max_epochs=1)
        answers[name] = trainer.predict(client.module, datamodule=client.datamodule)
    return answers


def set_top_k(module: Any, top_k: int) -> None:
    """How many items a model of stage 1 recommends; others have no such number."""
    if isinstance(module, CatalogueModule):
        module.top_k = top_k
