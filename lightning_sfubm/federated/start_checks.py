"""What a federated run is refused for before it clears the place of an earlier one: all that its first fits would refuse."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from lightning_sfubm.errors import ConfigError
from lightning_sfubm.federated.client import Client
from lightning_sfubm.modules.stage1 import CatalogueModule

_OURS = ("lightning_sfubm.", "lightning.")


def check_flags(flags: Mapping[str, Any]) -> None:
    """Refuse flags of the trainer that no training of a federated run can have.

    Args:
        flags: keyword arguments of :class:`lightning.Trainer`.

    Raises:
        ConfigError: naming the flag.
    """
    if flags.get("barebones"):
        raise ConfigError(
            "trainer.barebones leaves out the validation and the checkpoints by which a federated run chooses epochs: remove it"
        )
    if flags.get("overfit_batches"):
        raise ConfigError(
            "trainer.overfit_batches replaces the sampler that makes the batches: set trainer.limit_train_batches instead"
        )


def check_epochs_can_be_chosen(
    trainer: Trainer, clients: Mapping[str, Client], monitor: str, max_epochs: int, callbacks: Iterable[Callback]
) -> None:
    """Refuse local phases whose best epoch could not be told.

    Args:
        trainer: with the flags of all trainings.
        clients: of the run.
        monitor: ``federation.monitor``.
        max_epochs: ``federation.local_max_epochs``.
        callbacks: that were configured. Where one is from outside this package, or a model is, it may log metrics that
            are not known here, and the first epoch finds out.

    Raises:
        ConfigError: nothing is trained or validated, or ``monitor`` is none of the metrics.
    """
    callbacks = list(callbacks)
    for client in clients.values():
        if not client.module.local_phases or trainer.fast_dev_run:  # type: ignore[attr-defined]
            continue
        for limit in ("limit_train_batches", "limit_val_batches"):
            if getattr(trainer, limit) == 0:
                raise ConfigError(f"trainer.{limit} is 0, so that no best epoch could be chosen: set it above 0")
        if (trainer.check_val_every_n_epoch or 1) > max_epochs:
            raise ConfigError(
                f"trainer.check_val_every_n_epoch = {trainer.check_val_every_n_epoch} is more than federation.local_max_epochs "
                f"= {max_epochs}, so that no best epoch could be chosen: lower it"
            )
        parts = (client.module, *callbacks)
        if isinstance(client.module, CatalogueModule) and all(type(x).__module__.startswith(_OURS) for x in parts):
            known = client.module.validation_metrics()
            if monitor not in known and not monitor.startswith("train/"):
                raise ConfigError(f"federation.monitor '{monitor}' is none of the metrics: {', '.join(known)}")


def check_text_sizes(clients: Mapping[str, Client]) -> None:
    """Refuse silos that exchange what they know of texts, but read them by encoders of different widths.

    Args:
        clients: of the run.

    Raises:
        ConfigError: naming the widths.
    """
    sizes: dict[int, list[str]] = {}
    for name, client in clients.items():
        vectors = getattr(getattr(client.datamodule, "catalogue", None), "text_embeddings", None)
        if vectors is not None:
            sizes.setdefault(int(vectors.shape[1]), []).append(name)
    if len(sizes) > 1:
        said = ", ".join(f"{' and '.join(names)} of {size} numbers" for size, names in sorted(sizes.items()))
        raise ConfigError(f"text vectors of the domains differ in size ({said}): give all the same text_encoder")
