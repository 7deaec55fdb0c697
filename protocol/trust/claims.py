"""How a board that has nothing but a claim token becomes a device of the federation: two messages, and what proves them.

The operator makes a claim for an id; the board makes its keys and asks for a certificate. Both messages are compact JSON Web
Signatures (RFC 7515, `HS256`; `kid` is the id) with a key that only the claim's two owners can derive: a broker between
them reads public keys, and can neither use the claim for keys of its own nor answer in the coordinator's place.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeVar

from jwt.api_jws import PyJWS
from jwt.exceptions import PyJWTError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.envelope import RESERVED
from protocol.errors import Refused, WireError
from protocol.messages import Name
from protocol.settings import SettingsError
from protocol.topics import NAME
from protocol.trust.succession import MAX_CHAIN

ALGORITHM = "HS256"
SECRET_BYTES = 32
# What enrolment leaves in a device's state folder, besides its signing key; the stamp last.
TLS_KEY, TLS_CERTIFICATE, COORDINATOR_KEY, STAMP = "device.key", "device.pem", "coordinator.key", "enrolled"
MAX_MESSAGE = 48 * 1024  # of which the coordinator's key statements may take half
Nonce = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Pem = Annotated[str, Field(min_length=1, max_length=8192, pattern=r"^-----BEGIN [A-Z ]+-----\n")]
PublicKey = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]

_jws = PyJWS(algorithms=[ALGORITHM])


@dataclass(frozen=True)
class Claim:
    """The right to become the device `id`, once. Its text is `ID.SECRET`, the secret 32 random bytes in base64url."""

    id: str
    secret: str

    @classmethod
    def make(cls, name: str) -> Claim:
        """Draw a new secret."""
        return cls(name, base64.urlsafe_b64encode(secrets.token_bytes(SECRET_BYTES)).rstrip(b"=").decode())

    @classmethod
    def read(cls, text: str) -> Claim:
        """Read a token as it was printed; raises WireError."""
        name, _, secret = text.strip().rpartition(".")
        try:
            whole = len(base64.b64decode(secret + "=", b"-_", validate=True)) == SECRET_BYTES
        except ValueError:
            whole = False
        if not whole or not NAME.match(name) or name in RESERVED:
            raise WireError("this is no claim token, or not a whole one: `clipcast device add ID` prints ID.SECRET")
        return cls(name, secret)

    @classmethod
    def load(cls, path: Path) -> Claim:
        """Read the token in a file; raises SettingsError, which does not repeat what it read."""
        try:
            return cls.read(path.read_text(encoding="ascii"))
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"no claim can be read in {path} ({type(error).__name__}): put there what `clipcast device add ID` prints"
            ) from error
        except WireError as error:
            raise SettingsError(f"{path}: {error}") from error

    def __str__(self) -> str:
        return f"{self.id}.{self.secret}"

    @property
    def proof(self) -> str:
        """Return the key of both messages, in hex; the secret cannot be had from it."""
        return hashlib.sha256(b"clipcast enrolment 1\0" + str(self).encode()).hexdigest()


class EnrolRequest(BaseModel):
    """A board asks to become a device: a certificate request (PKCS 10) for its TLS key, and its key that signs manifests."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    kind: Literal["enrol-request"] = "enrol-request"
    federation: Name
    id: Name
    nonce: Nonce
    csr: Pem
    key: PublicKey


class EnrolAnswer(BaseModel):
    """The answer to one request, by its nonce: the certificate and the coordinator's key, or why there is none.

    `succession` are the statements by which earlier keys lead to that key (trust/succession.py).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    kind: Literal["enrol-answer"] = "enrol-answer"
    federation: Name
    id: Name
    nonce: Nonce
    certificate: Pem | None = None
    coordinator_key: PublicKey | None = None
    succession: Annotated[str, Field(max_length=MAX_CHAIN)] | None = None
    refused: Annotated[str, Field(max_length=500)] = ""

    NEEDS: ClassVar[str] = "a certificate and the coordinator's key, or the reason of a refusal"

    def model_post_init(self, _context: object) -> None:
        """Refuse an answer that says neither yes nor no."""
        granted = self.certificate is not None and self.coordinator_key is not None
        if granted == bool(self.refused):
            raise ValueError(f"an answer holds {self.NEEDS}")


def stamp(name: str) -> bytes:
    """Return the content of the stamp, which names the device."""
    return json.dumps({"id": name}).encode()


def stamped(data: str | bytes) -> str:
    """Return the name in a stamp; raises ValueError, TypeError or KeyError if it is none."""
    return str(json.loads(data)["id"])


Message = TypeVar("Message", EnrolRequest, EnrolAnswer)


def seal(message: EnrolRequest | EnrolAnswer, proof: str) -> bytes:
    """Return a message as the bytes that travel."""
    text = json.dumps(message.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return _jws.encode(text.encode(), bytes.fromhex(proof), ALGORITHM, {"kid": message.id, "typ": None}).encode()


def claimed_id(token: bytes) -> str:
    """Return the id that a message names; raises Refused. Nothing is proven yet."""
    if len(token) > MAX_MESSAGE:
        raise Refused("too-long", f"{len(token)} bytes, a message about enrolment has at most {MAX_MESSAGE}")
    try:
        header = _jws.get_unverified_header(token)
    except (PyJWTError, ValueError, RecursionError) as error:
        raise Refused("not-signed", f"no message about enrolment: {error}") from error
    name = header.get("kid")
    if header.keys() != {"alg", "kid"} or header["alg"] != ALGORITHM or not isinstance(name, str) or not NAME.match(name):
        raise Refused("not-signed", f"a message about enrolment has the algorithm {ALGORITHM} and an id, and no more")
    return name


def unseal(token: bytes, proof: str, schema: type[Message], federation: str, nonce: str) -> Message:
    """Return the message that a claim's owner has signed for this federation and nonce; raises Refused."""
    name = claimed_id(token)
    try:
        payload = _jws.decode_complete(token, bytes.fromhex(proof), [ALGORITHM])["payload"]
    except (PyJWTError, ValueError) as error:
        raise Refused("bad-signature", f"not signed by who has the claim of {name}") from error
    try:
        message = schema.model_validate_json(payload)
    except ValidationError as error:
        raise Refused("malformed", f"not what a message about enrolment holds: {error.errors()[0]['msg']}") from error
    if (message.federation, message.id, message.nonce) != (federation, name, nonce):
        raise Refused("wrong-topic", f"a message of {message.id} in {message.federation}, on a topic of others")
    return message
