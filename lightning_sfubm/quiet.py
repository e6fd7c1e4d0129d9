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


def quiet_lightning() -> None:
    """Hold back notices on devices, tips and what is expected: a federated run makes a trainer per client and round."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message=message)
