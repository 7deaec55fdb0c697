"""Fixtures of the wire's tests: waiting with a deadline, and a network in virtual time between real ends."""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections.abc import Callable, Iterable

import pytest

from protocol.bus import Action, Connected, Delivery, Publish, Subscribe, matches
from protocol.client_end import ClientEnd
from protocol.coordinator_end import CoordinatorEnd
from protocol.events import OfferMade
from protocol.messages import Manifest

STEP_S = 0.05
Ends = dict[str, ClientEnd | CoordinatorEnd]


def _wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 20.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"waited {deadline_s} s for {what}"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """Wait for a condition with a deadline."""
    return _wait_until


class Network:
    """A broker in virtual time whose messages meet a fate each: deliver, lose, twice, late (behind those sent after it).

    Retained manifests too: a broker whose queue is full loses them without a word. Once `fates` is used up, all is
    delivered.
    """

    def __init__(self, ends: Ends, fates: Iterable[str] = (), max_packet: int | None = None) -> None:
        self.ends = ends
        self.now = 0.0
        self.max_packet = max_packet
        self.events: dict[str, list[object]] = {name: [] for name in ends}
        self.published: list[Publish] = []
        self._filters: dict[str, set[str]] = {name: set() for name in ends}
        self._retained: dict[str, bytes] = {}
        self._fates = iter(fates)
        self._order = itertools.count()
        self._under_way: list[tuple[float, int, str, Delivery]] = []

    def connect(self, *names: str) -> None:
        for name in names or tuple(self.ends):
            self._filters[name].clear()
            self._give(name, Connected(self.max_packet))

    def replace_broker(self, max_packet: int | None, *names: str) -> None:
        """Another broker takes over: what the old one had under way or retained is lost. The ends connect in this order."""
        self._under_way.clear()
        self._retained.clear()
        for filters in self._filters.values():
            filters.clear()
        self.max_packet = max_packet
        self.connect(*names)

    def do(self, name: str, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, Publish):
                self._publish(action)
            elif isinstance(action, Subscribe):
                self._filters[name].add(action.filter)
                for topic, payload in self._retained.items():
                    if matches(action.filter, topic):
                        self._send(name, Delivery(topic, payload))
            else:
                self._filters[name].discard(action.filter)

    def run(self, until: Callable[[], bool], limit_s: float = 600.0) -> None:
        end = self.now + limit_s
        while not until():
            assert self.now < end, f"nothing came of it in {limit_s} virtual seconds"
            self.step()

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.step()

    def step(self) -> None:
        self.now += STEP_S
        while self._under_way and self._under_way[0][0] <= self.now:
            *_, name, delivery = heapq.heappop(self._under_way)
            self._give(name, delivery)
        for name, end in self.ends.items():
            self.do(name, end.tick(self.now, 8))

    def restart(self, name: str, end: ClientEnd | CoordinatorEnd) -> None:
        """Put a new end in the place of an old one, with its key and sequence."""
        if name in self.ends:
            end._signer = self.ends[name]._signer
        self.ends[name] = end

    def signed(self, name: str, topic: str, manifest: Manifest) -> Delivery:
        """What an end would say, written by hand."""
        return Delivery(topic, self.ends[name]._signer.seal("fed", name, manifest))

    def seen(self, name: str, kind: type) -> list:
        return [event for event in self.events[name] if isinstance(event, kind)]

    def _give(self, name: str, event: Connected | Delivery) -> None:
        actions, events = self.ends[name].handle(event, self.now)
        self.events[name].extend(events)
        self.do(name, actions)
        for made in events:
            if isinstance(made, OfferMade):  # as a coordinator does that has no objection
                self.ends[name].fetch(made.client, made.offer)

    def _publish(self, message: Publish) -> None:
        self.published.append(message)
        if message.retain:
            self._retained[message.topic] = message.payload
        for name, filters in self._filters.items():
            if any(matches(wanted, message.topic) for wanted in filters):
                self._send(name, Delivery(message.topic, message.payload))

    def _send(self, name: str, delivery: Delivery) -> None:
        fate = next(self._fates, "deliver")
        if fate == "lose":
            return
        delays = {"twice": (0.0, 1.0), "late": (3.0,)}.get(fate, (0.0,))
        for delay in delays:
            heapq.heappush(self._under_way, (self.now + delay, next(self._order), name, delivery))


@pytest.fixture(scope="session")
def new_network() -> Callable[..., Network]:
    """Make a network of one coordinator and the clients named, all of federation `fed`, connected."""

    def make(*clients: str, fates: Iterable[str] = (), max_packet: int | None = None, **limits: object) -> Network:
        ends: Ends = {"coordinator": CoordinatorEnd("fed", random.Random(0), **limits)}
        for seed, client in enumerate(clients):
            ends[client] = ClientEnd("fed", client, random.Random(seed))
        network = Network(ends, fates, max_packet)
        network.connect()
        return network

    return make
