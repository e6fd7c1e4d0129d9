"""The same clients without any message: what a federation is compared with."""

import copy
from functools import partial
from pathlib import Path

from lightning.pytorch import LightningModule

from lightning_sfubm.federated.client import Client
from lightning_sfubm.federated.loop import FederatedLoop
from lightning_sfubm.seeds import derive_seed, follow_seed


def train_twins(loop: FederatedLoop, template: LightningModule, run_dir: Path, number: int) -> dict[str, Client]:
    """Clients of the same data, trained alone by the same schedule, so with as many optimiser steps where nobody drops out.

    Clients are drawn for the same rounds as in the run; those that dropped out of a round there train in it here.
    An interrupted training goes on from its folder, ``local`` or ``local-<number>``.

    Args:
        loop: of the federated run.
        template: the stage-1 module, untrained.
        run_dir: of the run.
        number: the first twins have the run's seed, further ones a seed of their own for item tables, adaptors, dropout and
            other draws; their encoders start from the template's weights, and the order of batches is the run's.
    """
    federation = copy.copy(loop.federation)
    federation.exchange = "nothing"
    seed = loop.seed if number == 1 else derive_seed(loop.seed, "local twin", number)
    clients = {}
    template = copy.deepcopy(template)
    if number > 1:
        follow_seed(template, seed)
    local = "local" if number == 1 else f"local-{number}"
    for name, other in loop.clients.items():
        make_trainer = partial(other.make_trainer, client=f"{name}, {local}")  # with curves of its own
        clients[name] = Client(name, copy.deepcopy(template), other.datamodule, make_trainer, seed)
        clients[name].prepare()
    folder = run_dir / local
    twins = FederatedLoop(federation, clients, [], folder, seed, settings=loop.settings)
    twins.participation_seed = loop.participation_seed
    if any(twins.checkpoints.glob("state-*")):
        twins.resume(twins.checkpoints)
    twins.run()
    return clients
