"""Binds an end (client or coordinator, sans-I/O) to a bus: the only loop that moves messages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from protocol.bus import Action, Bus, Event

EventOut = TypeVar("EventOut", covariant=True)
Out = TypeVar("Out")

TICK_S = 0.02


class End(Protocol[EventOut]):
    """What ClientEnd and CoordinatorEnd have in common."""

    def handle(self, event: Event, now: float) -> tuple[list[Action], Sequence[EventOut]]:
        """Take in a bus event; return actions and events."""

    def tick(self, now: float, room: int, drained: bool = True) -> list[Action]:
        """Return what is due now."""


class Link(Generic[Out]):
    """An end on a bus."""

    def __init__(self, bus: Bus, end: End[Out], clock: Callable[[], float] = time.monotonic) -> None:
        self.bus = bus
        self._end = end
        self._clock = clock
        self._woken = threading.Event()

    def wake(self) -> None:
        """Make a waiting `poll` return, from any thread."""
        self._woken.set()
        self.bus.wake()

    def do(self, actions: Sequence[Action]) -> None:
        """Carry out actions that the end returned, in order."""
        for action in actions:
            self.bus.do(action)

    def poll(self, timeout: float) -> list[Out]:
        """Move messages until something happens that the caller should know, a wake, or `timeout` seconds have passed."""
        deadline = self._clock() + timeout
        while True:
            self.do(self._end.tick(self._clock(), self.bus.room(), self.bus.drained()))
            left = deadline - self._clock()
            event = self.bus.receive(max(0.0, min(left, TICK_S)))
            if event is None:
                if left <= TICK_S or self._woken.is_set():
                    self._woken.clear()
                    return []
                continue
            actions, events = self._end.handle(event, self._clock())
            self.do(actions)
            if events or left <= 0:
                return list(events)
