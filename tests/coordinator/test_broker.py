"""The authority and the broker's configuration that we ship, on a real Mosquitto: who gets in, who may say and hear what.

The matrix is generated from the rules: every role tries every topic, as it should and as a stranger would.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from cryptography import x509

from coordinator.authority import Authority
from coordinator.broker import mosquitto
from protocol.bus import Connected, Delivery, Publish, Subscribe
from protocol.errors import BusError
from protocol.mqtt import MqttBus
from protocol.settings import BrokerSettings, SettingsError
from protocol.topics import Topics

LAB, OTHER, SHA = Topics("lab"), Topics("other"), "ab" * 32
DEVICES = ("jetson-1", "jetson-2")
ROLES = ("coordinator", *DEVICES)
WILDCARDS = ("#", "clipcast/#", "clipcast/1/lab/#", "clipcast/1/lab/to/#", "clipcast/1/lab/from/#", "+/+/+/+/+/+")
FROM_KINDS, TO_KINDS = ("offer", "need", "status", "receipt"), ("need", "receipt", "adapter", "status")
TOPICS = [
    *(topics.broadcast(kind) for topics in (LAB, OTHER) for kind in ("classes", "round", "release")),
    *(topics.blob(SHA, 0) for topics in (LAB, OTHER)),
    *(topics.from_(device, kind) for topics in (LAB, OTHER) for device in DEVICES for kind in FROM_KINDS),
    *(topics.to(device, kind) for topics in (LAB, OTHER) for device in DEVICES for kind in TO_KINDS),
    *(topics.upload(device, SHA, 0) for topics in (LAB, OTHER) for device in DEVICES),
    *(f"clipcast/1/lab/{rest}" for rest in ("unknown", "from", "to/jetson-1/a/b", "blob/x")),
    "somewhere/else",
]


def may_write(role: str, topic: str) -> bool:
    """Say it again, naively: the coordinator all but `from`, a device below its own name."""
    if not topic.startswith("clipcast/1/lab/"):
        return False
    rest = topic.removeprefix("clipcast/1/lab/").split("/")
    if role == "coordinator":
        known = {("classes",), ("round",), ("release",)}
        return tuple(rest) in known or (rest[0] == "blob" and len(rest) == 3) or (rest[0] == "to" and len(rest) == 3)
    return rest[0] == "from" and rest[1:2] == [role]


def may_read(role: str, topic: str) -> bool:
    if not topic.startswith("clipcast/1/lab/"):
        return False
    rest = topic.removeprefix("clipcast/1/lab/").split("/")
    broadcast = tuple(rest) in {("classes",), ("round",), ("release",)} or (rest[0] == "blob" and len(rest) == 3)
    if role == "coordinator":
        return rest[0] == "from" or broadcast
    return broadcast or (rest[0] == "to" and rest[1:2] == [role] and len(rest) == 3)


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority that has issued what a lab needs, and a stranger's beside it."""
    folder = tmp_path_factory.mktemp("lab") / "ca"
    authority = Authority.create(folder, "lab")
    authority.issue("broker", ["127.0.0.1", "localhost"])
    for role in ROLES:
        authority.issue(role)
    Authority.create(folder / "stranger", "lab").issue("coordinator")
    return folder


