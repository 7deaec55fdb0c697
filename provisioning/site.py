"""What a lab gives to each of its boards: settings, the authority's certificate, and the one with which a board may ask."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path

from protocol.envelope import ENROL
from protocol.settings import BrokerSettings, Participant, SettingsError, load_settings, settings_of
from protocol.trust.claims import Claim

ETC, STATE = "etc/clipcast", "/var/lib/clipcast"
TOKEN = f"{ETC}/claim.token"
PICTURES = "/var/lib/clipcast/pictures"

CLIENT = """\
# clipcast edge client of the federation {federation}. Its id is what it was enrolled as: `clipcast client enrol`.
federation = {federation}
data = {data}                    # one sub-folder of pictures for each class
state = "{state}"
coordinator_key = {key}

[broker]
url = {url}
ca_file = "ca.pem"
cert_file = "{state}/device.pem"
key_file = "{state}/device.key"
tls_version = "{tls}"

[enrolment]
cert_file = "enrol.pem"
key_file = "enrol.key"
token_file = "claim.token"
"""


@dataclass(frozen=True)
class SiteFile:
    """A file below a board's root: its path without the first slash, content and mode."""

    path: str
    data: bytes
    mode: int


@dataclass(frozen=True)
class Site:
    """A lab, as its boards have to know it. The certificate `enrol` is the same for all of them, and no secret of one."""

    federation: str
    broker: BrokerSettings
    coordinator_key: str
    ca: bytes
    enrol_cert: bytes
    enrol_key: bytes
    data: str = PICTURES

    @classmethod
    def read(cls, coordinator: Path, authority: Path, key: str, *, broker: str = "", data: str = PICTURES) -> Site:
        """Read a coordinator's settings and the authority's folder; `key` is the coordinator's public key.

        `broker` is the broker's address as boards reach it, if that is another. Raises SettingsError.
        """
        found = load_settings(coordinator, Participant, "clipcast coordinator init")
        settings = found.broker
        if broker:
            settings = settings_of({"url": broker, "tls_version": settings.tls_version}, BrokerSettings)
        if not settings.tls:
            raise SettingsError(f"boards enrol over mqtts:// alone, the broker is at {settings.url}: docs/operations.md, The link")
        if _is_this_machine(settings.host):
            raise SettingsError(f"{settings.url} leads a board to itself: name the broker as boards reach it, --broker mqtts://HOST")
        return cls(
            found.federation,
            settings,
            key,
            _file(authority / "ca.pem", f"clipcast ca init {authority}"),
            _file(authority / f"{ENROL}.pem", f"clipcast ca issue {ENROL} {authority}"),
            _file(authority / f"{ENROL}.key", f"clipcast ca issue {ENROL} {authority}"),
            data,
        )

    def files(self, claim: Claim | None = None) -> list[SiteFile]:
        """Return what lies on a board; with a `claim`, which is one board's secret, that too."""
        text = CLIENT.format(
            federation=json.dumps(self.federation),
            data=json.dumps(self.data),
            state=STATE,
            key=json.dumps(self.coordinator_key),
            url=json.dumps(self.broker.url),
            tls=self.broker.tls_version,
        )
        found = [
            SiteFile(f"{ETC}/client.toml", text.encode(), 0o644),
            SiteFile(f"{ETC}/ca.pem", self.ca, 0o644),
            SiteFile(f"{ETC}/{ENROL}.pem", self.enrol_cert, 0o644),
            SiteFile(f"{ETC}/{ENROL}.key", self.enrol_key, 0o600),
        ]
        return [*found, SiteFile(TOKEN, f"{claim}\n".encode(), 0o600)] if claim else found


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _file(path: Path, command: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise SettingsError(f"{path} is not there: `{command}` makes it") from error
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
