"""What differential privacy over users refuses of a trainer and of training data, before anything is trained."""

import numpy as np
from lightning.pytorch import Trainer
from torch.utils.data import Dataset

from lightning_sfubm.datamodules.sequences import TrainSequences
from lightning_sfubm.errors import ConfigError, PrivacyError


def check_trainer(trainer: Trainer) -> None:
    """Refuse settings under which the optimiser would see something else than one private gradient a step.

    Raises:
        ConfigError: naming the setting.
    """
    if trainer.world_size > 1:
        raise ConfigError("DifferentialPrivacy runs a client in one process: set trainer.devices and num_nodes to 1")
    if trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            "accumulate_grad_batches does not go together with DifferentialPrivacy: raise expected_batch_size"
        )
    if str(trainer.precision) not in ("32-true", "bf16-mixed", "64-true"):
        raise ConfigError(
            f"precision {trainer.precision} rescales or rounds gradients, so that a bound on them does not hold: "
            "DifferentialPrivacy needs 32-true or bf16-mixed"
        )


def checked_rows(rows: Dataset, delta: float) -> TrainSequences:
    """Training rows, one a user, for whose number delta is a promise.

    Args:
        rows: of the training loader.
        delta: of the guarantee.

    Raises:
        PrivacyError: there are several rows a user, or delta would allow to publish one of them.
    """
    if not isinstance(rows, TrainSequences) or len(np.unique(rows.users)) < len(rows):
        raise PrivacyError(
            "user-level privacy needs one training row a user: set the windows of every domain to 'last' "
            "(--data.init_args.domains.NAME.init_args.windows last)"
        )
    if delta * len(rows) >= 1:
        raise PrivacyError(
            f"delta = {delta:g} with {len(rows)} users would allow to publish one of them: set it below {1 / len(rows):.1g}"
        )
    return rows
