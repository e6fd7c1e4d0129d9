"""Stage 1 from a checkpoint, for a stage-2 module that was given a path."""

from importlib import import_module
from pathlib import Path

from lightning_sfubm.contracts import Catalogue, Stage1
from lightning_sfubm.errors import CheckpointError
from lightning_sfubm.safe_load import load_checkpoint

#: class name noted in a checkpoint -> module; a name from a file is never imported as it stands
KNOWN = {
    "SequentialRecommender": "lightning_sfubm.modules.sequential",
    "FKDDistiller": "lightning_sfubm.modules.fkd",
}


def load_stage1(path: str | Path, catalogue: Catalogue) -> Stage1:
    """Load a trained stage-1 module, bound to its domain, in evaluation mode.

    Args:
        path: checkpoint written while training a :class:`SequentialRecommender` or an :class:`FKDDistiller`.
        catalogue: of the domain it was trained on.

    Raises:
        CheckpointError: if the file is missing, torn, unsafe or of another kind.
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
    module = getattr(import_module(KNOWN[name]), name).load_from_checkpoint(path, map_location="cpu", weights_only=True)
    module.bind(catalogue)
    return module.eval()
