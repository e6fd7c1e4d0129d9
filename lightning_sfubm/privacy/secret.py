"""A client's own secret: what keys its noise where the run's seed is known to others."""

import os
import secrets
from pathlib import Path

from lightning_sfubm.errors import PrivacyError
from lightning_sfubm.evaluation.results import flush
from lightning_sfubm.names import path_part

_BYTES = 32


def secret_path(folder: str | Path, client: str) -> Path:
    """``<folder>/<client>.key``.

    Raises:
        ConfigError: the client's name is no file name.
    """
    return Path(folder) / f"{path_part(client, 'secret_dir, client')}.key"


def client_secret(folder: str | Path, client: str) -> bytes:
    """Read ``<folder>/<client>.key``, made at first use with 32 random bytes and mode 600.

    Args:
        folder: a folder of the client's that nobody else can read.
        client: name of the client.

    Returns:
        The secret.

    Raises:
        ConfigError: the client's name is no file name.
        PrivacyError: the file is too short to be a secret.
    """
    path = secret_path(folder, client)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        # Written under another name and then linked: two processes that come at once end with one whole secret.
        temporary = path.with_name(f".{client}.{secrets.token_hex(8)}.tmp")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(temporary, path)
        temporary.unlink(missing_ok=True)
        flush(path.parent)  # a secret that a power cut takes back would be another one afterwards
    secret = path.read_bytes()
    if len(secret) < _BYTES // 2:
        raise PrivacyError(f"{path}: the secret has {len(secret)} bytes, at least {_BYTES // 2} are needed: delete it")
    return secret
