"""Who says so: Ed25519 keys, JSON Web Signatures (RFC 7515, RFC 8037) over the exact bytes of a manifest, rising sequences.

A token is `header.payload.signature`, each base64url. The header is `{"alg":"EdDSA","kid":KEY}`; KEY is the signer's public
key, 32 bytes in base64url: whoever reads it knows at once whether it is one that counts.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
import secrets
from pathlib import Path
from typing import Protocol, TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from jwt.api_jws import PyJWS
from jwt.exceptions import PyJWTError

from protocol.envelope import MAX_MANIFEST, Envelope, encode
from protocol.errors import KeyFileError, Refused
from protocol.messages import Manifest
from protocol.storage.files import write_atomic

log = logging.getLogger(__name__)

ALGORITHM = "EdDSA"
MAX_TOKEN = (MAX_MANIFEST + 2) // 3 * 4 + 512
KEY_BYTES = 32
RESERVED = 100_000

PrivateKey = TypeVar("PrivateKey", Ed25519PrivateKey, X25519PrivateKey)

_jws = PyJWS(algorithms=[ALGORITHM])


class Sequence(Protocol):
    """Numbers that rise, also over restarts."""

    def next(self) -> int:
        """Return the next number."""


class MemorySequence:
    """A sequence of a process that keeps no state."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        """Return the next number."""
        self._last += 1
        return self._last


class FileSequence:
    """A sequence in a file. It holds how far numbers are reserved, so that very many cost one write.

    They are reserved far ahead: a disk that takes nothing for an hour silences nobody, not even a coordinator with a
    thousand clients, and a restart may leave a gap.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reserved = self._last = self._read()

    def next(self) -> int:
        """Return the next number; raises KeyFileError if it cannot be kept: a number must never be used twice."""
        if self._last + RESERVED // 2 >= self._reserved:
            try:
                self.reserve()
            except KeyFileError as error:
                if self._last >= self._reserved:
                    raise
                log.warning("%s; %d more numbers are in hand", error, self._reserved - self._last)
        self._last += 1
        return self._last

    def reserve(self) -> None:
        """Reserve the next numbers; raises KeyFileError."""
        try:
            write_atomic(self._path, str(self._reserved + RESERVED).encode())
        except OSError as error:
            raise KeyFileError(f"{self._path} cannot be written: {error}. Make room there") from error
        self._reserved += RESERVED

    def _read(self) -> int:
        try:
            return int(self._path.read_text(encoding="ascii"))
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            raise KeyFileError(
                f"{self._path} cannot be read as a number: {error}. Restore it; without it the other side takes what is "
                f"said from here as old"
            ) from error


class Signer:
    """One sender's key and sequence."""

    def __init__(self, key: Ed25519PrivateKey | None = None, sequence: Sequence | None = None) -> None:
        self._key = Ed25519PrivateKey.generate() if key is None else key
        self._sequence = MemorySequence() if sequence is None else sequence
        self._instance = secrets.token_hex(8)
        self.public = key_text(self._key.public_key())

    @classmethod
    def open(cls, folder: Path) -> Signer:
        """Read key and sequence from a folder; the key is made if there is none. Raises KeyFileError."""
        sequence = FileSequence(folder / "sequence")
        sequence.reserve()  # now, when somebody is told if it cannot be
        return cls(private_key(folder / "key.pem"), sequence)

    def seal(self, federation: str, sender: str, manifest: Manifest, to: str | None = None) -> bytes:
        """Return a manifest, for all or `to` one client, as the signed bytes that travel; raises WireError if too long."""
        data = encode(Envelope(federation, sender, manifest, self._sequence.next(), self._instance, to))
        return _jws.encode(data, self._key, ALGORITHM, {"kid": self.public, "typ": None}).encode()


