"""The check of a broker, on real ones: what it finds, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading

import pytest

from protocol.broker import check as broker_check
from protocol.broker import probe
from protocol.broker.check import check
from protocol.broker.findings import limits, packet_of
from protocol.bus import Delivery, Subscribe
from protocol.mqtt import MqttBus
from protocol.settings import BrokerSettings
from tests.conftest import a_free_port
from tests.faults.lab import new_authority, secured_mosquitto
from tests.protocol.test_mqtt_trust import mosquitto_password, paho_leaves_socket


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(broker_check, "CHUNKS_S", 0.2)


def found(url, client="jetson-1", **settings):
    return {f.name: f for f in check(BrokerSettings(url=url, **{"connect_timeout_s": 5.0, **settings}), "lab", client)}


def states(findings):
    return {name: finding.state for name, finding in findings.items() if finding.state != "ok"}


def test_an_open_mosquitto_carries_a_federation_and_lets_everybody_do_everything(mosquitto):
    url = mosquitto()
    findings = found(url)
    assert states(findings) == {"strangers": "warn", "forbidden to write": "warn", "forbidden to read": "warn"}
    assert {"classes", "round", "to another client"} <= set(findings["forbidden to write"].measured[7:].split(", "))
    assert findings["round trip"].measured.endswith("there and back, median of 20")
    assert findings["retained messages, tried"].measured == "kept, cleared"
    assert findings["message expiry, tried"].measured == "kept"
    assert "chunks of 65536 bytes" in findings
    assert findings["two of one name"].state == "ok"
    assert all(finding.cure for finding in findings.values() if finding.state != "ok")
    bus = MqttBus.open(BrokerSettings(url=url), "afterwards")
    bus.do(Subscribe("#"))
    bus.do(Subscribe("$SYS/broker/version"))
    while not isinstance(event := bus.receive(10.0), Delivery):
        assert event is not None
    assert event.topic == "$SYS/broker/version"  # nothing else is retained
    bus.close()


def test_the_coordinator_of_an_open_mosquitto(mosquitto):
    findings = found(mosquitto(), "coordinator")
    assert states(findings) == {"strangers": "warn", "forbidden to write": "warn", "forbidden to read": "warn"}
    assert "$SYS/broker/" in findings["forbidden to read"].measured


def test_the_embedded_broker_carries_a_federation(embedded):
    findings = found(embedded)
    assert states(findings) == {"strangers": "warn", "forbidden to write": "warn", "forbidden to read": "warn"}


@pytest.mark.parametrize("client", ["coordinator", "jetson-1"])
@paho_leaves_socket
def test_a_broker_as_we_recommend_it_has_nothing_to_mend(client, tmp_path):
    with secured_mosquitto(tmp_path / "broker", new_authority(tmp_path / "ca").folder) as lab:
        findings = {f.name: f for f in check(lab.settings(client), "lab", client)}
    unheard = {"retained messages, tried": "unknown", "message expiry, tried": "unknown"}
    assert states(findings) == ({} if client == "coordinator" else unheard)
    assert findings["encryption"].measured.startswith("TLSv1.3, ")
    assert findings["certificate"].measured.endswith(" days")
    assert findings["packet size, tried"].measured == "131072 bytes pass, 131076 are refused"
    assert findings["strangers"].measured == "stay outside without credentials"
    assert findings["forbidden to write"].measured.startswith("refuses all ")


@paho_leaves_socket
def test_another_ones_certificate_may_not_write_what_the_id_has_to(tmp_path):
    with secured_mosquitto(tmp_path / "broker", new_authority(tmp_path / "ca").folder) as lab:
        findings = {f.name: f for f in check(lab.settings("jetson-1"), "lab", "jetson-2")}
    assert states(findings) == {"own topics": "fail"}
    assert "has to be jetson-2" in findings["own topics"].cure
    assert list(findings)[-1] == "own topics"  # nothing more can be measured


def test_small_packets_are_told_with_their_chunks(mosquitto):
    findings = found(mosquitto("max_packet_size 3000"))
    assert findings["packet size"].measured == "3000 bytes, chunks of 2488"
    assert findings["packet size"].state == "warn"
    assert findings["packet size, tried"].measured == "3000 bytes pass, 3003 are refused"
    assert findings["chunks of 2488 bytes"].state == "ok"


def test_packets_too_small_for_the_smallest_chunk_are_a_failure(mosquitto):
    findings = found(mosquitto("max_packet_size 1100"))
    assert findings["packet size"].state == "fail"
    assert "raise its max_packet_size" in findings["packet size"].cure


def test_a_broker_that_keeps_nothing_retained_is_a_failure(mosquitto):
    findings = found(mosquitto("retain_available false"))
    assert findings["retained messages"].state == "fail"
    assert "retained messages, tried" not in findings  # it would end the connection


def test_a_password_keeps_strangers_outside(mosquitto, tmp_path):
    (tmp_path / "passwords").write_text(mosquitto_password("me", "secret"))
    url = mosquitto(f"password_file {tmp_path / 'passwords'}", "user root", "allow_anonymous false")
    for password, expected in (("secret", "stay outside without credentials"), ("wrong", None)):
        (tmp_path / "password").write_text(password)
        findings = found(url, username="me", password_file=tmp_path / "password")
        if expected is not None:
            assert findings["strangers"].measured == expected
        else:
            assert list(states(findings).values()) == ["fail"]
            assert "Check `username` and `password_file`" in findings["connection"].measured


@pytest.fixture
def old_broker():
    """Answer every CONNECT with a CONNACK of one's choice: a broker that speaks MQTT 3.1.1 at most."""
    listener = socket.create_server(("127.0.0.1", 0))
    answers = []

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(5)
                connection.recv(4096)
                connection.sendall(answers[0])
                while connection.recv(4096):
                    pass

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"mqtt://127.0.0.1:{listener.getsockname()[1]}", answers
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)


