"""The processes of a federation in virtual time, as the commands start them: a coordinator, and clients.

All that is real is real: ends, gates, keys, links, Federation, Store, Outbox, checkpoints, files. Only the broker and the
time are not. The coordinator's loop runs in a thread that is let go on and stopped again at each turn (strictly one runs).
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from coordinator.config import CoordinatorConfig
from coordinator.recipe import parse_recipe
from coordinator.records import RoundRecord
from coordinator.rounds import Federation
from coordinator.state.devices import Devices
from coordinator.state.store import Store
from edge_client.checkpoint import Checkpoint
from edge_client.outbox import Outbox
from edge_client.participate import carry_out, finished
from edge_client.participation import Participation, Step, Train
from protocol.bus import Action, Disconnected, Event, Publish
from protocol.client_end import ClientEnd
from protocol.coordinator_end import CoordinatorEnd
from protocol.link import Link
from protocol.messages import Status, TextBank, TrainingResult
from protocol.trust.gate import Pinned
from tests.faults.training import training
from tests.network import Network

FEDERATION = "lab"
COORDINATOR = "coordinator"
CLASSES = ("cat", "dog", "fox")
MODEL = """{"model_type": "clip", "projection_dim": 8,
 "text_config": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
 "vision_config": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8,
                   "image_size": 8, "patch_size": 8}}"""


@dataclass(frozen=True)
class Scenario:
    """What a federation is to do: who takes part, for how long, by which recipe."""

    clients: tuple[str, ...] = ("ann", "bob", "cid")
    rounds: int = 2
    per_round: int = 3
    quorum: int = 3
    deadline_s: float = 3600.0
    recipe: str = "fedlora+rank=2+projections=q_proj/v_proj+features_per_class=1+personal.query=R1+personal.start=own"
    step_s: float = 0.5
    uploads_at_once: int = 2
    enrolled: bool = False  # devices are registered and the coordinator's key is pinned before anything is said

    def config(self, state: Path, model: Path) -> CoordinatorConfig:
        """Return the coordinator's settings."""
        return CoordinatorConfig(
            federation=FEDERATION,
            classes=CLASSES,
            model=str(model),
            rounds=self.rounds,
            clients_per_round=self.per_round,
            quorum=self.quorum,
            deadline_s=self.deadline_s,
            state=state,
            uploads_at_once=self.uploads_at_once,
            admission="registered" if self.enrolled else "open",
            recipe=parse_recipe(self.recipe),
        )


SMALL = Scenario(clients=("ann", "bob"), rounds=1, per_round=2, quorum=2, uploads_at_once=1)
WHOLE = Scenario()


def a_bank() -> TextBank:
    """Three classes, eight wide."""
    return TextBank(1, CLASSES, ("a {}",), np.eye(3, 8, dtype=np.float32), 10.0, "none", "d" * 64)


class Killed(BaseException):
    """The process is no more."""


class Socket:
    """A process's connection, between its Link and the Network."""

    def __init__(self, network: Network, name: str, pause: Callable[[], None] = lambda: None) -> None:
        self.inbox: deque[Event] = deque()
        self._network, self._name, self._pause = network, name, pause

    def handle(self, event: Event, _now: float) -> tuple[list[Action], list[object]]:
        """Keep what the network brings."""
        self.inbox.append(event)
        return [], []

    def tick(self, _now: float, _room: int, _drained: bool = True) -> list[Action]:
        """Nothing is due by itself."""
        return []

    def lost(self) -> None:
        """Tell the process that the link is down."""
        self.inbox.append(Disconnected("the link is cut"))

    def do(self, action: Action) -> None:
        """Carry out an action, at once if connected."""
        self._network.do(self._name, [action])

    def receive(self, timeout: float) -> Event | None:
        """Return the next event; with none, let the others go on."""
        if not self.inbox and timeout > 0:
            self._pause()
        return self.inbox.popleft() if self.inbox else None

    def room(self) -> int:
        """Return the free window."""
        return 8

    def drained(self) -> bool:
        """Tell that the broker has it all."""
        return True

    def wake(self) -> None:
        """Nobody waits."""

    def close(self, last: Publish | None = None) -> None:
        """Say the last word."""
        if last is not None:
            self.do(last)


