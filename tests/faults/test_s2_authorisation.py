"""S2: who may say and hear what. Once by the broker's rules that we ship, on a real Mosquitto; once without any rules, where
the application itself must let nothing through.
"""

from __future__ import annotations

import queue
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from tests.conftest import wait_until
from tests.faults.lab import Lab, new_authority, secured_mosquitto
from tests.faults.rights import DEVICES, FILTERS, LAB, ROLES, TOPICS, may_read, may_write

NOT_AUTHORISED = 0x87
Heard = set[tuple[str, bytes]]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    with secured_mosquitto(folder / "broker", new_authority(folder / "ca").folder, sys_interval=1) as running:
        yield running


@dataclass
class Peer:
    """One connection, so bare that it does what no client of ours would do."""

    lab: Lab
    role: str
    client_id: str
    will: str | None = None
    heard: Heard = field(default_factory=set)

    def __post_init__(self) -> None:
        self._answers: queue.SimpleQueue[tuple[int, list[int]]] = queue.SimpleQueue()
        self._client = Client(
            CallbackAPIVersion.VERSION2, self.client_id, protocol=MQTTProtocolVersion.MQTTv5, reconnect_on_failure=False
        )
        context = ssl.create_default_context(cafile=str(self.lab.ca / "ca.pem"))
        context.load_cert_chain(self.lab.ca / f"{self.role}.pem", self.lab.ca / f"{self.role}.key")
        self._client.tls_set_context(context)
        self._client.on_connect = lambda _c, _d, _f, code, _p: self._answers.put((0, [code.value]))
        self._client.on_message = lambda _c, _d, message: self.heard.add((message.topic, bytes(message.payload)))
        self._client.on_publish = lambda _c, _d, mid, code, _p: self._answers.put((mid, [code.value]))
        self._client.on_subscribe = lambda _c, _d, mid, codes, _p: self._answers.put((mid, [code.value for code in codes]))
        if self.will is not None:
            self._client.will_set(self.will, self.role.encode(), qos=1)
        where = urlsplit(self.lab.url)
        self._client.connect(str(where.hostname), int(where.port or 0))
        self._client.loop_start()
        assert self._answer(0) == [0]

    def _answer(self, mid: int | None, timeout: float = 30) -> list[int]:
        answered, codes = self._answers.get(timeout=timeout)
        assert answered == mid
        return codes

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        """Return the broker's reason code."""
        return self._answer(self._client.publish(topic, payload, qos=1, retain=retain).mid)[0]

    def subscribe(self, wanted: str) -> int:
        """Return the broker's reason code. At QoS 0: then all that was sent before this answer is here before it."""
        return self._answer(self._client.subscribe(wanted, qos=0)[1])[0]

    def vanish(self) -> None:
        """Go without a word: the broker says the will."""
        sock: Any = self._client.socket()
        sock.shutdown(socket.SHUT_RDWR)
        self._end()

    def close(self) -> None:
        self._client.disconnect()
        self._end()

    def _end(self) -> None:
        """Let go of paho's client, which closes its sockets then: hundreds of them are more than select can take."""
        self._client.loop_stop()
        del self._client


@dataclass
class Listeners:
    """For every role one connection that wants every topic by its name, and one for each filter that might bring more."""

    peers: list[tuple[str, str, Peer]]

    @classmethod
    def of(cls, lab: Lab) -> Listeners:
        peers = []
        for role in ROLES:
            exact = Peer(lab, role, f"exact-{role}")
            for topic in TOPICS:
                exact.subscribe(topic)
            peers.append((role, "", exact))
            for number, wanted in enumerate(FILTERS):
                peer = Peer(lab, role, f"filter-{role}-{number}")
                peer.subscribe(wanted)
                peers.append((role, wanted, peer))
        return cls(peers)

    def settle(self) -> None:
        for _, _, peer in self.peers:
            peer.subscribe(LAB.broadcast("unknown"))

    def leaks(self) -> list[tuple[str, str, str]]:
        """What came to somebody who may not hear it: (reader, filter, topic)."""
        self.settle()
        return [
            (role, wanted, topic)
            for role, wanted, peer in self.peers
            for topic, payload in peer.heard
            if not (may_read(role, topic) and may_write(payload.decode(errors="replace"), topic))
        ]

    def missed(self) -> list[tuple[str, str, str]]:
        """What did not come to who asked for it by name and may hear it: (reader, writer, topic)."""
        return [
            (role, writer, topic)
            for role, wanted, peer in self.peers
            for writer in ROLES
            for topic in TOPICS
            if not wanted and may_read(role, topic) and may_write(writer, topic)
            if (topic, writer.encode()) not in peer.heard
        ]

    def close(self) -> None:
        for _, _, peer in self.peers:
            peer.close()


def publish_everything(lab: Lab, *, retain: bool) -> list[tuple[str, str, int]]:
    """Let every role write to every topic; return what was answered otherwise than the rules say."""
    wrong = []
    for role in ROLES:
        peer = Peer(lab, role, f"writer-{role}")
        for topic in TOPICS:
            code = peer.publish(topic, role.encode(), retain=retain)
            if (code == NOT_AUTHORISED) is may_write(role, topic):
                wrong.append((role, topic, code))
        peer.close()
    return wrong