@pytest.mark.parametrize("answer", [b"\x20\x02\x00\x01", b"\x20\x03\x00\x84\x00"])
def test_a_broker_without_mqtt_5_is_refused_and_told_so(old_broker, answer):
    url, answers = old_broker
    answers.append(answer)
    findings = found(url)
    assert list(states(findings).values()) == ["fail"]
    assert "MQTT 3.1.1 at most: clipcast needs MQTT 5" in findings["connection"].measured


def test_nobody_at_the_port(free_port):
    findings = found(f"mqtt://127.0.0.1:{free_port}", connect_timeout_s=0.5)
    assert states(findings) == {"connection": "fail"}
    assert "Check that it runs there" in findings["connection"].measured


def test_a_broker_that_falls_silent_is_told(old_broker, monkeypatch):
    monkeypatch.setattr(probe, "ANSWER_S", 0.5)
    url, answers = old_broker
    answers.append(b"\x20\x03\x00\x00\x00")  # it takes everybody in, and says no more
    findings = found(url)
    assert states(findings)["connection"] == "fail"
    assert "has not answered for 0.5 s" in findings["connection"].measured


def naive_packet(topic: str, payload: bytes) -> int:
    rest = 2 + len(topic) + 2 + 1 + len(payload)
    digits = 1
    while rest >= 128**digits:
        digits += 1
    return 1 + digits + rest


@pytest.mark.parametrize("size", [100, 129, 131, 132, 16_385, 16_388, 16_389, 100_000, 131_072, 1_048_576])
def test_a_packet_has_exactly_the_size_that_is_tried(size):
    assert naive_packet("a/b", packet_of("a/b", size)) == size


@pytest.mark.parametrize("size", [130, 16_387])
def test_no_packet_has_a_size_between(size):
    """The length's own length grows there: the next packet is two bytes longer."""
    with pytest.raises(ValueError, match="no packet has"):
        packet_of("a/b", size)


@pytest.mark.parametrize(
    ("announced", "name", "state"),
    [
        ({"ReceiveMaximum": 4}, "receive maximum", "warn"),
        ({"MaximumQoS": 0}, "QoS 1", "fail"),
        ({"WildcardSubscriptionAvailable": 0}, "wildcards", "fail"),
        ({"RetainAvailable": 0}, "retained messages", "fail"),
        ({"ServerKeepAlive": 5}, "keepalive", "warn"),
        ({"MaximumPacketSize": 20_000}, "packet size", "warn"),
        ({"MaximumPacketSize": 262_144}, "packet size", "ok"),
    ],
)
def test_what_connack_announces_is_judged(announced, name, state):
    judged = {finding.name: finding for finding in limits(announced, 30)}
    assert judged[name].state == state
    assert all(finding.state == "ok" for other, finding in judged.items() if other != name)
    assert bool(judged[name].cure) is (state != "ok")


def clipcast(*arguments, cwd):
    command = [sys.executable, "-m", "clipcast", "broker", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


@paho_leaves_socket
def test_the_command_reads_settings_or_options_and_ends_by_the_worst_finding(mosquitto, tmp_path):
    url = mosquitto()
    (tmp_path / "c.toml").write_text(f'federation = "lab"\nclasses = ["a", "b"]\n[broker]\nurl = "{url}"\n')
    by_settings = clipcast("c.toml", "--json", cwd=tmp_path)
    assert by_settings.returncode == 14, by_settings.stderr
    findings = json.loads(by_settings.stdout)
    assert {finding["name"] for finding in findings if finding["state"] == "warn"} >= {"strangers", "forbidden to write"}
    with secured_mosquitto(tmp_path / "broker", new_authority(tmp_path / "ca").folder) as lab:
        files = [
            f"--{name}-file={tmp_path / 'ca' / file}"
            for name, file in (("ca", "ca.pem"), ("cert", "coordinator.pem"), ("key", "coordinator.key"))
        ]
        by_options = clipcast(lab.url, *files, cwd=tmp_path)
        assert by_options.returncode == 0, by_options.stdout + by_options.stderr
        assert "two of one name" in by_options.stdout
    dead = clipcast(f"mqtt://127.0.0.1:{a_free_port()}", "--id", "bad id", cwd=tmp_path)
    assert dead.returncode == 3
    assert "id 'bad id' cannot be used" in dead.stderr
    options = clipcast("mqtt://h", "--ca-file", "x", cwd=tmp_path)
    assert options.returncode == 3
    assert "ca_file and cert_file have no effect on mqtt://" in options.stderr


def test_the_command_ends_with_4_if_a_broker_cannot_carry_us(mosquitto, tmp_path):
    done = clipcast(mosquitto("max_packet_size 1100"), cwd=tmp_path)
    assert done.returncode == 4
    assert "max_packet_size" in done.stdout
