"""What an encoder was made with, read from the encoder itself: a checkpoint stores no more of it to build it again."""

from typing import Any

from jsonargparse import ArgumentParser
from torch import nn

from lightning_sfubm.errors import ConfigError


def constructor_arguments(module: nn.Module) -> dict[str, Any]:
    """Arguments that build the module again, from its attributes of the same names.

    Args:
        module: an encoder.

    Raises:
        ConfigError: an argument has no such attribute, so that its default would take its place, or a module has its name.
    """
    cls = type(module)
    # The parser that builds it again also knows what ``**kwargs`` hands on to a base class.
    names = ArgumentParser(exit_on_error=False).add_class_arguments(cls, fail_untyped=False)
    for name in names:
        if not hasattr(module, name) or isinstance(getattr(module, name), nn.Module):
            raise ConfigError(
                f"{cls.__name__} does not keep the value of its constructor argument '{name}', with which a checkpoint builds "
                "it again: keep it, a plain value, as an attribute of that name"
            )
    return {name: getattr(module, name) for name in names}
