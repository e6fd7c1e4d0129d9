"""Checks of settings that modules have in common, made in their constructors: before any data is read."""

from lightning_sfubm.errors import ConfigError


def check_positive(owner: str, **sizes: int | None) -> None:
    """Refuse sizes below 1.

    Args:
        owner: class whose settings they are.
        sizes: by setting; ``None`` is not looked at.

    Raises:
        ConfigError: naming class and setting.
    """
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ConfigError(f"{owner}: {name}={value} must be at least 1.")


def check_dropout(owner: str, **probabilities: float | None) -> None:
    """Refuse dropout probabilities outside [0, 1).

    Args:
        owner: class whose settings they are.
        probabilities: by setting; ``None`` is not looked at.

    Raises:
        ConfigError: naming class and setting.
    """
    for name, value in probabilities.items():
        if value is not None and not 0 <= value < 1:
            raise ConfigError(f"{owner}: {name}={value} must lie in [0, 1).")