def test_s2_every_role_says_and_hears_what_the_rules_say_and_nothing_else(lab: Lab, score: Callable[..., None]) -> None:
    listeners = Listeners.of(lab)
    try:
        wrong = publish_everything(lab, retain=False)
        leaks, missed = listeners.leaks(), listeners.missed()
    finally:
        listeners.close()
    cells = len(ROLES) * len(TOPICS) * (1 + len(ROLES) * (1 + len(FILTERS)))
    score("S2", "cells of publishing: writer x topic x reader x filter", cells, "cells", ">= 400", passed=cells >= 400)
    found = len(wrong) + len(leaks) + len(missed)
    score("S2", "leaks and wrong refusals, publishing", found, "", "0", passed=not found)


def test_s2_what_is_retained_reaches_nobody_else(lab: Lab, score: Callable[..., None]) -> None:
    wrong = publish_everything(lab, retain=True)
    listeners = Listeners.of(lab)
    try:
        leaks = listeners.leaks()
        last = {topic: writer for writer in ROLES for topic in TOPICS if may_write(writer, topic)}
        missed = [gap for gap in listeners.missed() if last[gap[2]] == gap[1]]
    finally:
        listeners.close()
        for role in ROLES:
            peer = Peer(lab, role, f"writer-{role}")
            for topic in TOPICS:
                peer.publish(topic, b"", retain=True)
            peer.close()
    found = len(wrong) + len(leaks) + len(missed)
    cells = len(ROLES) * len(TOPICS) * (1 + len(ROLES) * (1 + len(FILTERS)))
    score("S2", "leaks and wrong refusals, retained", found, f"in {cells} cells", "0", passed=not found)


def test_s2_a_last_will_says_nothing_that_its_owner_may_not(lab: Lab, score: Callable[..., None]) -> None:
    listeners = Listeners.of(lab)
    try:
        for role in ROLES:
            for topic in TOPICS:
                Peer(lab, role, f"dying-{role}", will=topic).vanish()
            Peer(lab, role, f"dying-{role}").close()  # who takes the name over is let in after the last will was said
        leaks, missed = listeners.leaks(), listeners.missed()
    finally:
        listeners.close()
    cells = len(ROLES) * len(TOPICS) * len(ROLES) * (1 + len(FILTERS))
    found = len(leaks) + len(missed)
    score("S2", "leaks and wrong refusals, last wills", found, f"in {cells} cells", "0", passed=not found)


def test_what_the_broker_says_of_itself_is_published_and_nobody_hears_it(lab: Lab, tmp_path: Path) -> None:
    """Else the cells of $SYS would prove nothing: with rules that allow it, it is heard."""
    rules = "pattern read $SYS/#\n"
    with secured_mosquitto(tmp_path, lab.ca, acl=rules, sys_interval=1) as open_lab:
        peer = Peer(open_lab, DEVICES[0], "sys")
        peer.subscribe("$SYS/#")
        wait_until(lambda: any(topic.startswith("$SYS/broker/") for topic, _ in peer.heard), what="$SYS to be heard")
        peer.close()


def test_a_certificates_name_is_the_user_whatever_the_client_calls_itself(lab: Lab) -> None:
    listeners = [Peer(lab, role, f"exact-{role}") for role in ROLES]
    liar = Peer(lab, "jetson-1", "lab:jetson-2")
    try:
        for peer in listeners:
            for topic in TOPICS:
                peer.subscribe(topic)
        answers = {topic: liar.publish(topic, b"jetson-1") for topic in TOPICS}
        assert {topic for topic, code in answers.items() if code != NOT_AUTHORISED} == {
            topic for topic in TOPICS if may_write("jetson-1", topic)
        }
    finally:
        for peer in (liar, *listeners):
            peer.close()


def test_a_rule_that_is_read_again_cuts_a_device_off_at_once(lab: Lab, tmp_path: Path) -> None:
    """`topic deny #` below `user ID` and a SIGHUP: what docs/operations.md says of the broker's side of a revocation."""
    with secured_mosquitto(tmp_path, lab.ca) as own:
        coordinator, thief, other = (Peer(own, role, f"lab:{role}") for role in ("coordinator", *DEVICES))
        assert thief.publish(LAB.from_("jetson-1", "status"), b"jetson-1", retain=True) != NOT_AUTHORISED
        rules = (tmp_path / "acl").read_text()
        (tmp_path / "acl").write_text(f"{rules}\nuser jetson-1\ntopic deny #\n")
        own.reload()
        while thief.publish(LAB.from_("jetson-1", "offer"), b"jetson-1") != NOT_AUTHORISED:
            pass
        assert other.publish(LAB.from_("jetson-2", "offer"), b"jetson-2") != NOT_AUTHORISED
        coordinator.subscribe(LAB.from_("jetson-1", "status"))
        coordinator.subscribe("unknown")
        assert coordinator.heard == set()  # check_retain_source: what it has left is given to nobody
        for peer in (coordinator, thief, other):
            peer.close()
