"""What carries messages: the `Bus` interface, and `MemoryBus`, a broker in memory for tests and simulation.

A bus moves topics and bytes. `publish` and `subscribe` never block; `receive` waits. A message may be lost, repeated or
late on any bus: the ends (client_end.py, coordinator_end.py) are written for that.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field
from typing import Protocol

from protocol.errors import BusError


@dataclass(frozen=True)
class Connected:
    """The broker took us in (again): subscriptions and retained messages must be made anew."""

    max_packet: int | None = None


@dataclass(frozen=True)
class Disconnected:
    """The link is down; the bus is already trying again."""

    reason: str


@dataclass(frozen=True)
class Delivery:
    """A message came in."""

    topic: str
    payload: bytes


Event = Connected | Disconnected | Delivery


@dataclass(frozen=True)
class Publish:
    """Send `payload`; it is worthless after `expiry_s` seconds (None: keep)."""

    topic: str
    payload: bytes
    retain: bool = False
    expiry_s: int | None = None


@dataclass(frozen=True)
class Subscribe:
    """Start listening to a topic filter."""

    filter: str


@dataclass(frozen=True)
class Unsubscribe:
    """Stop listening to a topic filter."""

    filter: str


Action = Publish | Subscribe | Unsubscribe


class Bus(Protocol):
    """A connection to a broker."""

    def do(self, action: Action) -> None:
        """Carry out an action, as soon as connected; raises BusError if the broker could never take it."""

    def receive(self, timeout: float) -> Event | None:
        """Return the next event, or None after `timeout` seconds or a `wake`."""

    def room(self) -> int:
        """How many more chunks may be handed over before the window is full."""

    def drained(self) -> bool:
        """Whether all that was handed over has reached the broker, or is lost."""

    def wake(self) -> None:
        """Make a waiting `receive` return (from any thread)."""

    def close(self, last: Publish | None = None) -> None:
        """Send `last`, then leave in good order, without the last will."""


def matches(topic_filter: str, topic: str) -> bool:
    """Tell whether an MQTT topic filter with + and # covers a topic."""
    wanted, levels = topic_filter.split("/"), topic.split("/")
    for position, part in enumerate(wanted):
        if part == "#":
            return True
        if position >= len(levels) or part not in ("+", levels[position]):
            return False
    return len(wanted) == len(levels)


@dataclass
class MemoryBroker:
    """Carries messages between the MemoryBuses of one process: retained messages, last wills, an optional packet limit."""

    max_packet: int | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _buses: list[MemoryBus] = field(default_factory=list)
    _retained: dict[str, bytes] = field(default_factory=dict)

    def connect(self, will: Publish | None = None) -> MemoryBus:
        """Return a new connected bus."""
        bus = MemoryBus(self, will)
        with self._lock:
            self._buses.append(bus)
        bus.put(Connected(self.max_packet))
        return bus

    def route(self, message: Publish) -> None:
        """Deliver to every subscriber, and keep if retained."""
        with self._lock:
            if message.retain and message.payload:
                self._retained[message.topic] = message.payload
            elif message.retain:
                self._retained.pop(message.topic, None)
            for bus in self._buses:
                if any(matches(wanted, message.topic) for wanted in bus.filters):
                    bus.put(Delivery(message.topic, message.payload))

    def subscribe(self, bus: MemoryBus, topic_filter: str) -> None:
        """Add a subscription and deliver what is retained for it."""
        with self._lock:
            bus.filters.add(topic_filter)
            for topic, payload in self._retained.items():
                if matches(topic_filter, topic):
                    bus.put(Delivery(topic, payload))

    def leave(self, bus: MemoryBus, will: Publish | None) -> None:
        """Forget a bus, and say its last will if it left in bad order."""
        with self._lock:
            if bus in self._buses:
                self._buses.remove(bus)
                if will:
                    self.route(will)


class MemoryBus:
    """One participant's connection to a MemoryBroker. It passes encoded bytes, exactly as MQTT would."""

    WINDOW = 64

    def __init__(self, broker: MemoryBroker, will: Publish | None = None) -> None:
        self.filters: set[str] = set()
        self._broker = broker
        self._will = will
        self._inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()

    def put(self, event: Event | None) -> None:
        """Hand an event to this participant."""
        self._inbox.put(event)

    def do(self, action: Action) -> None:
        """Carry out an action at once."""
        match action:
            case Publish(topic=topic, payload=payload):
                limit = self._broker.max_packet
                if limit is not None and len(payload) + len(topic) > limit:
                    raise BusError(f"{len(payload)} bytes on {topic} exceed the broker's limit of {limit} bytes a packet")
                self._broker.route(action)
            case Subscribe(filter=topic_filter):
                self._broker.subscribe(self, topic_filter)
            case Unsubscribe(filter=topic_filter):
                self.filters.discard(topic_filter)

    def receive(self, timeout: float) -> Event | None:
        """Return the next event, or None after `timeout` seconds or a wake."""
        try:
            return self._inbox.get(timeout=max(timeout, 0.0)) if timeout > 0 else self._inbox.get_nowait()
        except queue.Empty:
            return None

    def idle(self) -> bool:
        """Tell whether no event waits to be received."""
        return self._inbox.empty()

    def room(self) -> int:
        """Memory has no slow link: the window is always open."""
        return self.WINDOW

    def drained(self) -> bool:
        """Memory carries at once."""
        return True

    def wake(self) -> None:
        """Make a waiting receive return."""
        self.put(None)

    def close(self, last: Publish | None = None) -> None:
        """Send `last` and leave without the will."""
        if last:
            self.do(last)
        self._broker.leave(self, None)

    def drop(self) -> None:
        """Vanish as a crashed process does: the broker says the last will."""
        self._broker.leave(self, self._will)
