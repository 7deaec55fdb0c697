"""Fixtures that several packages' tests share."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from clipcast.demo.broker import embedded_broker


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the full tier of tests/faults, as `make test-faults` runs it")


def wait_until(condition: Callable[[], bool], deadline_s: float = 20.0, what: str = "the condition") -> None:
    """Wait for a condition with a deadline; the only way in which tests wait."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"waited {deadline_s} s for {what}"
        time.sleep(0.01)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def a_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[str]:
    """URL of the embedded broker."""
    with embedded_broker(tmp_path / "broker") as url:
        yield url


@pytest.fixture
def free_port() -> int:
    """Return a port on which nobody listens."""
    return a_free_port()


def _as_postgres(folder: Path) -> dict[str, object]:
    """PostgreSQL refuses to run as root: then its own user runs it, in a folder of its own."""
    if os.getuid() != 0:
        return {}
    shutil.chown(folder, "postgres", "postgres")
    return {"user": "postgres", "group": "postgres", "cwd": folder}


@pytest.fixture(scope="session")
def postgres() -> Iterator[Callable[[], str]]:
    """Start a real PostgreSQL; every call makes an empty database in it and returns its URL."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not binaries:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with tempfile.TemporaryDirectory(prefix="clipcast-postgres-") as name:
        folder, port = Path(name), a_free_port()
        how: Any = _as_postgres(folder)
        initdb = [binaries[-1] / "initdb", "-D", folder / "data", "-U", "clipcast", "-A", "trust", "--no-sync"]
        subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, **how)
        options = ["-p", str(port), "-k", str(folder), "-c", "listen_addresses=127.0.0.1"]
        server = subprocess.Popen(
            [binaries[-1] / "postgres", "-D", folder / "data", *options], stderr=subprocess.DEVNULL, **how
        )
        url = f"postgresql+pg8000://clipcast@127.0.0.1:{port}/"
        engine = create_engine(url + "postgres", isolation_level="AUTOCOMMIT")
        numbers = itertools.count()

        def answers() -> bool:
            try:
                with engine.connect():
                    return True
            except SQLAlchemyError:
                return False

        def fresh() -> str:
            database = f"test{next(numbers)}"
            with engine.connect() as connection:
                connection.execute(text(f"CREATE DATABASE {database}"))
            return url + database

        try:
            wait_until(answers, what="PostgreSQL to answer")
            yield fresh
        finally:
            engine.dispose()
            server.send_signal(signal.SIGINT)  # a fast shutdown: it ends its own processes
            server.wait(30)


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Start real Mosquittos on free ports: `url = mosquitto("max_packet_size 2000000")`."""
    binary = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    running: list[subprocess.Popen[bytes]] = []

    def start(*lines: str, listener: str = "", port: int | None = None) -> str:
        port = port or a_free_port()
        config = tmp_path / f"mosquitto-{port}.conf"
        text = [f"listener {port} 127.0.0.1", listener, "allow_anonymous true", "persistence false", *lines]
        config.write_text("\n".join(text) + "\n")
        running.append(subprocess.Popen([binary, "-c", str(config)], stderr=subprocess.DEVNULL))
        wait_until(lambda: is_listening(port), what="mosquitto to listen")
        start.last = running[-1]  # type: ignore[attr-defined]
        return f"mqtt://127.0.0.1:{port}"

    yield start
    for process in running:
        process.kill()
        process.wait()


class FaultProxy:
    """Forwards 127.0.0.1:port to a target. Each connection is cut after a drawn number of bytes, both ways together."""

    def __init__(self, target: int, seed: int, cut_after: tuple[int, int] | None = None, rate: float | None = None) -> None:
        self.cuts = 0
        self.bytes = 0
        self._target = target
        self._rng = random.Random(seed)
        self._cut_after = cut_after
        self._rate = rate  # bytes a second and direction
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def heal(self) -> None:
        """Cut no more."""
        self._cut_after = None

    def cut_all(self) -> None:
        """Cut every connection now."""
        with self._lock:
            for connection in self._open:
                _shut(connection)

    def close(self) -> None:
        """Stop."""
        self._closing.set()
        _shut(self._listener)
        self._listener.close()
        self.cut_all()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target), 5)
            except OSError:
                near.close()
                continue
            with self._lock:
                self._open |= {near, far}
                left = [self._rng.randint(*self._cut_after)] if self._cut_after else [1 << 60]
            for one, other in ((near, far), (far, near)):
                thread = threading.Thread(target=self._pump, args=(one, other, left), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, left: list[int]) -> None:
        while True:
            try:
                data = source.recv(4096)
                if self._rate is not None:
                    self._closing.wait(len(data) / self._rate)
                with self._lock:
                    cut = left[0] < len(data) and self._cut_after is not None
                    data = data[: left[0]] if cut else data
                    left[0] -= len(data)
                    self.bytes += len(data)
                    self.cuts += cut
                sink.sendall(data)
            except OSError:
                data, cut = b"", False
            if not data or cut:
                break
        for end in (source, sink):
            _shut(end)
        with self._lock:
            left[1:] = [*left[1:], 1]
            if len(left) == 3:  # both directions have ended
                self._open -= {source, sink}
                source.close()
                sink.close()


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def fault_proxy() -> Iterator[Callable[..., FaultProxy]]:
    """Put a FaultProxy before a port: `fault_proxy(port, seed=1, cut_after=(1000, 9000))`."""
    running: list[FaultProxy] = []

    def start(target: int, seed: int, cut_after: tuple[int, int] | None = None, rate: float | None = None) -> FaultProxy:
        running.append(FaultProxy(target, seed, cut_after, rate))
        return running[-1]

    yield start
    for proxy in running:
        proxy.close()
