"""The authority, and the limits of the broker's configuration that we ship, on a real Mosquitto.

Who gets in is in tests/faults/test_s1_tls.py, who may say and hear what in tests/faults/test_s2_authorisation.py.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from coordinator.broker.authority import CRL, Authority
from coordinator.broker.mosquitto import PACKET, mosquitto
from protocol.bus import Connected, Delivery, Publish, Subscribe
from protocol.errors import BusError, WireError
from protocol.messages import CHUNK_SIZE
from protocol.mqtt import MqttBus
from protocol.settings import SettingsError
from tests.conftest import wait_until
from tests.faults.lab import Lab, new_authority, secured_mosquitto
from tests.faults.rights import LAB

FLEET = 2000


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_authority(tmp_path_factory.mktemp("lab") / "ca").folder


@pytest.fixture(scope="module")
def lab(ca: Path) -> Iterator[Lab]:
    with secured_mosquitto(ca.parent / "broker", ca) as running:
        yield running


def test_the_limits_are_announced_and_a_chunk_fits(lab: Lab) -> None:
    bus = MqttBus.open(lab.settings("jetson-1"), "lab:jetson-1")
    try:
        assert bus.receive(10.0) == Connected(PACKET)
        bus.do(Publish(LAB.upload("jetson-1", "ab" * 32, 0), bytes(CHUNK_SIZE)))
        wait_until(bus.drained, what="the chunk to be taken")
        with pytest.raises(BusError, match="raise its max_packet_size"):
            bus.do(Publish(LAB.upload("jetson-1", "ab" * 32, 1), bytes(PACKET)))
    finally:
        bus.close()


def test_a_coordinator_that_comes_back_is_given_the_status_of_a_whole_fleet(lab: Lab) -> None:
    """All at once, faster than it takes them: more than Mosquitto keeps for one reader by default."""
    device = lab.open("jetson-1")
    topics = [LAB.from_("jetson-1", f"status{number}") for number in range(FLEET)]
    for topic in topics:
        wait_until(lambda: device.room() > 0, what="room")
        device.do(Publish(topic, bytes(600), retain=True, expiry_s=600))
    wait_until(device.drained, 60, what="the statuses to be taken")
    coordinator = lab.open("coordinator")
    try:
        coordinator.do(Subscribe("clipcast/1/lab/from/#"))
        heard: set[str] = set()

        def all_heard() -> bool:
            while isinstance(event := coordinator.receive(0.0), Delivery):
                heard.add(event.topic)
            return heard >= set(topics)

        wait_until(all_heard, 60, what=f"{FLEET} statuses")
    finally:
        coordinator.close()
        device.close()


def test_a_client_without_a_name_of_its_own_is_refused(lab: Lab) -> None:
    settings = lab.settings("jetson-1").model_copy(update={"connect_timeout_s": 2.0})
    with pytest.raises(BusError, match="Unspecified error"):  # Mosquitto has no better word for it
        MqttBus.open(settings, "")


def test_a_federation_needs_a_name() -> None:
    with pytest.raises(WireError):
        mosquitto("a/b", Path(), Path())


def test_a_clients_certificate_is_no_servers(ca: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca / "jetson-1.pem", ca / "jetson-1.key")
    client = ssl.create_default_context(cafile=str(ca / "ca.pem"))
    client.check_hostname = False
    here, there = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_side, client_side = context.wrap_bio(here, there, server_side=True), client.wrap_bio(there, here)

    def shake_hands() -> None:
        for side in (client_side, server_side) * 4:
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()

    with pytest.raises(
        ssl.SSLCertVerificationError, match=r"unsuitable certificate purpose|unsupported certificate purpose"
    ):
        shake_hands()


def test_certificates_are_valid_for_a_clock_that_starts_in_1970(ca: Path) -> None:
    for name in ("ca", "broker", "jetson-1"):
        certificate = x509.load_pem_x509_certificate((ca / f"{name}.pem").read_bytes())
        assert certificate.not_valid_before_utc.year == 1970
        assert certificate.not_valid_after_utc > dt.datetime.now(dt.timezone.utc) + dt.timedelta(days=3650)
        assert (ca / f"{name}.key").stat().st_mode & 0o077 == 0


def test_what_exists_is_not_replaced_and_what_is_missing_is_said(ca: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="holds an authority already"):
        Authority.create(ca, "again")
    with pytest.raises(SettingsError, match=r"jetson-1\.pem exists"):
        Authority.open(ca).issue("jetson-1")
    with pytest.raises(SettingsError, match="exists"):
        Authority.open(ca).issue("ca")
    with pytest.raises(SettingsError, match="clipcast ca init"):
        Authority.open(tmp_path)
    with pytest.raises(SettingsError, match="neither an address nor a name"):
        Authority.open(ca).issue("other", ["bücher"])
    (tmp_path / "ca.pem").write_text("x")
    (tmp_path / "ca.key").write_text("x")
    with pytest.raises(SettingsError, match="cannot be read"):
        Authority.open(tmp_path)


def serials(folder: Path) -> list[int]:
    revoked = x509.load_pem_x509_crl((folder / CRL).read_bytes())
    assert revoked.last_update_utc.year == 1970
    assert revoked.next_update_utc is not None
    assert revoked.next_update_utc > dt.datetime.now(dt.timezone.utc) + dt.timedelta(days=3650)
    certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    assert revoked.is_signature_valid(certificate.public_key())
    return [entry.serial_number for entry in revoked]


def test_a_certificate_is_taken_back_and_its_name_issued_anew(tmp_path: Path) -> None:
    authority = new_authority(tmp_path / "ca")
    first = x509.load_pem_x509_certificate((tmp_path / "ca" / "jetson-1.pem").read_bytes())
    assert serials(tmp_path / "ca") == []
    authority.revoke("jetson-1")
    assert serials(tmp_path / "ca") == [first.serial_number]
    assert len(list((tmp_path / "ca").glob("jetson-1-*.revoked.pem"))) == 1
    authority.issue("jetson-1")
    second = x509.load_pem_x509_certificate((tmp_path / "ca" / "jetson-1.pem").read_bytes())
    Authority.open(tmp_path / "ca").revoke("jetson-1")
    assert serials(tmp_path / "ca") == [first.serial_number, second.serial_number]
    assert first.serial_number != second.serial_number


def test_a_revocation_that_was_cut_off_is_done_by_its_repetition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = new_authority(tmp_path / "ca")

    def power_cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", power_cut)
        with pytest.raises(KeyboardInterrupt):
            authority.revoke("jetson-1")
    authority.revoke("jetson-1")
    assert len(serials(tmp_path / "ca")) == 1
    assert not (tmp_path / "ca" / "jetson-1.pem").exists()


def test_only_what_this_authority_has_issued_is_taken_back(tmp_path: Path) -> None:
    authority = new_authority(tmp_path / "ca")
    with pytest.raises(SettingsError, match="cannot be read as a certificate"):
        authority.revoke("nobody")
    with pytest.raises(SettingsError, match="is not a certificate that this authority has issued"):
        authority.revoke("ca")
    stranger = Authority.create(tmp_path / "stranger", "another lab")
    stranger.issue("eve")
    (tmp_path / "stranger" / "eve.pem").rename(tmp_path / "ca" / "eve.pem")
    with pytest.raises(SettingsError, match="is not a certificate that this authority has issued"):
        authority.revoke("eve")
    for spoil in (lambda: (tmp_path / "ca" / CRL).write_text("x"), (tmp_path / "ca" / CRL).unlink):
        spoil()
        with pytest.raises(SettingsError, match="without it what was revoked is valid"):
            authority.revoke("jetson-1")
    with pytest.raises(SettingsError, match="the authority's own"):
        authority.issue("crl")
