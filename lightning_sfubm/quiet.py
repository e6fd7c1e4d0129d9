"""Lightning's notices where they would come once for every client and round."""

import logging
import warnings

#: Expected here: the branch that a phase does not train stands in eval mode; batches are made in memory, without
#: workers; a small silo has fewer batches than a logging interval;
#: PEFT and Lightning use names their own dependencies deprecate; a resumed run finds its folders.
_EXPECTED = (
    ".*in eval mode at the start of training.*",
    ".*does not have many workers.*",
    ".*logging interval.*",
    ".*LeafSpec.*",
    ".*is_gradient_checkpointing.*",
    ".*exists and is not empty.*",
    "Your `IterableDataset` has `__len__` defined.*",  # whole batches are sampled, so Lightning takes it for one
)


#: On the command line besides: what Lightning says of software that is not installed and of its own use of others.
_NOISE = (
    ".*LeafSpec.*",
    ".*`tensorboardX` has been removed as a dependency.*",
    "Couldn't infer the batch indices fetched from your dataloader.*",  # the writer of predictions needs none
)
#: of interest to a fit that goes on, which forgets the best value then
_NOISE_UNLESS_FITTING = ".*The dirpath has changed from.*"
_TIPS = ("\N{ELECTRIC LIGHT BULB} Tip:", "TPU available: False")


def quiet_command_line(fitting: bool) -> None:
    """Hold back notices of Lightning that no user of the command line can act on.

    Args:
        fitting: whether the command trains.
    """
    for message in _NOISE if fitting else (*_NOISE, _NOISE_UNLESS_FITTING):
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_TIPS)


def quiet_lightning() -> None:
    """Hold back notices on devices, tips and what is expected: a federated run makes a trainer per client and round."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message=message)
