"""Virtual clients on a MemoryBus: real ends, real state machines, moved by whoever waits for them."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from clipcast.simulate.engine import Engine
from edge_client.participate import carry_out, finished
from edge_client.participation import Participation, Step, Train
from protocol.bus import Action, Event, MemoryBroker, MemoryBus
from protocol.client_end import ClientEnd
from protocol.events import ClientEvent, PlanReady
from protocol.link import Link
from protocol.messages import Status, TrainingResult

IDLE_S = 0.002


class Clock:
    """Seconds without the time spent in training: a simulated client trains while the others' clocks stand still."""

    def __init__(self) -> None:
        self._excluded = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return time.monotonic() - self._excluded

    def exclude(self, since: float) -> None:
        """Leave out the time since `since`, a reading of time.monotonic."""
        self._excluded += time.monotonic() - since


@dataclass
class _Client:
    name: str
    end: ClientEnd
    bus: MemoryBus
    link: Link[ClientEvent]
    part: Participation

    def carry_out(self, steps: list[Step]) -> list[PlanReady]:
        """Do what concerns the wire; return what is to be trained."""
        carry_out(steps, self.link, self.end)
        return [step.ready for step in steps if isinstance(step, Train)]


class Fleet:
    """All virtual clients. `turn` lets them do what is due, in the caller's thread."""

    def __init__(self, broker: MemoryBroker, federation: str, names: Sequence[str], engine: Engine, bits: int) -> None:
        self.clock = Clock()
        self._engine = engine
        self._waiting: deque[tuple[_Client, PlanReady]] = deque()
        self._training: dict[Future[TrainingResult], _Client] = {}
        self._clients: list[_Client] = []
        for name in names:
            end = ClientEnd(federation, name, random.Random(name))
            status = Status.model_validate({"state": "online", "bits": bits})
            end.announce(status)
            bus = broker.connect(end.will())
            self._clients.append(_Client(name, end, bus, Link(bus, end, self.clock), Participation(status)))

    def turn(self, timeout: float) -> None:
        """Move messages; when there are none, train, or wait at most `timeout` seconds. Raises what a training raises."""
        moved = False
        for client in self._clients:
            moved |= not client.bus.idle()
            events = client.link.poll(0.0)
            steps = [step for event in events for step in client.part.on(event)]
            self._waiting.extend((client, ready) for ready in client.carry_out(steps))
        if not moved and (self._waiting or self._training):
            self._train(timeout)
        elif not moved:
            time.sleep(min(timeout, IDLE_S))  # until a timer of some end is due

    def _train(self, timeout: float) -> None:
        started = time.monotonic()
        while self._waiting:
            client, ready = self._waiting.popleft()
            future = self._engine.submit(client.name, ready)
            self._training[future] = client
            if future.done():
                break
        done, _ = wait(self._training, timeout, FIRST_COMPLETED)
        self.clock.exclude(started)
        for future in sorted(done, key=lambda future: self._training[future].name):
            client = self._training.pop(future)
            steps = finished(client.part, client.end, future)
            self._waiting.extend((client, ready) for ready in client.carry_out(steps))


class CoordinatorBus:
    """The coordinator's MemoryBus: while it has nothing to receive, the fleet works."""

    def __init__(self, bus: MemoryBus, fleet: Fleet) -> None:
        self._bus = bus
        self._fleet = fleet

    def do(self, action: Action) -> None:
        """Carry out an action at once."""
        self._bus.do(action)

    def receive(self, timeout: float) -> Event | None:
        """Return the next event, letting the fleet work if there is none yet."""
        event = self._bus.receive(0.0)
        if event is None:
            self._fleet.turn(timeout)
            event = self._bus.receive(0.0)
        return event

    def room(self) -> int:
        """Memory has no slow link: the window is always open."""
        return self._bus.room()

    def drained(self) -> bool:
        """Memory carries at once."""
        return True

    def wake(self) -> None:
        """Make a waiting receive return."""
        self._bus.wake()

    def close(self, last: object = None) -> None:
        """Leave."""
        del last
        self._bus.close()
