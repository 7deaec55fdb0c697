"""A board's first contact: it makes its keys, proves its claim, and gets its certificate (protocol/trust/claims.py).

What it has at the end lies in the state folder: `device.key` and `device.pem` for TLS, `key.pem` that signs, the pinned
`coordinator.key`, and last the stamp `enrolled`, which names the device. A power cut before that costs nothing: the same
keys ask again, and get the same answer.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.x509.oid import NameOID
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from edge_client.errors import EnrolmentError, StateError
from protocol.bus import Bus, Connected, Delivery, Disconnected, Publish, Subscribe
from protocol.errors import WireError
from protocol.messages import Name
from protocol.settings import BrokerSettings, SettingsError, beside, load_settings
from protocol.storage.files import lock_folder, make_folder, write_atomic
from protocol.topics import Topics
from protocol.trust.claims import (
    COORDINATOR_KEY,
    STAMP,
    TLS_CERTIFICATE,
    TLS_KEY,
    Claim,
    EnrolAnswer,
    EnrolRequest,
    seal,
    stamp,
    stamped,
    unseal,
)
from protocol.trust.signing import Signer, in_pem
from protocol.trust.succession import newest

log = logging.getLogger(__name__)

AGAIN_S, REQUEST_EXPIRY_S = 5.0, 60


class EnrolmentSettings(BaseModel):
    """The section [enrolment]: the certificate with which a board may ask, and its claim. Neither is needed afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    cert_file: Path
    key_file: Path
    token_file: Path

    @field_validator("cert_file", "key_file", "token_file")
    @classmethod
    def _relative_to_the_file(cls, path: Path, info: ValidationInfo) -> Path:
        return Path(beside(str(path), info))


class NewcomerConfig(BaseModel):
    """What a board needs to know of its settings before it has a name; the rest is read once it takes part."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    federation: Name
    state: Path
    coordinator_key: str | None = None
    broker: BrokerSettings
    enrolment: EnrolmentSettings

    @field_validator("state")
    @classmethod
    def _relative_to_the_file(cls, state: Path, info: ValidationInfo) -> Path:
        return Path(beside(str(state), info))

    def door(self) -> BrokerSettings:
        """Return how the broker lets in a board that may do nothing but ask."""
        files = {"cert_file": self.enrolment.cert_file, "key_file": self.enrolment.key_file}
        return self.broker.model_copy(update=files)

    def claim(self) -> Claim:
        """Read the claim; raises SettingsError."""
        return Claim.load(self.enrolment.token_file)


def load(path: Path) -> NewcomerConfig:
    """Read a client's TOML as far as enrolment needs it; raises SettingsError."""
    return load_settings(path, NewcomerConfig, "clipcast client init")


def enrolled_id(state: Path) -> str | None:
    """Return the id that this device was given, None if it has none yet; raises StateError."""
    try:
        return stamped((state / STAMP).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StateError(f"{state / STAMP} cannot be read: {error}. Remove it, and enrol this device anew") from error


@contextlib.contextmanager
def locked(state: Path) -> Iterator[None]:
    """Keep other processes out of a state folder: two that enrol at once would make two keys. Raises StateError."""
    try:
        make_folder(state)
        lock = lock_folder(state)
    except BlockingIOError as error:
        raise StateError(f"another clipcast is at work in {state}: wait for it, or stop it") from error
    except OSError as error:
        raise StateError(f"{state} cannot be written: {error}") from error
    with lock:
        yield


class Newcomer:
    """A board that asks for its certificate, with keys that it keeps. Raises StateError, KeyFileError."""

    def __init__(self, federation: str, claim: Claim, state: Path, coordinator_key: str | None = None) -> None:
        """With a `coordinator_key` only the coordinator who has it is believed, as well as the claim."""
        self.topics = Topics(federation)
        self.nonce = secrets.token_hex(16)
        self._claim = claim
        self._state = state
        self._expected = coordinator_key
        try:
            make_folder(state)
            self._key = _tls_key(state / TLS_KEY)
        except OSError as error:
            raise StateError(f"{state} cannot be written: {error}") from error
        self._public = Signer.open(state).public

    def request(self) -> Publish:
        """Return the request; it may be said again."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self._claim.id)])
        asked = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(self._key, hashes.SHA256())
        text = asked.public_bytes(serialization.Encoding.PEM).decode()
        federation, nonce = self.topics.federation, self.nonce
        request = EnrolRequest(federation=federation, id=self._claim.id, nonce=nonce, csr=text, key=self._public)
        said = seal(request, self._claim.proof)
        return Publish(self.topics.enrolment(nonce, "request"), said, expiry_s=REQUEST_EXPIRY_S)

    def answered(self, token: bytes) -> None:
        """Keep what an answer brings, the stamp last; raises WireError for none of ours, EnrolmentError for a refusal."""
        answer = unseal(token, self._claim.proof, EnrolAnswer, self.topics.federation, self.nonce)
        if answer.certificate is None or answer.coordinator_key is None:
            raise EnrolmentError(f"the coordinator refuses: {answer.refused}")
        expected, chain = self._expected, (answer.succession or "").encode()
        if expected is not None and newest(chain, self.topics.federation, expected) != answer.coordinator_key:
            raise EnrolmentError(
                f"the coordinator who answers has the key {answer.coordinator_key}, and `coordinator_key` in the settings "
                f"is another: correct it, or remove it to trust the claim alone"
            )
        certificate = x509.load_pem_x509_certificate(answer.certificate.encode())
        (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        kept = _tls_key(self._state / TLS_KEY)
        if certificate.public_key() != kept.public_key() or name.value != self._claim.id:
            raise EnrolmentError("the certificate is for another key or name than this board's: see the coordinator's log")
        try:
            write_atomic(self._state / TLS_CERTIFICATE, answer.certificate.encode())
            write_atomic(self._state / COORDINATOR_KEY, answer.coordinator_key.encode())
            write_atomic(self._state / STAMP, stamp(self._claim.id))
        except OSError as error:
            raise StateError(f"{self._state} cannot be written: {error}") from error


def enrol(bus: Bus, newcomer: Newcomer, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
    """Ask until answered; raises EnrolmentError after `patience_s` seconds, or if refused."""
    deadline, due, connected = clock() + patience_s, 0.0, False
    answers = newcomer.topics.enrolment(newcomer.nonce, "answer")
    while (now := clock()) < deadline:
        if connected and now >= due:
            bus.do(newcomer.request())
            due = now + AGAIN_S
        match bus.receive(min(AGAIN_S, deadline - now)):
            case Connected():
                bus.do(Subscribe(answers))
                connected, due = True, 0.0
            case Disconnected():
                connected = False
            case Delivery(topic=topic, payload=payload) if topic == answers:
                try:
                    newcomer.answered(payload)
                except WireError as error:
                    log.warning("an answer that is not the coordinator's: %s", error)
                else:
                    return
    raise EnrolmentError(
        f"no answer within {patience_s:g} s. Does the coordinator run with `authority` in its settings, or `clipcast device "
        f"admit`? Its log says why it answers nobody: a token that is unknown, void or of another federation"
    )


def _tls_key(path: Path) -> EllipticCurvePrivateKey:
    """Read this board's TLS key, or make it, readable by its owner alone; raises OSError, SettingsError."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except FileNotFoundError:
        made = generate_private_key(SECP256R1())
        write_atomic(path, in_pem(made))
        return made
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{path} cannot be read as a key: {error}. Remove it: enrolment makes another") from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise SettingsError(f"{path} is no ECDSA key. Remove it: enrolment makes another")
    return key
