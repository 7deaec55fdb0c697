"""A broker in virtual time, for ends of the wire that are tested without a real one."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from protocol.bus import Action, Connected, Delivery, Event, Publish, Subscribe, matches
from protocol.client_end import ClientEnd
from protocol.coordinator_end import CoordinatorEnd
from protocol.errors import WireError
from protocol.events import OfferMade
from protocol.messages import Manifest
from protocol.topics import parse

STEP_S = 0.05
Ends = dict[str, Any]
"""By name: ClientEnd, CoordinatorEnd, or what stands where one stands."""


def addressee(topic: str) -> str | None:
    """Return the client that a topic is to, None if it is to all, to the coordinator, or no topic of ours."""
    try:
        address = parse(topic)
    except WireError:
        return None
    return address.client if address.direction == "to" else None


class Network:
    """A broker in virtual time whose messages meet a fate each: deliver, lose, twice, tenfold, late (behind later ones).

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
        self.fates = iter(fates)
        self._down: set[str] = set()
        self.broker: Callable[[str, Event], Iterable[Event]] = lambda _, event: (
            event,
        )  # one that forges says something else
        self._order = itertools.count()
        self._under_way: list[tuple[float, int, str, Delivery]] = []

    def connect(self, *names: str) -> None:
        for name in names or tuple(self.ends):
            self._down.discard(name)
            self._filters.setdefault(name, set()).clear()
            self._give(name, Connected(self.max_packet))

    def cut(self, name: str, will: Publish | None = None) -> None:
        """The link of an end is gone, with all that was under way to it, until it connects again; its last will is said."""
        self._down.add(name)
        self._filters.setdefault(name, set()).clear()
        self._under_way = [one for one in self._under_way if one[2] != name]
        heapq.heapify(self._under_way)
        if will is not None:
            self._publish(will)

    def is_up(self, name: str) -> bool:
        return name in self._filters and name not in self._down

    def lose_retained(self) -> None:
        """As a broker that was killed and keeps nothing."""
        self._under_way.clear()
        self._retained.clear()

    def replace_broker(self, max_packet: int | None, *names: str) -> None:
        """Another broker takes over: what the old one had under way or retained is lost. The ends connect in this order."""
        self.lose_retained()
        for filters in self._filters.values():
            filters.clear()
        self.max_packet = max_packet
        self.connect(*names)

    def do(self, name: str, actions: Iterable[Action]) -> None:
        for action in actions if name not in self._down else ():
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

    def step(self, seconds: float = STEP_S) -> None:
        self.now += seconds
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
        return Delivery(topic, self.ends[name]._signer.seal("fed", name, manifest, addressee(topic)))

    def seen(self, name: str, kind: type) -> list:
        return [event for event in self.events[name] if isinstance(event, kind)]

    def _give(self, name: str, event: Event) -> None:
        for said in self.broker(name, event):
            self._hand(name, said)

    def _hand(self, name: str, event: Event) -> None:
        actions, events = self.ends[name].handle(event, self.now)
        self.events.setdefault(name, []).extend(events)
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
        fate = next(self.fates, "deliver")
        if fate == "lose":
            return
        delays = {"twice": (0.0, 1.0), "tenfold": tuple(i / 4 for i in range(10)), "late": (3.0,)}.get(fate, (0.0,))
        for delay in delays:
            heapq.heappush(self._under_way, (self.now + delay, next(self._order), name, delivery))
