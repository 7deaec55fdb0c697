"""Hundreds or thousands of light clients in one thread: real ends and participations over minimal MQTT connections.

They connect again by the same rule as MqttBus (protocol/retry.py). What they see is noted in a file of JSON lines.
"""

from __future__ import annotations

import heapq
import itertools
import json
import logging
import random
import selectors
import socket
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_client.participate import carry_out
from edge_client.participation import Participation, Step, Train
from protocol.bus import Action
from protocol.client_end import ClientEnd
from protocol.events import Answered
from protocol.messages import Status
from protocol.retry import Retry
from protocol.settings import BrokerSettings
from tests.faults.light import light_result
from tests.faults.light_mqtt import LightMqtt

BUSY_S, IDLE_S, COUNT_S = 0.05, 1.0, 0.25
ANSWER_S = 10.0  # how long a broker may take to take a client in
FILTERS = 3
READ = 262_144


@dataclass(eq=False)
class Member:
    """One client of the fleet. `since` is when it began to connect, or last said that it lives."""

    name: str
    end: ClientEnd
    part: Participation
    mqtt: LightMqtt
    retry: Retry
    sock: socket.socket | None = None
    since: float = 0.0
    due: float = 0.0
    is_back: bool = False

    def do(self, actions: list[Action]) -> None:
        """Carry out actions, as a Link does."""
        self.mqtt.do(actions)

    @property
    def is_busy(self) -> bool:
        """Whether anything is on its way up or down."""
        fetching = any(download.under_way for download in self.end._downloads())
        return fetching or self.end._upload.offer is not None or not self.mqtt.drained()


class Fleet:
    """Clients of one federation at one broker, in this thread."""

    def __init__(self, names: list[str], federation: str, broker: BrokerSettings, notes: Path) -> None:
        self._broker = broker
        self._notes = notes.open("a", buffering=1)
        self._selector = selectors.DefaultSelector()
        self._looks: list[tuple[float, int, Member]] = []
        self._order = itertools.count()
        self._counts: Counter[str] = Counter()
        self._members = [self._member(federation, name) for name in names]
        for member in self._members:
            self._look_in(member, random.uniform(0.0, IDLE_S))

    def run(self) -> None:
        """Take part until killed."""
        next_count = 0.0
        while True:
            now = time.monotonic()
            while self._looks and self._looks[0][0] <= now:
                due, _, member = heapq.heappop(self._looks)
                if due == member.due:
                    self._look_at(member, now)
            if now >= next_count:
                next_count = now + COUNT_S
                self._note_counts()
            for key, mask in self._selector.select(max(0.0, min(self._looks[0][0] - now, COUNT_S))):
                self._ready(key.data, mask)

    def _member(self, federation: str, name: str) -> Member:
        end = ClientEnd(federation, name, random.Random(name))
        status = Status(state="online")
        end.announce(status)
        mqtt = LightMqtt(f"{federation}:{name}", end.will(), self._broker.keepalive_s)
        return Member(name, end, Participation(status), mqtt, Retry(random.Random()))

    def _look_in(self, member: Member, seconds: float) -> None:
        member.due = time.monotonic() + seconds
        heapq.heappush(self._looks, (member.due, next(self._order), member))

    def _look_at(self, member: Member, now: float) -> None:
        """Do what is due for a member: connect, give up on a broker that does not answer, say what the end has to say."""
        if member.sock is None:
            self._connect(member, now)
        elif not member.mqtt.is_connected and now - member.since > ANSWER_S:
            self._drop(member)
        else:
            if now - member.since > self._broker.keepalive_s / 2 and member.mqtt.is_connected:
                member.since = now
                member.mqtt.ping()
            member.do(member.end.tick(now, member.mqtt.room(), member.mqtt.drained()))
            self._flush(member)
            self._look_in(member, BUSY_S if member.is_busy else IDLE_S)

    def _connect(self, member: Member, now: float) -> None:
        self._counts["tries"] += 1
        member.sock, member.since = socket.socket(), now
        member.sock.setblocking(False)
        member.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        member.sock.connect_ex((self._broker.host, self._broker.port))
        member.mqtt.opened()
        self._selector.register(member.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, member)
        self._look_in(member, ANSWER_S)

    def _drop(self, member: Member) -> None:
        """Close a connection that is lost; the next try is after a pause."""
        if member.sock is None:
            return
        self._selector.unregister(member.sock)
        member.sock.close()
        member.sock = None
        if member.mqtt.is_connected:
            member.retry.taken_in()
        member.mqtt.lost()
        member.is_back = False
        self._handle(member)
        self._look_in(member, member.retry.pause())

    def _ready(self, member: Member, mask: int) -> None:
        if member.sock is None:
            return
        if mask & selectors.EVENT_READ:
            try:
                data = member.sock.recv(READ)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._drop(member)
                return
            was = member.mqtt.is_connected
            member.mqtt.feed(data)
            self._counts["taken in"] += member.mqtt.is_connected and not was
            self._handle(member)
            self._look_in(member, 0.0)
        self._flush(member)

    def _flush(self, member: Member) -> None:
        if member.sock is None:
            return
        outgoing = member.mqtt.outgoing
        try:
            while outgoing and (sent := member.sock.send(outgoing)):
                del outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(member)
            return
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if outgoing else 0)
        self._selector.modify(member.sock, wanted, member)

    def _handle(self, member: Member) -> None:
        """Give the end what came in, and do what follows; a training is over at once."""
        while member.mqtt.events:
            actions, events = member.end.handle(member.mqtt.events.popleft(), time.monotonic())
            member.do(actions)
            for event in events:
                if isinstance(event, Answered):
                    self._note("receipt", client=member.name, **event.receipt.model_dump(mode="json"))
                self._follow(member, member.part.on(event))

    def _follow(self, member: Member, steps: list[Step]) -> None:
        carry_out(steps, member, member.end)  # type: ignore[arg-type]
        for step in steps:
            if isinstance(step, Train):
                parcel = member.end.pack(light_result(step.ready, member.name), step.ready.plan)
                self._follow(member, member.part.trained(parcel))

    def _note_counts(self) -> None:
        """Note how many are back: taken in, subscribed, and all that they said has arrived, their status too."""
        for member in self._members:
            mqtt = member.mqtt
            member.is_back |= mqtt.is_connected and mqtt.subscribed >= FILTERS and mqtt.drained()
        back = sum(member.is_back for member in self._members)
        self._note("counts", back=back, **self._counts)

    def _note(self, what: str, **facts: Any) -> None:
        self._notes.write(json.dumps({"what": what, "at": time.monotonic(), **facts}) + "\n")


def sail(names: list[str], settings: dict[str, Any], notes: str) -> None:
    """Run a fleet until killed; `settings` are the broker's and the federation's name."""
    logging.getLogger().setLevel(logging.ERROR)
    Fleet(names, settings["federation"], BrokerSettings.model_validate(settings["broker"]), Path(notes)).run()
