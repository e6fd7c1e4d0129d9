"""Names that become parts of paths: of domains, silos, and the pairs and runs of a grid."""

from lightning_sfubm.errors import ConfigError

_MAX_BYTES = 128  #: file names end at 255, and a name gets endings such as ", all users" and ".parquet"


def path_part(name: object, where: str) -> str:
    """The name, if a folder or file can be called so and lies where it is put.

    Args:
        name: as it was read.
        where: what the name is of, and where it was read, for the error.

    Raises:
        ConfigError: it is no text, empty or too long, would lead elsewhere (``..``, ``a/b``), no file can be called so, or it
            has characters that nobody sees.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{where}: the name {name!r} is no text; write it in quotes")
    fits = 0 < len(name.encode("utf-8", "replace")) <= _MAX_BYTES and name not in (".", "..")
    if not fits or "/" in name or not name.isprintable():  # messages of a federation are refused for the same
        raise ConfigError(
            f"{where}: the name {name!r} cannot be a file name, and files are called by it; choose one of 1 to {_MAX_BYTES} "
            "bytes that holds no '/' and no unprintable character (a no-break space is one) and is neither '.' nor '..'"
        )
    return name
