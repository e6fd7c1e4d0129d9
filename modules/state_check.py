"""Whether a state belongs to a module: the same keys, the same shapes, or one sentence that says what differs."""

from collections.abc import Mapping

from torch import Tensor

from lightning_sfubm.errors import CheckpointError, SFUBMError


def check_state(
    expected: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    name: str,
    error: type[SFUBMError] = CheckpointError,
) -> None:
    """Compare keys and shapes of two state dicts.

    Args:
        expected: state of the module at hand.
        given: state to be loaded.
        name: what the module is called in the message.
        error: class of the error raised.

    Raises:
        SFUBMError: of the class given, naming the first key that is missing, superfluous or of another shape.
    """
    hint = f"it comes from a {name} with other settings"
    for key in sorted(expected.keys() - given.keys()):
        raise error(f"The state lacks {key!r}; {hint}.")
    for key in sorted(given.keys() - expected.keys()):
        raise error(f"The state holds {key!r}, which this {name} does not have; {hint}.")
    for key, tensor in expected.items():
        if tensor.shape != given[key].shape:
            raise error(f"{key!r} has shape {tuple(given[key].shape)}, expected {tuple(tensor.shape)}; {hint}.")
