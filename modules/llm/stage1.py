"""Stage 1 from a checkpoint, for a stage-2 module that was given a path."""

from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_sfubm.contracts import Catalogue, Stage1
from lightning_sfubm.errors import CheckpointError, ConfigError
from lightning_sfubm.safe_load import load_checkpoint

#: class name noted in a checkpoint -> module; a name from a file is never imported as it stands
KNOWN = {
    "SequentialRecommender": "lightning_sfubm.modules.sequential",
    "FKDDistiller": "lightning_sfubm.modules.fkd",
}


def load_stage1(path: str | Path, catalogue: Catalogue) -> Stage1:
    """Load a trained stage-1 module, bound to its domain, in evaluation mode.

    An LLM learns to trust what it is given: tuned on positions that trained its stage 1, it would trust it too much. So
    the checkpoint has to say that it was trained on the positions that the catalogue's domain leaves to stage 1. Nothing
    is compared where the catalogue does not say where it is from.

    Args:
        path: checkpoint written while training a :class:`SequentialRecommender` or an :class:`FKDDistiller`.
        catalogue: of the domain it was trained on.

    Raises:
        CheckpointError: if the file is missing, torn, unsafe or of another kind, was trained on other data or on other
            positions, or has a student that was not trained.
    """
    content = load_checkpoint(path)
    try:
        name = str(content["stage1_shapes"]["module"])
    except (KeyError, TypeError):
        raise CheckpointError(f"{path} is not a checkpoint of a stage-1 module (no entry 'stage1_shapes')") from None
    if name not in KNOWN:
        raise CheckpointError(
            f"{path} holds a '{name}'; stage 2 can load {sorted(KNOWN)}, or attach any stage 1 in code"
        )
    _check_origin(path, content, catalogue)
    module = getattr(import_module(KNOWN[name]), name).load_from_checkpoint(path, map_location="cpu", weights_only=True)
    if not bool(getattr(module, "student_started", True)):
        raise CheckpointError(
            f"{path} holds a {name} whose student has not been trained, and the LLM would be given its untrained tables: give "
            "a checkpoint of its phase 'student'"
        )
    module.bind(catalogue)
    return module.eval()


def _check_origin(path: str | Path, content: dict[str, Any], catalogue: Catalogue) -> None:
    """Refuse a stage 1 of another domain, or one that may know the positions an LLM is to learn from."""
    wanted = catalogue.origin
    if wanted is None:
        return
    # under the data module's class name, which may be that of a sub-class
    found = next((v for v in content.values() if isinstance(v, dict) and "fingerprint" in v), {})
    name, remedy = catalogue.name, "train stage 1 again with --data.init_args.stage2_positions 1"
    if found.get("fingerprint", wanted["fingerprint"]) != wanted["fingerprint"]:
        raise CheckpointError(
            f"{path}: this stage 1 was trained on other data than domain '{name}' holds (fingerprint "
            f"{str(found['fingerprint'])[:12]} there, {wanted['fingerprint'][:12]} here); give one of this domain, trained "
            "with the same data settings"
        )
    if "train_positions" not in found:
        raise CheckpointError(
            f"{path}: does not say which positions of domain '{name}' trained it, so it may know those the LLM learns "
            f"from (it is of an earlier version, was trained without the data module, or went on from other data "
            f"settings); {remedy}"
        )
    if found["train_positions"] != wanted["train_positions"]:
        raise CheckpointError(
            f"{path}: this stage 1 was trained on other positions of domain '{name}' than are left to stage 1 here, so it "
            f"may know those the LLM learns from; {remedy}, or as many as here, and the same stage2_users, train_users and seed"
        )


def check_same_catalogue(attached: Catalogue, datamodule: Any) -> None:
    """Refuse to run a module that was attached to one domain on the data of another: its tables are the first one's.

    Raises:
        ConfigError: name, number of items or titles differ. A data module without a catalogue is not compared.
    """
    given = getattr(datamodule, "catalogue", None)
    if given is None or given is attached:
        return
    for what in ("name", "num_items", "titles"):
        if getattr(given, what) != getattr(attached, what):
            raise ConfigError(
                f"the module was attached to domain '{attached.name}' with {attached.num_items} items, the datamodule holds "
                f"'{given.name}' with {given.num_items} ({what} differs); call attach_stage1() with this domain's stage 1 "
                "and catalogue first"
            )
