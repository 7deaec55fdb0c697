"""A federation in virtual time whose machines lose power, links and room on their disks, and who saw what."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator.errors import FederationError
from coordinator.records import RoundRecord
from coordinator.state.journal import FILE
from coordinator.state.store import Store
from edge_client.errors import StateError
from protocol.bus import Publish
from protocol.codec import encode_adapter, encode_bank, sha256
from protocol.envelope import decode
from protocol.errors import KeyFileError, WireError
from protocol.messages import Manifest, Offer, Receipt, RoundPlan
from protocol.topics import parse
from protocol.trust.signing import key_text, opened, private_key, signer_of
from tests.faults.disk import LIVE, Calm, Disk, Disks, PowerCut
from tests.faults.machines import COORDINATOR, MODEL, ClientProcess, CoordinatorProcess, Scenario
from tests.network import STEP_S, Network

NAMED = (FederationError, StateError, KeyFileError)  # errors that say what to do; a service manager starts the process again
IDLE_S = 1.0
AGAIN_S = 5.0


def manifest_in(message: Publish) -> Manifest | None:
    """Return the manifest of a message, None if it holds none."""
    try:
        return decode(opened(message.payload, signer_of(message.payload))).manifest
    except WireError:
        return None


@dataclass
class Witness:
    """Reads along: every receipt that was given, every offer, every plan."""

    offers: dict[tuple[str, int, str], Offer] = field(default_factory=dict)
    receipts: dict[tuple[str, int, str], Receipt] = field(default_factory=dict)
    plans: list[RoundPlan] = field(default_factory=list)
    changed: list[tuple[Receipt, Receipt]] = field(default_factory=list)
    _read: int = 0

    def read(self, published: list[Publish]) -> None:
        """Take in what was said since."""
        for message in published[self._read :]:
            address = parse(message.topic)
            if address.kind == "offer" and isinstance(offer := manifest_in(message), Offer):
                self.offers[str(address.client), offer.round, offer.blob.sha256] = offer
            elif address.kind == "receipt" and isinstance(receipt := manifest_in(message), Receipt):
                key = (str(address.client), receipt.round, receipt.sha256)
                earlier = self.receipts.setdefault(key, receipt)
                if earlier.accepted and not receipt.accepted:
                    self.changed.append((earlier, receipt))
            elif address.kind == "round" and isinstance(plan := manifest_in(message), RoundPlan):
                self.plans.append(plan)
        self._read = len(published)

    @property
    def accepted(self) -> set[tuple[str, int, str]]:
        """What was said to be accepted: (client, round, hash)."""
        return {key for key, receipt in self.receipts.items() if receipt.accepted}


@dataclass(frozen=True)
class Outcome:
    """What a federation came to: its rounds without what clocks and counters say, and the hashes of what it knows."""

    rounds: tuple[tuple[Any, ...], ...]
    known: tuple[str, ...]


def outcome(world: World) -> Outcome:
    """Read what a federation has come to."""
    with world.store() as store:
        rounds = tuple(_essence(record) for record in store.records())
        known = store.models.knowledge()
    if known is None:
        return Outcome(rounds, ())
    own = [f"{client}={sha256(encode_adapter(adapter))}" for client, adapter in sorted(known.own.items())]
    return Outcome(rounds, (sha256(encode_bank(known.bank)), sha256(encode_adapter(known.adapter)), *own))


def _essence(record: RoundRecord) -> tuple[Any, ...]:
    return (record.round, record.outcome, *record.accepted, record.samples, record.loss, record.adapter_sha256, *record.own)


class World:
    """The machines of a federation, each with a disk. `step` lets a little time pass."""

    def __init__(self, folder: Path, disks: Disks, scenario: Scenario) -> None:
        self.network = Network({})
        self._folder, self._disks = folder, disks
        self.scenario = scenario
        self.witness = Witness()
        self.disks: dict[str, Disk] = {name: disks.add(folder / name) for name in (COORDINATOR, *scenario.clients)}
        self.running: dict[str, ClientProcess | CoordinatorProcess] = {}
        self.ended: list[tuple[str, BaseException]] = []  # processes that gave up, with what they said
        self.not_started: list[tuple[str, BaseException]] = []  # those that did so before they were at work
        self.cut: list[str] = []  # machines without power
        self.finished = False
        self.model = folder / "model"
        self.model.mkdir(exist_ok=True)
        (self.model / "config.json").write_text(MODEL)
        self.broker_up = True
        self.parted: set[str] = set()
        self._again: dict[str, float] = {}
        self.keys: dict[str, Ed25519PrivateKey] = {}
        self._pinned: str | None = None
        if scenario.enrolled:
            self.enrol()
        self._pace = STEP_S

    @property
    def records(self) -> list[RoundRecord]:
        """The records of the rounds that the coordinator has finished since its start."""
        process = self.running.get(COORDINATOR)
        return process.records if isinstance(process, CoordinatorProcess) else []

    @property
    def state(self) -> Path:
        """The coordinator's folder."""
        return self.disks[COORDINATOR].root

    def enrol(self) -> None:
        """Make all keys, register the devices and pin the coordinator's."""
        self.keys = {name: private_key(disk.root / "key.pem") for name, disk in self.disks.items()}
        self._pinned = key_text(self.keys[COORDINATOR].public_key())
        store = Store(self.state)
        for client in self.scenario.clients:
            store.registry.add(client, key_text(self.keys[client].public_key()))
        store.close()

    def start(self, *names: str) -> None:
        """Start processes, all by default; one that cannot start is started again later."""
        for name in names or tuple(self.disks):
            assert name not in self.running
            self._guarded(name, lambda name=name: self._start(name))  # type: ignore[misc]

    def _start(self, name: str) -> None:
        root = self.disks[name].root
        if name == COORDINATOR:
            process: Any = CoordinatorProcess(self.network, self.scenario, root, self.model)
        else:
            process = ClientProcess(self.network, name, root, self.scenario.step_s, self._pinned)
        self.running[name] = process
        self.network.ends[name] = process.socket
        self.network.cut(name)
        self.connect(name)

    def kill(self, name: str) -> None:
        """End a process as `kill -9` does; what it had asked of its disk happens."""
        self._again.pop(name, None)
        process = self.running.pop(name, None)
        if process is not None:
            self.network.cut(name, process.will if self.network.is_up(name) else None)
            image = self.disks[name].image(LIVE)
            process.gone()
            self.disks[name].restore(image)  # it closed its journal in good order, as no process does that is killed

    def cut_power(self, name: str, how: str) -> None:
        """End a process as a power cut does, and leave of its disk what that leaves."""
        image = self.disks[name].image(how)
        self.kill(name)
        self.disks[name].restore(image)

    def connect(self, name: str) -> None:
        """The link of a process comes up, if broker and network are there."""
        if name in self.running and self.broker_up and name not in self.parted and not self.network.is_up(name):
            self.network.connect(name)

    def part(self, name: str) -> None:
        """Part a machine from the broker, whatever process runs on it, until `heal`."""
        self.parted.add(name)
        self.disconnect(name)

    def heal(self, name: str) -> None:
        """Give a machine its network back."""
        self.parted.discard(name)
        self.connect(name)

    def stop_broker(self) -> None:
        """The broker dies with all that it had retained; nobody's will is said."""
        self.broker_up = False
        for name in self.running:
            if self.network.is_up(name):
                self.network.cut(name)
                self.running[name].socket.lost()
        self.network.lose_retained()

    def start_broker(self) -> None:
        """Another broker is there, which knows nothing."""
        self.broker_up = True
        for name in self.running:
            self.connect(name)

    def disconnect(self, name: str) -> None:
        """The link of a process goes down; the broker says its will."""
        if name in self.running and self.network.is_up(name):
            self.network.cut(name, self.running[name].will)
            self.running[name].socket.lost()

    @contextmanager
    def store(self) -> Iterator[Store]:
        """Look into the coordinator's state beside it."""
        store = Store(self.state)
        try:
            yield store
        finally:
            store.close()
            if (self.state / FILE).exists():
                self.disks[COORDINATOR].committed(str(self.state / FILE))  # the last one to close tidies up, safely

    def step(self, seconds: float | None = None) -> None:
        """Let time pass: little while something is under way, more while all wait, or so many seconds at once."""
        self.network.step(seconds or self._pace)
        for name, when in list(self._again.items()):
            if self.network.now >= when and name not in self.running:
                del self._again[name]
                self.start(name)
        said = len(self.network.published)
        for name in list(self.running):
            self._guarded(name, self.running[name].turn)
        self.witness.read(self.network.published)
        busy = len(self.network.published) > said or any(
            isinstance(process, ClientProcess) and process.is_training for process in self.running.values()
        )
        self._pace = STEP_S if busy else min(IDLE_S, 1.5 * self._pace)

    def pass_time(self, seconds: float) -> None:
        """Let so much time pass."""
        end = self.network.now + seconds
        while self.network.now < end:
            self.step()

    def run(self, until: Callable[[], bool], limit_s: float = 7200.0) -> None:
        """Let time pass until something is so."""
        end = self.network.now + limit_s
        while not until():
            assert self.network.now < end, f"nothing came of it in {limit_s} virtual seconds; ended: {self.ended}"
            self.step()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self._disks.fault = Calm()
        for name in list(self.running):
            self.kill(name)
        for disk in self.disks.values():
            self._disks.forget(disk.root)
        shutil.rmtree(self._folder)

    def _guarded(self, name: str, do: Callable[[], None]) -> None:
        """Do something in a process, and see how it ends."""
        try:
            do()
        except PowerCut:
            self.cut.append(name)
            self.kill(name)
        except NAMED as error:
            at_work = name in self.running and self.running[name].started
            (self.ended if at_work else self.not_started).append((name, error))
            self.kill(name)
            self._again[name] = self.network.now + AGAIN_S
        process = self.running.get(name)
        if isinstance(process, CoordinatorProcess):
            self.finished |= process.finished
