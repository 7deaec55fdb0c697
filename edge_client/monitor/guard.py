"""Watches the board: training waits while it is too hot or its supply cannot follow, and others may see how it is."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from edge_client.monitor.readings import Readings
from hardware_profiles.profile import Thermal
from protocol.messages import Board

log = logging.getLogger(__name__)

CHECK_S = 5.0
MINUTE_S = 60.0
UNKNOWN = Board()


class Guard:
    """Holds training back by a profile's limits. One thread calls `hold`, others `reason` and `board`.

    `about` is what does not change: the platform and its release.
    """

    def __init__(
        self,
        limits: Thermal | None,
        read: Callable[[], Readings],
        about: Board = UNKNOWN,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = CHECK_S,
    ) -> None:
        self.fallback = ""  # what the client does other than its settings ask for
        self.reason = ""  # why training waits at this moment; empty while it does not
        self._limits = limits
        self._about = about
        self._read = read
        self._clock = clock
        self._every_s = every_s
        self._lock = threading.Lock()
        self._last = Readings()
        self._checked: float | None = None  # when the board was asked last
        self._held: float | None = None  # when a training was last held back, or not
        self._events: list[tuple[float, int]] = []  # over-current events by time, of the last minute

    def hold(self, stopped: threading.Event) -> bool:
        """Return at once if the board is well, or else when it is again; in the end, whether `stopped` is set."""
        if self._limits is None or not self._is_due(self._held):
            return stopped.is_set()
        while not stopped.is_set():
            self._held = self._clock()
            reason = self._problem(self.readings())
            if reason and not self.reason:
                log.warning("training waits: %s", reason)
            elif self.reason and not reason:
                log.info("training goes on")
            self.reason = reason
            if not reason:
                break
            stopped.wait(self._every_s)
        else:
            self.reason = ""
        return stopped.is_set()

    def readings(self) -> Readings:
        """Return what the board says, at most `every_s` old."""
        with self._lock:
            if self._is_due(self._checked):
                self._checked, self._last = self._clock(), self._read()
            return self._last

    def report(self, fallback: str) -> None:
        """Take in what the client does other than its settings ask for."""
        self.fallback = fallback

    def board(self) -> Board:
        """Return what others may know of the board."""
        found = self.readings()
        told = {
            "power_mode": found.power_mode,
            "temperature_c": found.hottest_c,
            "power_w": found.power_w,
            "gpu_load": found.gpu_load,
            "memory_available_mib": found.memory_available_mib,
            "over_current_events": found.over_current_events,
            "fallback": self.fallback,
        }
        return Board.model_validate({**self._about.model_dump(), **told})

    def _is_due(self, last: float | None) -> bool:
        return last is None or self._clock() - last >= self._every_s

    def _problem(self, readings: Readings) -> str:
        """Return why training has to wait, empty if it need not: once waiting, until it is cool again."""
        assert self._limits is not None
        limit = self._limits.resume_below_c if self.reason else self._limits.pause_above_c
        hottest = readings.hottest_c
        if hottest is not None and hottest > limit:
            return f"{hottest:.0f} C, it goes on below {self._limits.resume_below_c:.0f} C"
        events = self._recent(readings.over_current_events)
        if events > self._limits.over_current_per_minute:
            return f"{events} over-current events in a minute: the power supply is too weak for this power mode"
        return ""

    def _recent(self, count: int | None) -> int:
        """Return how many over-current events there were within the last minute."""
        if count is None:
            return 0
        now = self._clock()
        self._events = [(at, seen) for at, seen in self._events if now - at <= MINUTE_S] or [(now, count)]
        self._events.append((now, count))
        return max(0, count - self._events[0][1])
