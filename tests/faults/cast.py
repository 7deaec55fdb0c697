"""The processes of one federation: coordinator, broker and clients, to be killed and started again by their names."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import a_free_port, is_listening, wait_until
from tests.faults.evidence import records
from tests.faults.processes import Child, Zygote

ROUND_S = 5.0
FIRST_ROUND_S = 60.0
BROKER, COORDINATOR = "broker", "coordinator"


@dataclass
class Mosquitto:
    """A Mosquitto on a port of its own, with further `lines` of configuration; what it keeps is in `folder`.

    With `given` it runs by that configuration alone.
    """

    zygote: Zygote
    folder: Path
    lines: tuple[str, ...] = ("persistence false",)
    port: int = field(default_factory=a_free_port)
    given: str | None = None

    @property
    def url(self) -> str:
        """Return where it listens."""
        return f"mqtt://127.0.0.1:{self.port}"

    @property
    def database(self) -> Path:
        """Return the file in which it keeps retained messages, if it is told to."""
        return self.folder / "mosquitto.db"

    def start(self) -> Child:
        """Start it as a process; it does not listen yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "mosquitto.conf"
        open_to_all = (f"listener {self.port} 127.0.0.1", "allow_anonymous true", f"persistence_location {self.folder}/")
        text = (self.given,) if self.given else (*open_to_all, *self.lines)
        config.write_text("\n".join([*text, "user root"]) + "\n")
        return self.zygote.execute(BROKER, self.folder / "broker.log", [mosquitto_binary(), "-c", str(config)])


@dataclass
class Embedded:
    """The embedded broker, in a process of its own."""

    zygote: Zygote
    folder: Path
    port: int = field(default_factory=a_free_port)

    @property
    def url(self) -> str:
        """Return where it listens."""
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> Child:
        """Start it as a process; it does not listen yet."""
        log = self.folder / "broker.log"
        return self.zygote.fork(BROKER, log, "tests.faults.actors:embed_broker", folder=str(self.folder), port=self.port)


def as_toml(settings: dict[str, Any]) -> str:
    """Return settings as TOML: plain values first, then a table for each dictionary."""
    tables = {key: value for key, value in settings.items() if isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if key not in tables]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def mosquitto_binary() -> str:
    """Return where Mosquitto is; skips the test if it is not installed."""
    found = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    return found


@dataclass
class Cast:
    """The processes of one federation by name: "coordinator", "broker" and the clients by their ids. Leaving ends them all.

    `settings` are the coordinator's, without state and broker. `links` says who reaches the broker by other settings than
    its URL, `zygotes` who is started by another one. With `by_command` the coordinator is not forked with all that a zygote
    has imported, but started by its command: then its memory is its own.
    """

    zygote: Zygote
    folder: Path
    settings: dict[str, Any]
    broker: Mosquitto | Embedded
    clients: tuple[str, ...]
    links: dict[str, dict[str, Any]] = field(default_factory=dict)
    zygotes: dict[str, Zygote] = field(default_factory=dict)
    by_command: bool = False
    children: dict[str, Child] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        """Return the coordinator's state folder."""
        return self.folder / COORDINATOR

    def __enter__(self) -> Cast:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            for child in self.children.values():
                print(child.tail())
        for child in self.children.values():
            child.send(signal.SIGKILL)
        for child in self.children.values():
            child.wait()

    def begin(self) -> None:
        """Start them all."""
        broker = self.start(BROKER)
        wait_until(lambda: is_listening(self.broker.port) or not broker.is_alive, what="the broker to listen")
        for name in (COORDINATOR, *self.clients):
            self.start(name)

    def start(self, name: str, **more: Any) -> Child:
        """Start one of them, for the first time or again; `more` is for a client's actor."""
        if name == BROKER:
            self.children[name] = self.broker.start()
            return self.children[name]
        broker = {"url": self.broker.url, **self.links.get(name, {})}
        common = {"state": str(self.folder / name), "broker": broker, "federation": self.settings["federation"]}
        log = self.folder / f"{name}.log"
        if name == COORDINATOR and self.by_command:
            path = self.folder / "coordinator.toml"
            path.write_text(as_toml({**self.settings, **common}))
            command = [sys.executable, "-m", "clipcast", "coordinator", "run", str(path)]
            self.children[name] = self.zygote.execute(name, log, command)
            return self.children[name]
        if name == COORDINATOR:
            target, arguments = "coordinate", {"settings": {**self.settings, **common}}
        else:
            settings = {"id": name, "data": "digits", **common}
            target, arguments = "take_part_lightly", {"settings": settings, "notes": str(self.folder / f"{name}.notes")}
        zygote = self.zygotes.get(name, self.zygote)
        self.children[name] = zygote.fork(name, log, f"tests.faults.actors:{target}", **arguments, **more)
        return self.children[name]

    def fleet(self, names: list[str], processes: int) -> None:
        """Start light clients, many in each of a few processes; their notes go to fleet-N.notes."""
        settings = {"federation": self.settings["federation"], "broker": {"url": self.broker.url}}
        for number in range(processes):
            name = f"fleet-{number}"
            arguments = {"names": names[number::processes], "notes": str(self.folder / f"{name}.notes")}
            log = self.folder / f"{name}.log"
            child = self.zygote.fork(name, log, "tests.faults.fleet:sail", settings=settings, **arguments)
            self.children[name] = child

    def check(self) -> None:
        """Fail with the log of a process that has ended by itself."""
        for child in self.children.values():
            assert child.is_alive or child.code is not None, f"{child.name} ended with {child.wait()}\n{child.tail()}"

    def rounds_done(self) -> int:
        """Return how many rounds are over."""
        return len(records(self.state))

    def await_rounds(self, number: int) -> None:
        """Wait until so many rounds are over; fail early if somebody ends by itself."""

        def over() -> bool:
            self.check()
            return self.rounds_done() >= number

        wait_until(over, FIRST_ROUND_S + ROUND_S * number, f"round {number}")


def calm(zygote: Zygote, folder: Path, settings: dict[str, Any], clients: Iterable[str], rounds: int) -> Path:
    """Run a federation undisturbed for so many rounds; return the coordinator's state."""
    with Cast(zygote, folder, settings, Mosquitto(zygote, folder / BROKER), tuple(clients)) as cast:
        cast.begin()
        cast.await_rounds(rounds)
        return cast.state
