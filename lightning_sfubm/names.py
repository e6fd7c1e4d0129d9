"""Names that become parts of paths: of domains, silos, and the pairs and runs of a grid."""

from lightning_sfubm.errors import ConfigError

_MAX_BYTES = 128  #: file names end at 255, and a name gets endings such as ", all users" and ".parquet"


def path_part(name: object, where: str) -> str:
    """The name, if a folder or file can be called so and lies where it is put, and if messages can carry it.

    A name that two people read alike but that differs by a space or a joiner would be another client:
    :func:`~lightning_sfubm.federated.messages.unpack` takes printable ones alone.

    Args:
        name: as it was read.
        where: what the name is of, and where it was read, for the error.

    Raises:
        ConfigError: it is no text, empty or too long, would lead elsewhere (``..``, ``a/b``), or holds what is not printed:
            control and zero-width characters, and spaces other than the plain one.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{where}: the name {name!r} is no text; write it in quotes")
    fits = 0 < len(name.encode("utf-8", "replace")) <= _MAX_BYTES and name not in (".", "..")
    if not fits or "/" in name or not name.isprintable():
        raise ConfigError(
            f"{where}: the name {name!r} cannot be a file name or a sender of messages; choose one of 1 to {_MAX_BYTES} bytes "
            "that holds no '/', no control or zero-width character and no space but the plain one, and is neither '.' nor '..'"
        )
    return name
