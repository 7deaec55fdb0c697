"""A lab with mutual TLS: an authority, certificates for every role, a real Mosquitto with the configuration that we ship."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.broker.authority import Authority
from coordinator.broker.mosquitto import mosquitto
from protocol.bus import Connected, Publish
from protocol.mqtt import MqttBus
from protocol.settings import BrokerSettings
from tests.conftest import a_free_port, is_listening, wait_until
from tests.faults.rights import ROLES


def new_authority(folder: Path, names: Sequence[str] = ROLES) -> Authority:
    """Make an authority that has issued a broker's certificate and those of `names`."""
    authority = Authority.create(folder, "lab")
    authority.issue("broker", ["127.0.0.1", "localhost"])
    for name in names:
        authority.issue(name)
    return authority


@dataclass(frozen=True)
class Lab:
    """A running broker and the certificates for it."""

    url: str
    ca: Path
    log: Path
    pid: int = 0

    def reload(self) -> None:
        """Make the broker read its rules again."""
        os.kill(self.pid, signal.SIGHUP)

    def settings(self, name: str, authority: Path | None = None) -> BrokerSettings:
        """How `name` connects, by a certificate of this or of another authority."""
        own = authority or self.ca
        files = {"ca_file": self.ca / "ca.pem", "cert_file": own / f"{name}.pem", "key_file": own / f"{name}.key"}
        return BrokerSettings(url=self.url, connect_timeout_s=20.0, **files)

    def open(self, name: str, client_id: str | None = None, will: Publish | None = None) -> MqttBus:
        """Connect as `name`."""
        bus = MqttBus.open(self.settings(name), client_id or f"lab:{name}", will)
        assert isinstance(bus.receive(10.0), Connected)
        return bus


def mosquitto_binary() -> str:
    """Where Mosquitto is; skips the test if it is nowhere."""
    binary = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    return binary


@contextlib.contextmanager
def secured_mosquitto(folder: Path, ca: Path, acl: str | None = None, sys_interval: int = 0) -> Iterator[Lab]:
    """Run a Mosquitto with the configuration that we ship; `acl` replaces the access rules."""
    binary, port = mosquitto_binary(), a_free_port()
    folder.mkdir(parents=True, exist_ok=True)
    files = mosquitto("lab", folder, ca, port=port)
    conf = files["mosquitto.conf"].replace("sys_interval 0", f"sys_interval {sys_interval}")
    (folder / "acl").write_text(acl or files["acl"])
    # It would drop to a user who may not read the test's folder.
    (folder / "mosquitto.conf").write_text(f"{conf}user root\nlog_dest file {folder / 'log'}\nlog_type all\n")
    process = subprocess.Popen([binary, "-c", str(folder / "mosquitto.conf")], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: is_listening(port) or process.poll() is not None, what="mosquitto to listen")
        assert process.poll() is None, "mosquitto refuses the configuration"
        yield Lab(f"mqtts://127.0.0.1:{port}", ca, folder / "log", process.pid)
    finally:
        process.kill()
        process.wait()