def signer_of(token: bytes) -> str:
    """Return the key that a token says it is signed with; raises Refused. Nothing is proven yet."""
    parts = token.split(b".", 3)
    if len(parts) != 3 or not all(map(_is_canonical, parts)):
        raise Refused("not-signed", "not a signed manifest: base64url has one spelling for its bytes, and this is another")
    try:
        header = _jws.get_unverified_header(token)
    except (PyJWTError, ValueError, RecursionError) as error:
        raise Refused("not-signed", f"not a signed manifest: {error}") from error
    key = header.get("kid")
    if header.get("alg") != ALGORITHM or not isinstance(key, str) or header.keys() != {"alg", "kid"}:
        raise Refused("not-signed", f"a manifest that is not signed with {ALGORITHM} and a key")
    try:
        key_bytes(key)  # it goes into logs and notices, and into commands that they propose
    except ValueError as error:
        raise Refused("not-signed", f"a manifest that names no key: {error}") from error
    return key


def opened(token: bytes, key: str) -> bytes:
    """Return the bytes that `key` has signed; raises Refused if it has not."""
    try:
        payload = _jws.decode_complete(token, public_key(key), [ALGORITHM])["payload"]
    except (PyJWTError, ValueError) as error:
        raise Refused("bad-signature", f"the signature is not by {key[:12]}: {error}") from error
    return bytes(payload)


def _is_canonical(part: bytes) -> bool:
    """Whether these are the very characters that encode some bytes: a token has one form, and no bit to spare."""
    try:
        data = base64.b64decode(part + b"=" * (-len(part) % 4), b"-_", validate=True)
    except ValueError:
        return False
    return base64.urlsafe_b64encode(data).rstrip(b"=") == part


def public_key(text: str) -> Ed25519PublicKey:
    """Read a public key as it is written in settings and tokens; raises ValueError."""
    return Ed25519PublicKey.from_public_bytes(key_bytes(text))


def key_bytes(text: str) -> bytes:
    """Return the 32 bytes of a public key from its text; raises ValueError."""
    try:
        data = base64.b64decode(text + "=", b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{text[:64]!r} is not a key in base64url") from error
    if len(data) != KEY_BYTES or key_bytes_text(data) != text:
        raise ValueError(f"{text[:64]!r} is not a key of {KEY_BYTES} bytes in base64url")
    return data


def key_text(key: Ed25519PublicKey) -> str:
    """Return a public key as it is written in settings and tokens: 43 characters."""
    return key_bytes_text(key.public_bytes_raw())


def key_bytes_text(data: bytes) -> str:
    """Return bytes in base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def private_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key that signs, or make it; raises KeyFileError."""
    return key_file(path, Ed25519PrivateKey)  # type: ignore[type-abstract]


def public_key_of(folder: Path) -> str:
    """Return the public key of who keeps its state in a folder; the key is made if there is none. Raises KeyFileError."""
    return key_text(private_key(folder / "key.pem").public_key())


def new_key(path: Path) -> Ed25519PrivateKey:
    """Write a new private key that signs in the place of the one there may be; raises KeyFileError."""
    return _write_key(path, Ed25519PrivateKey.generate())


def in_pem(key: Ed25519PrivateKey | X25519PrivateKey | EllipticCurvePrivateKey) -> bytes:
    """Return a private key as its file holds it: PKCS 8 in PEM, not encrypted."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _write_key(path: Path, made: PrivateKey) -> PrivateKey:
    try:
        write_atomic(path, in_pem(made))  # mkstemp makes it 0600
    except OSError as error:
        raise KeyFileError(f"{path} cannot be written: {error}") from error
    return made


def key_file(path: Path, kind: type[PrivateKey]) -> PrivateKey:
    """Read a private key (PEM, PKCS 8), or make it, readable by its owner alone; raises KeyFileError."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except FileNotFoundError:
        return _write_key(path, kind.generate())
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"{path} cannot be read as a key: {error}. Restore it from a backup") from error
    if not isinstance(key, kind):
        raise KeyFileError(f"{path} holds another kind of key than {kind.__name__.removesuffix('PrivateKey')}")
    with contextlib.suppress(OSError):
        path.chmod(0o600)
    return key