class ClientProcess:
    """A client, as `clipcast client run` starts it."""

    started = True

    def __init__(self, network: Network, name: str, state: Path, step_s: float, pinned: str | None = None) -> None:
        self._network, self._name, self._step_s = network, name, step_s
        self._checkpoint = Checkpoint(state / "checkpoint.safetensors", every_s=0.0)
        self._training: Generator[None, None, TrainingResult] | None = None
        self._next = 0.0
        self.spoils = False  # whether its next training comes to nothing good
        self.will: Publish | None = None
        self._outbox = Outbox(state)
        try:
            self.end = ClientEnd(FEDERATION, name, random.Random(name), state, Pinned(state / "coordinator.key", pinned))
            self.will = self.end.will()
            self._part = Participation(Status(state="online"), self._outbox.load())
            self.end.announce(Status(state="online"))
        except BaseException:
            self._outbox.close()
            raise
        self.socket = Socket(network, name)
        self._link = Link(self.socket, self.end, lambda: network.now)

    @property
    def is_training(self) -> bool:
        """Whether a training is under way."""
        return self._training is not None

    def turn(self) -> None:
        """Do what is due."""
        while True:
            self._carry_out([step for event in self._link.poll(0.0) for step in self._part.on(event)])
            if not self.socket.inbox:
                break
        if self._training is not None and self._network.now >= self._next:
            self._next = self._network.now + self._step_s
            try:
                next(self._training)
            except StopIteration as end:
                self._training = None
                done: Future[TrainingResult] = Future()
                done.set_result(_spoilt(end.value) if self.spoils else end.value)
                self.spoils = False
                self._carry_out(finished(self._part, self.end, done))

    def gone(self) -> None:
        """The process is over, in whatever way."""
        self._outbox.close()

    def _carry_out(self, steps: list[Step]) -> None:
        for step in steps:
            if isinstance(step, Train):
                self._training = training(step.ready, self._name, self._checkpoint)
                self._next = self._network.now + self._step_s
        carry_out(steps, self._link, self.end, self._outbox)


def _spoilt(result: TrainingResult) -> TrainingResult:
    return replace(result, update=replace(result.update, prototypes=2 * result.update.prototypes))


@dataclass
class _Baton:
    """Who has it runs."""

    _go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _back: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def give(self) -> None:
        """Let the other go on until it gives it back."""
        self._go.release()
        self._back.acquire()

    def give_back(self) -> None:
        """Let the first one go on."""
        self._back.release()

    def wait(self) -> None:
        """Wait for it."""
        self._go.acquire()


class CoordinatorProcess:
    """A coordinator, as `clipcast coordinator run` starts it. `error` is what it ended with, if it did not end well."""

    will: Publish | None = None

    def __init__(self, network: Network, scenario: Scenario, state: Path, model: Path) -> None:
        self.records: list[RoundRecord] = []
        self.error: BaseException | None = None
        self.finished = self.started = False
        self._config = scenario.config(state, model)
        self._network, self._state = network, state
        self._baton = _Baton()
        self._killed = False
        self._store: Store | None = None
        self.end: CoordinatorEnd | None = None
        self.socket = Socket(network, COORDINATOR, self._pause)
        self._thread = threading.Thread(target=self._main, name=COORDINATOR, daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether the process has ended by itself."""
        return self.finished or self.error is not None

    def turn(self) -> None:
        """Do what is due. Raises what it ended with, once."""
        if not self.is_over:
            self._baton.give()
            if self.error is not None:
                raise self.error

    def gone(self) -> None:
        """The process is over, in whatever way."""
        if not self.is_over:
            self._killed = True
            self._baton.give()
        self._thread.join()
        if self._store is not None:
            self._store.close()

    def _pause(self) -> None:
        self._baton.give_back()
        self._baton.wait()
        if self._killed:
            raise Killed

    def _main(self) -> None:
        self._baton.wait()
        try:
            if not self._killed:
                self._run()
                self.finished = True
        except BaseException as error:  # noqa: BLE001 - turn() raises it
            self.error = error
        self._baton.give_back()

    def _run(self) -> None:
        config, clock = self._config, lambda: self._network.now
        self._store = store = Store(config.state, config.journal, config.keep_rounds)
        store.prepare()
        devices = Devices(store, config.admission, clock)
        self.end = CoordinatorEnd(
            FEDERATION,
            random.Random(0),
            uploads_at_once=config.uploads_at_once,
            state=config.state,
            trust=devices,
            seal_updates=config.seal_updates,
        )
        link = Link(self.socket, self.end, clock)
        federation = Federation(config, a_bank(), link, self.end, store, devices, clock)
        self.started = True
        for record in federation.run():
            self.records.append(record)
