"""Watches a federation without taking part: every client's retained status."""

from __future__ import annotations

import logging

from protocol.bus import Action, Connected, Delivery, Event, Subscribe
from protocol.envelope import expect
from protocol.errors import WireError
from protocol.events import ClientSeen
from protocol.messages import Status
from protocol.topics import Topics, parse
from protocol.trust.gate import FirstUse, Gate

log = logging.getLogger(__name__)


class Observer:
    """An end that only listens."""

    def __init__(self, federation: str) -> None:
        self._topics = Topics(federation)
        self._gate = Gate(federation, FirstUse())

    def handle(self, event: Event, _now: float) -> tuple[list[Action], list[ClientSeen]]:
        """Report each status that comes in."""
        if isinstance(event, Connected):
            return [Subscribe(self._topics.status_filter())], []
        if isinstance(event, Delivery):
            try:
                address = parse(event.topic)
                if address.client is not None:
                    status = expect(self._gate.open(address, event.payload), Status)
                    return [], [ClientSeen(address.client, status)]
            except WireError as error:
                self._gate.refuse(event.topic, error)
        return [], []

    def tick(self, _now: float, _room: int, _drained: bool = True) -> list[Action]:
        """Nothing is ever due."""
        return []
