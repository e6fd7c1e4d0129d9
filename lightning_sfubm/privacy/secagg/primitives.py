"""The cryptography of secure aggregation, all of it from the ``cryptography`` package, imported when first used.

X25519 agrees on secrets between two clients, HKDF-SHA256 turns them into keys bound to the round's roster and to one
purpose, ChaCha20-Poly1305 seals shares, and ChaCha20 expands a key into a mask.
"""

import hashlib
import secrets
from typing import Any

import numpy as np

from lightning_sfubm.errors import ConfigError, MessageError
from lightning_sfubm.privacy.secagg.encoding import Words

KEY_BYTES = 32
_NONCE_BYTES = 12
SEAL_BYTES = _NONCE_BYTES + 16  # what sealing adds: the nonce and the authentication tag


def require_cryptography() -> None:
    """Raise :class:`ConfigError` where the optional package is missing."""
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise ConfigError(
            "secure aggregation needs the package 'cryptography': pip install 'lightning-sfubm[secagg]'"
        ) from None


def label(*parts: str) -> bytes:
    """Strings as bytes that no other list of strings gives."""
    encoded = [part.encode() for part in parts]
    return b"".join(len(part).to_bytes(4, "big") + part for part in encoded)


def clamp(private: bytes) -> bytes:
    """The one form of an X25519 private key with the five bits set that the exchange ignores (RFC 7748, section 5)."""
    return bytes([private[0] & 248, *private[1:31], private[31] & 127 | 64])


def new_private_key() -> bytes:
    """A fresh X25519 private key, clamped, so that an altered copy of it is never as good as the key."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return clamp(X25519PrivateKey.generate().private_bytes_raw())


def public_key(private: bytes) -> bytes:
    """The public half of an X25519 private key."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def derive(secret: bytes, salt: bytes, purpose: bytes) -> bytes:
    """A 32-byte key from a secret (HKDF-SHA256, RFC 5869), for one round (``salt``) and one purpose."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=purpose).derive(secret)


def agree(private: bytes, public: bytes, salt: bytes, purpose: bytes) -> bytes:
    """The key both ends of a pair derive from their own private and the other's public key (RFC 7748).

    Raises:
        MessageError: the public key is a point of small order, which would make the secret known to everyone.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise MessageError("a public key of the roster is not a usable X25519 key") from None
    return derive(shared, salt, purpose)


def commitment(seed: bytes, salt: bytes) -> bytes:
    """A hash that fixes a random 32-byte seed without telling it."""
    return hashlib.sha256(label("sfubm secagg self-mask commitment") + salt + seed).digest()


def seal(key: bytes, data: bytes, context: bytes) -> bytes:
    """Encrypt and authenticate (ChaCha20-Poly1305, RFC 8439) ``data`` and authenticate ``context``."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, data, context)


def open_sealed(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """The inverse of :func:`seal`.

    Raises:
        MessageError: the ciphertext was altered or made for another pair, direction or round.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
    except InvalidTag:
        raise MessageError("a sealed share was altered on its way or made for another client or round") from None


def mask(key: bytes, words: int, dtype: np.dtype[Any]) -> Words:
    """``words`` pseudo-random words: the ChaCha20 key stream under ``key``, read as little-endian integers.

    Nonce and counter start at zero: a key is derived for one mask of one round and never used again.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(words * dtype.itemsize))
    return np.frombuffer(stream, dtype=dtype)
