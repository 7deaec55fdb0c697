"""Updates that only the coordinator can read: HPKE (RFC 9180), one shot, to the key that a signed plan names.

X25519, HKDF-SHA256, ChaCha20-Poly1305: fast without AES instructions. What an update is for is bound in as HPKE's `info`:
moved to another federation, client, run or round, it cannot be opened. Who sent it is for the signed offer to say, which
names the sealed bytes by their hash.
"""

from __future__ import annotations

import json
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from protocol.errors import WireError
from protocol.trust.signing import key_bytes, key_bytes_text, key_file

SEALING_BYTES = 48  # an ephemeral public key before, a tag behind
DOMAIN = "clipcast/1/update"

_suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


def purpose(federation: str, client: str, run: str | None, number: int) -> bytes:
    """Return what an update is for, as bytes that mean nothing else."""
    return json.dumps([DOMAIN, federation, client, run, number]).encode()


def seal(blob: bytes, key: str, info: bytes) -> bytes:
    """Return the blob so that only the owner of the public key `key` reads it: `SEALING_BYTES` longer, never twice the same.

    Raises WireError if that is no key.
    """
    try:
        return bytes(_suite.encrypt(blob, X25519PublicKey.from_public_bytes(key_bytes(key)), info=info))
    except ValueError as error:
        raise WireError(f"the plan's key cannot be sealed to: {error}") from error


class Unsealer:
    """The coordinator's key, and its text for the plan."""

    def __init__(self, key: X25519PrivateKey | None = None) -> None:
        self._key = X25519PrivateKey.generate() if key is None else key
        self.public = key_bytes_text(self._key.public_key().public_bytes_raw())

    @classmethod
    def open(cls, folder: Path) -> Unsealer:
        """Read the key from a folder, or make it; raises KeyFileError."""
        return cls(key_file(folder / "sealing.pem", X25519PrivateKey))  # type: ignore[type-abstract]

    def unseal(self, sealed: bytes, info: bytes) -> bytes:
        """Return the blob; raises WireError if it was not sealed to this key and for this purpose."""
        try:
            return bytes(_suite.decrypt(sealed, self._key, info=info))
        except InvalidTag as error:
            raise WireError("not sealed to the key that the plan names, or for another client, run or round") from error
