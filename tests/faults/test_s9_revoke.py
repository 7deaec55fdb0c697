"""S9: a stolen device is cut off within seconds, nobody else notices; and all keys are renewed without losing a round.

A real coordinator process, a real Mosquitto with mutual TLS and our access rules, the real commands; clients without torch.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clipcast.cli import app
from coordinator.records import RoundRecord
from coordinator.state.registry import Device
from coordinator.state.store import Store
from protocol.bus import Action, Bus, Connected, Event, Publish
from protocol.client_end import ClientEnd
from protocol.events import Answered, Finished, LinkChanged, Noticed, PlanReady
from protocol.link import Link
from protocol.messages import Receipt, Status
from protocol.transfer.exchange import PACKET_MARGIN
from protocol.trust.gate import Pinned
from protocol.trust.signing import Signer
from tests.conftest import wait_until
from tests.faults.lab import Lab, new_authority, secured_mosquitto
from tests.faults.light import light_result

CLIENTS = ("ann", "bob", "eve")
LONG_S = 120.0  # for what takes a second on a quiet machine


class Throttled:
    """A bus that hands over a chunk every so many seconds: a link so slow that an upload lasts."""

    def __init__(self, bus: Bus, every_s: float) -> None:
        self._bus = bus
        self._every_s = every_s
        self._next = 0.0
        self.chunks = 0

    def do(self, action: Action) -> None:
        if isinstance(action, Publish) and "/blob/" in action.topic:
            self._next = time.monotonic() + self._every_s
            self.chunks += 1
        self._bus.do(action)

    def receive(self, timeout: float) -> Event | None:
        return self._bus.receive(timeout)

    def room(self) -> int:
        return min(1, self._bus.room()) if time.monotonic() >= self._next else 0

    def drained(self) -> bool:
        return self._bus.drained()

    def wake(self) -> None:
        self._bus.wake()

    def close(self, last: Publish | None = None) -> None:
        self._bus.close(last)


class Client:
    """A device at work in a thread: it offers an update for each plan up to round `may_offer`."""

    def __init__(self, lab: Lab, folder: Path, name: str, key: str | None = None, every_s: float = 0.0) -> None:
        self.name = name
        self.may_offer = 0
        self.receipts: list[Receipt] = []
        self.notices: list[str] = []
        self.disconnects = 0
        self.finished = False
        trust = Pinned(folder / "coordinator.key", key)
        self.end = ClientEnd("lab", name, random.Random(name), folder, trust)
        self.bus = Throttled(lab.open(name, will=self.end.will()), every_s)
        self._link = Link(self.bus, self.end)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name)
        self.ready: PlanReady | None = None
        # The lab has taken the first event. A slow link has small chunks: its upload lasts for minutes.
        for action in self.end.handle(Connected(4096 + PACKET_MARGIN if every_s else None), 0.0)[0]:
            self.bus.do(action)
        self._thread.start()

    def _work(self) -> None:
        self._link.do(self.end.announce(Status(state="online")))
        last = time.monotonic()
        while not self._stop.is_set():
            for event in self._link.poll(0.1):
                self._take(event)
            if self.ready is not None and self.ready.plan.round <= self.may_offer:
                plan = self.ready.plan
                self._link.do(self.end.offer(self.end.pack(light_result(self.ready, self.name), plan)))
                self.ready = None
            if time.monotonic() - last > 2.0:  # what the broker or the gate did not take is said again
                self._link.do(self.end.announce(Status(state="online")))
                last = time.monotonic()

    def _take(self, event: object) -> None:
        match event:
            case PlanReady():
                self.ready = event
            case Answered(receipt=receipt):
                self.receipts.append(receipt)
            case Noticed(notice=notice):
                self.notices.append(notice.reason)
            case LinkChanged(up=False):
                self.disconnects += 1
            case Finished():
                self.finished = True

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(30)
        self.bus.close(self.end.farewell())

    def accepted(self) -> list[int]:
        return [receipt.round for receipt in self.receipts if receipt.accepted]


def command(*arguments: str) -> str:
    """Run a command in this process."""
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


class Coordinator:
    """`clipcast coordinator run` as a process, which can be started again."""

    def __init__(self, lab: Lab, folder: Path, **settings: object) -> None:
        folder.mkdir()
        self.settings = folder / "coordinator.toml"
        files = "\n".join(
            f'{key} = "{lab.ca / file}"'
            for key, file in (("ca_file", "ca.pem"), ("cert_file", "coordinator.pem"), ("key_file", "coordinator.key"))
        )
        lines = "\n".join(f"{key} = {value}" for key, value in settings.items())
        self.settings.write_text(
            f'federation = "lab"\nclasses = ["a", "b"]\nclients_per_round = 3\ndeadline_s = 600\nadmission = "registered"\n'
            f'{lines}\n[recipe]\nname = "fedlora"\nrank = 64\n[broker]\nurl = "{lab.url}"\n{files}\n'
        )
        self.state = folder / "state"
        self._log = (folder / "log").open("w")
        self._process: subprocess.Popen[bytes] | None = None

    def key(self) -> str:
        return command("coordinator", "key", str(self.settings))

    def start(self) -> None:
        program = [sys.executable, "-m", "clipcast", "coordinator", "run", str(self.settings)]
        self._process = subprocess.Popen(program, stdout=self._log, stderr=self._log)

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(60)

    def wait(self) -> None:
        assert self._process is not None
        assert self._process.wait(LONG_S) == 0

    def records(self) -> list[RoundRecord]:
        store = Store(self.state)
        try:
            return store.records()
        finally:
            store.close()

    def devices(self) -> dict[str, Device]:
        store = Store(self.state)
        try:
            return store.registry.devices()
        finally:
            store.close()

    def add(self, name: str, folder: Path) -> None:
        command("device", "add", name, Signer.open(folder).public, "--coordinator", str(self.settings))

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._log.close()


@pytest.fixture
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("s9")
    with secured_mosquitto(folder / "broker", new_authority(folder / "ca", ("coordinator", *CLIENTS)).folder) as running:
        yield running


@contextlib.contextmanager
def federation(
    lab: Lab, folder: Path, every_s: float = 0.0, **settings: object
) -> Iterator[tuple[Coordinator, dict[str, Client]]]:
    """Start a coordinator and three clients that it knows; eve has a slow link."""
    coordinator = Coordinator(lab, folder / "lab", **settings)
    clients: dict[str, Client] = {}
    try:
        for name in CLIENTS:
            coordinator.add(name, folder / name)
        key = coordinator.key()
        for name in CLIENTS:
            pinned, slow = name == "ann", name == "eve"  # the others believe the first coordinator that they see
            clients[name] = Client(lab, folder / name, name, key if pinned else None, every_s if slow else 0.0)
        coordinator.start()
        yield coordinator, clients
    finally:
        for client in clients.values():
            client.stop()
        coordinator.close()


class Watch(threading.Thread):
    """Sees when the part of an upload that the coordinator has on its disk grows."""

    def __init__(self, folder: Path, owner: str) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self._owner = owner
        self._stop_watching = threading.Event()
        self.size = 0
        self.grew_at = 0.0
        self.start()

    def run(self) -> None:
        while not self._stop_watching.wait(0.005):
            with contextlib.suppress(FileNotFoundError):
                size = sum(path.stat().st_size for path in self._folder.glob(f"{self._owner}@*"))
                if size > self.size:
                    self.grew_at = time.monotonic()
                self.size = size

    def end(self) -> None:
        self._stop_watching.set()
        self.join()


def test_s9_a_stolen_device_is_cut_off_while_it_uploads(lab: Lab, tmp_path: Path, score: Callable[..., None]) -> None:
    with federation(lab, tmp_path, every_s=0.25, rounds=2, quorum=2) as (coordinator, clients):
        eve, others = clients["eve"], [clients["ann"], clients["bob"]]
        watch = Watch(coordinator.state / "partial", "eve")
        try:
            eve.may_offer = 2
            wait_until(lambda: watch.size > 20_000, LONG_S, what="eve's upload to be under way")
            cut = [sys.executable, "-m", "clipcast", "device", "revoke", "eve", "--coordinator", str(coordinator.settings)]
            with subprocess.Popen(cut, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as revoke:
                wait_until(lambda: coordinator.devices()["eve"].revoked, LONG_S, what="the command to be done")
                revoked_at = time.monotonic()
            assert revoke.returncode == 0
            wait_until(lambda: watch.size == 0, LONG_S, what="eve's upload to be given up")
            sent = eve.bus.chunks
            wait_until(lambda: eve.notices.count("revoked") > 0, LONG_S, what="eve to be told")
            for other in others:
                other.may_offer = 2
            wait_until(lambda: len(coordinator.records()) > 0, LONG_S, what="the round to end")
            record = coordinator.records()[0]
            last_byte = max(0.0, watch.grew_at - revoked_at)
        finally:
            watch.end()
        assert sent > 2
        score("S9", "from revoke to a stolen device's last accepted byte", last_byte, "s", "<= 5", passed=last_byte <= 5)
        taken = len(eve.accepted()) + ("eve" in record.accepted) + watch.size
        score("S9", "bytes and updates accepted of it afterwards", taken, "", "0", passed=not taken)
        assert (record.outcome, record.accepted) == ("aggregated", ["ann", "bob"])
        lost = sum(client.disconnects for client in clients.values())
        score("S9", "other clients disconnected by it", lost, "", "0", passed=not lost)


def test_s9_all_keys_are_renewed_without_losing_a_round(lab: Lab, tmp_path: Path, score: Callable[..., None]) -> None:
    """In each round the others have delivered when one renews its key; then the coordinator, with a round open, its own."""
    rounds = len(CLIENTS) + 2
    with federation(lab, tmp_path, rounds=rounds, quorum=3) as (coordinator, clients):
        keys = {coordinator.key()}

        def deliver(number: int, *names: str) -> None:
            for name in names:
                clients[name].may_offer = number
            for name in names:
                wait_until(lambda name=name: number in clients[name].accepted(), LONG_S, what=f"{name}'s round {number}")

        for number, name in enumerate(CLIENTS, 1):
            deliver(number, *(other for other in CLIENTS if other != name))
            before = clients.pop(name)
            (tmp_path / f"{name}.toml").write_text(f'id = "{name}"\nfederation = "lab"\ndata = "digits"\nstate = "{name}"\n')
            key = command("client", "key", "--new", str(tmp_path / f"{name}.toml")).splitlines()[-1]
            assert key not in keys
            keys.add(key)
            command("device", "add", name, key, "--coordinator", str(coordinator.settings))
            before.stop()
            clients[name] = Client(lab, tmp_path / name, name, coordinator.key() if name == "ann" else None)
            deliver(number, name)
        deliver(number + 1, "ann")
        new = command("coordinator", "key", "--new", str(coordinator.settings)).splitlines()[0]
        assert new not in keys
        assert len(keys) == 1 + len(CLIENTS)
        coordinator.stop()
        clients["eve"].stop()  # it is away meanwhile
        coordinator.start()
        clients["eve"] = Client(lab, tmp_path / "eve", "eve")
        deliver(number + 1, "bob", "eve")
        deliver(number + 2, *CLIENTS)
        coordinator.wait()
        records = coordinator.records()
        assert coordinator.key() == new
        wait_until(lambda: all(client.finished for client in clients.values()), LONG_S, what="all to hear of the end")
        whole = sum(record.outcome == "aggregated" and record.accepted == list(CLIENTS) for record in records)
        lost = rounds - whole
        score("S9", f"rounds lost or incomplete while {len(keys)} keys were renewed", lost, "", "0", passed=not lost)
