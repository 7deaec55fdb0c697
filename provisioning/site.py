"""What a lab gives to all its boards: the client's settings, the authority's certificate, and the claim certificate.

None of it tells one board from another, so it may be in an image that many boards get. With the claim certificate a board
may do nothing but ask to be enrolled; the claim token, which proves who asks, is one board's own and is added alone.
"""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID
from pydantic import Field, ValidationInfo, field_validator

from protocol.envelope import ENROL
from protocol.errors import WireError
from protocol.settings import Participant, SettingsError, beside, load_settings, settings_of
from protocol.topics import check_name
from protocol.trust.claims import TLS_CERTIFICATE, TLS_KEY
from protocol.trust.signing import key_text, private_key

PACKAGE = "clipcast-client"
ETC, STATE = "etc/clipcast", "/var/lib/clipcast"
TOKEN = f"{ETC}/claim.token"
PICTURES = "/srv/pictures"
PUBLIC, PRIVATE = 0o644, 0o600


@dataclass(frozen=True)
class SiteFile:
    """A file of a board: its path below the root, content and mode."""

    path: str
    data: bytes
    mode: int = PUBLIC


class _Lab(Participant):
    """What of a coordinator's settings concerns its boards."""

    state: Annotated[Path, Field(validate_default=True)] = Path("state")

    @field_validator("state")
    @classmethod
    def _relative_to_the_file(cls, state: Path, info: ValidationInfo) -> Path:
        return Path(beside(str(state), info))


@dataclass(frozen=True)
class Site:
    """A federation as its boards see it. `ca`, `claim` and `claim_key` are PEM; `coordinator_key` is None if not known.

    `data` is the folder of pictures on the boards.
    """

    federation: str
    broker: str
    ca: bytes
    claim: bytes
    claim_key: bytes
    coordinator_key: str | None = None
    data: str = PICTURES
    tls_version: str = "1.3"

    @classmethod
    def read(cls, settings: Path, authority: Path, broker: str | None = None, data: str = PICTURES) -> Site:
        """Read what boards need from a coordinator's settings and its authority's folder; raises SettingsError.

        `broker` is the broker's URL as the boards know it, if it is another than the coordinator's.
        """
        lab = load_settings(settings, _Lab, "clipcast coordinator init")
        url = lab.broker.url if broker is None else broker
        _check_broker(url, settings)
        try:
            check_name(lab.federation, "federation")
        except WireError as error:
            raise SettingsError(f"{settings}: {error}") from error
        if not Path(data).is_absolute():
            raise SettingsError(f"--data {data}: it is a folder on the boards, so write its whole path, as {PICTURES}")
        ca, claim, key = (_pem(authority, name) for name in ("ca.pem", f"{ENROL}.pem", f"{ENROL}.key"))
        _check_claim(authority, ca, claim, key)
        known = lab.state / "key.pem"
        public = key_text(private_key(known).public_key()) if known.exists() else None
        return cls(lab.federation, url, ca, claim, key, public, data, lab.broker.tls_version)

    def settings(self, name: str | None = None) -> str:
        """Return a client's settings; without a name, which it then has from its enrolment."""
        lines = [
            "# From the lab's settings, by `clipcast device`. `clipcast client init --help` says what else may stand here."
        ]
        lines += [f"id = {_quoted(name)}"] if name else []
        lines += [f"federation = {_quoted(self.federation)}", f"data = {_quoted(self.data)}", f"state = {_quoted(STATE)}"]
        lines += [f"coordinator_key = {_quoted(self.coordinator_key)}"] if self.coordinator_key else []
        lines += ["", "[broker]", f"url = {_quoted(self.broker)}", 'ca_file = "ca.pem"']
        lines += [f'cert_file = "{STATE}/{TLS_CERTIFICATE}"', f'key_file = "{STATE}/{TLS_KEY}"']
        lines += [f'tls_version = "{self.tls_version}"'] if self.tls_version != "1.3" else []
        lines += ["", "[enrolment]", f'cert_file = "{ENROL}.pem"', f'key_file = "{ENROL}.key"', 'token_file = "claim.token"']
        return "\n".join(lines) + "\n"

    def files(self, name: str | None = None, token: str | None = None) -> tuple[SiteFile, ...]:
        """Return the files that a board gets; `token` is its own claim, which no other board may have."""
        return (
            SiteFile(f"{ETC}/client.toml", self.settings(name).encode()),
            SiteFile(f"{ETC}/ca.pem", self.ca),
            SiteFile(f"{ETC}/{ENROL}.pem", self.claim),
            SiteFile(f"{ETC}/{ENROL}.key", self.claim_key, PRIVATE),
            *((SiteFile(TOKEN, f"{token}\n".encode(), PRIVATE),) if token else ()),
        )


def _check_broker(url: str, settings: Path) -> None:
    found = settings_of({"federation": "-", "broker": {"url": url}}, Participant).broker
    if _is_this_machine(found.host):
        raise SettingsError(
            f"{settings}: the broker is {url}, which on a board is the board itself: say what the boards call it, with "
            f"`--broker mqtts://HOST`"
        )
    if not found.tls:
        raise SettingsError(
            f"{settings}: the broker is {url}, and boards are enrolled over TLS alone: let it speak TLS "
            f"(`clipcast broker config`), and write mqtts:// there or in `--broker`"
        )


def _is_this_machine(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _pem(authority: Path, name: str) -> bytes:
    try:
        return (authority / name).read_bytes()
    except FileNotFoundError as error:
        cure = f"`clipcast ca init {authority}`" if name == "ca.pem" else f"`clipcast ca issue {ENROL} {authority}`"
        raise SettingsError(f"{authority / name}: no such file. {cure} makes it") from error
    except OSError as error:
        raise SettingsError(f"{authority / name} cannot be read: {error.strerror}") from error


def _check_claim(authority: Path, ca: bytes, claim: bytes, key: bytes) -> None:
    """Raise SettingsError unless it is the claim certificate, by this authority, with its key.

    Another one of the authority's would be let in by the broker as somebody: its key must not go out to all boards.
    """
    where = authority / f"{ENROL}.pem"
    again = f"move it aside, and `clipcast ca issue {ENROL} {authority}`"
    try:
        root, certificate = x509.load_pem_x509_certificate(ca), x509.load_pem_x509_certificate(claim)
        public = load_pem_private_key(key, None).public_key()
        certificate.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise SettingsError(f"{where} and its key cannot be used with {authority / 'ca.pem'} ({error}): {again}") from error
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if public.public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise SettingsError(f"{where} and {ENROL}.key do not belong together: {again}")
    names = [attribute.value for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [ENROL]:
        raise SettingsError(
            f"{where} is the certificate of {', '.join(map(str, names))}, not the claim certificate: {again}"
        )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
