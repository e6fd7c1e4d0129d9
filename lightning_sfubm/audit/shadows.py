"""Shadow models: teachers trained as a client trains its own, on users the audit knows."""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_sfubm.audit.subjects import Subjects, sequence_losses
from lightning_sfubm.callbacks.differential_privacy import DifferentialPrivacy
from lightning_sfubm.federated.client import Client
from lightning_sfubm.federated.trainer import FederatedTrainer
from lightning_sfubm.privacy.attacks import complementary_halves
from lightning_sfubm.seeds import derive_seed


def shadow_losses(
    trainer: FederatedTrainer,
    client: Client,
    initial: Mapping[str, Tensor],
    who: Subjects,
    *,
    count: int,
    epochs: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Losses of the subjects under models trained on random halves of the domain's users.

    The shadows share what the attacker knows: the initial weights, the catalogue, the global view, every setting of the
    training, the noise and delta of differential privacy among them, but not its budget: on fewer users the same noise spends
    more. They train alone, without the other clients.

    Args:
        trainer: of the audited run; its trainers are made with the callbacks of what leaves a client.
        client: holds the module as the audited update was made with.
        initial: shared weights that training starts from.
        who: users whose losses are wanted.
        count: models, even.
        epochs: of the audited client's rounds together.
        seed: of halves and training.

    Returns:
        Losses (count, U) and whom each model was trained on (count, U) bool.

    Raises:
        ConfigError: half of the users are fewer than the expected batch of differential privacy.
        PrivacyError: its delta is no promise for half of the users, or its accounting fails.
    """
    data = client.datamodule
    halves = complementary_halves(count, data.domain.num_users, seed)  # type: ignore[attr-defined]
    losses = []
    for number, half in enumerate(halves):
        module = copy.deepcopy(client.module)
        module.load_shared_state(dict(initial))  # type: ignore[operator]
        module.set_phase(module.round_phase)  # type: ignore[operator]
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "shadow", client.name, number))
            shadow = trainer.make_trainer(
                label=f"shadow {number + 1}/{count}, {client.name}",
                max_epochs=epochs,
                folder=Path(folder),
                shares=True,
                limit_val_batches=0,
            )
            for callback in shadow.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, DifferentialPrivacy):
                    callback.without_budget(data)
            shadow.fit(module, datamodule=data.trained_by(half.numpy()))  # type: ignore[attr-defined]
        losses.append(sequence_losses(module.teacher, who))  # type: ignore[arg-type]
    return torch.stack(losses), halves[:, torch.from_numpy(who.users)]