@pytest.fixture(scope="module")
def broker(ca: Path) -> Iterator[str]:
    binary = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    folder = ca.parent / "broker"
    folder.mkdir()
    for name, text in mosquitto("lab", folder, ca, port=port).items():
        (folder / name).write_text(text)
    with (folder / "mosquitto.conf").open("a") as conf:
        conf.write("user root\n")  # it would drop to a user who may not read the test's folder
    process = subprocess.Popen([binary, "-c", str(folder / "mosquitto.conf")], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 20
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert process.poll() is None, "mosquitto refuses the configuration"
        assert time.monotonic() < end
        time.sleep(0.01)
    yield f"mqtts://127.0.0.1:{port}"
    process.kill()
    process.wait()


def open_as(url: str, ca: Path, name: str, client_id: str | None = None, authority: Path | None = None) -> MqttBus:
    own = ca if authority is None else authority
    files = {"ca_file": ca / "ca.pem", "cert_file": own / f"{name}.pem", "key_file": own / f"{name}.key"}
    bus = MqttBus.open(BrokerSettings(url=url, connect_timeout_s=5.0, **files), client_id or f"lab:{name}")
    assert isinstance(bus.receive(10.0), Connected)
    return bus


def wait_until_subscribed(coordinator: MqttBus, buses: Iterable[MqttBus]) -> None:
    """A retained message comes with the last subscription of each, which is to `classes`: then all are in place."""
    coordinator.do(Publish(LAB.broadcast("classes"), b"ready", retain=True))
    for bus in buses:
        end = time.monotonic() + 30
        while bus.receive(1.0) != Delivery(LAB.broadcast("classes"), b"ready"):
            assert time.monotonic() < end, "waited 30 s for the subscriptions"


def drain(bus: MqttBus, mark: str) -> set[tuple[str, bytes]]:
    """What has come in until the message on topic `mark`, which comes last."""
    seen: set[tuple[str, bytes]] = set()
    end = time.monotonic() + 30
    while time.monotonic() < end:
        event = bus.receive(1.0)
        if isinstance(event, Delivery):
            if event.topic == mark:
                return seen
            seen.add((event.topic, event.payload))
    raise AssertionError(f"waited 30 s for {mark}")


def test_every_role_says_and_hears_what_the_rules_say_and_nothing_else(broker: str, ca: Path) -> None:
    buses = {role: open_as(broker, ca, role) for role in ROLES}
    try:
        for bus in buses.values():
            for topic in (*TOPICS, LAB.broadcast("classes")):
                bus.do(Subscribe(topic))
        wait_until_subscribed(buses["coordinator"], buses.values())
        for writer, bus in buses.items():
            for topic in TOPICS:
                bus.do(Publish(topic, writer.encode()))
        # What each hears last of each who may speak to it: messages of one sender come in their order.
        buses["coordinator"].do(Publish(LAB.broadcast("classes"), b"end"))
        for device in DEVICES:
            buses[device].do(Publish(LAB.from_(device, "status"), b"end"))
        last = {role: {(LAB.broadcast("classes"), b"end")} for role in ROLES}
        last["coordinator"] |= {(LAB.from_(device, "status"), b"end") for device in DEVICES}
        heard: dict[str, set[tuple[str, bytes]]] = {role: set() for role in ROLES}
        for role, bus in buses.items():
            end = time.monotonic() + 30
            while not last[role] <= heard[role]:
                assert time.monotonic() < end, f"{role} waited 30 s"
                event = bus.receive(1.0)
                if isinstance(event, Delivery):
                    heard[role].add((event.topic, event.payload))
    finally:
        for bus in buses.values():
            bus.close()
    cells = list(itertools.product(ROLES, ROLES, TOPICS))
    assert len(cells) >= 400
    wrong = [
        (writer, reader, topic)
        for writer, reader, topic in cells
        if ((topic, writer.encode()) in heard[reader]) is not (may_write(writer, topic) and may_read(reader, topic))
    ]
    assert wrong == []


def test_wildcards_open_no_other_door(broker: str, ca: Path) -> None:
    coordinator, one, two = (open_as(broker, ca, role) for role in ROLES)
    try:
        for topic_filter in (*WILDCARDS, LAB.to("jetson-1", "+"), LAB.broadcast("classes")):
            one.do(Subscribe(topic_filter))
        wait_until_subscribed(coordinator, [one])
        two.do(Publish(LAB.from_("jetson-2", "offer"), b"secret"))
        coordinator.do(Publish(LAB.to("jetson-2", "receipt"), b"secret"))
        coordinator.do(Publish(LAB.to("jetson-1", "receipt"), b"end"))
        assert b"secret" not in {payload for _, payload in drain(one, LAB.to("jetson-1", "receipt"))}
    finally:
        for bus in (coordinator, one, two):
            bus.close()


def test_a_certificates_name_is_the_user_whatever_the_client_calls_itself(broker: str, ca: Path) -> None:
    coordinator, liar = open_as(broker, ca, "coordinator"), open_as(broker, ca, "jetson-1", "lab:jetson-2")
    try:
        coordinator.do(Subscribe("clipcast/1/lab/from/#"))
        coordinator.do(Subscribe(LAB.broadcast("classes")))
        wait_until_subscribed(coordinator, [coordinator])
        liar.do(Publish(LAB.from_("jetson-2", "offer"), b"lie"))
        liar.do(Publish(LAB.from_("jetson-1", "offer"), b"end"))
        assert b"lie" not in {payload for _, payload in drain(coordinator, LAB.from_("jetson-1", "offer"))}
    finally:
        coordinator.close()
        liar.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_who_has_no_certificate_of_this_authority_stays_outside(broker: str, ca: Path) -> None:
    with pytest.raises(BusError, match="cannot reach the broker"):
        open_as(broker, ca, "coordinator", authority=ca / "stranger")
    with pytest.raises(BusError, match="cannot reach the broker"):
        MqttBus.open(BrokerSettings(url=broker, ca_file=ca / "ca.pem", connect_timeout_s=3.0), "nobody")
    with pytest.raises(BusError, match="cannot reach the broker"):  # a server's certificate is no client's
        open_as(broker, ca, "broker")


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
