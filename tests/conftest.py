"""Fixtures that several packages' tests share."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from clipcast.demo.broker import embedded_broker
from tests.faults.proxy import FaultProxy


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the full tier of tests/faults, as `make test-faults` runs it")
    parser.addoption(
        "--device", action="store_true", help="a whole arm64 system under emulation, as `make test-device` runs it"
    )


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


@pytest.fixture
def fault_proxy() -> Iterator[Callable[..., FaultProxy]]:
    """Put a FaultProxy before a port: `fault_proxy(port, seed=1, cut_after=(1000, 9000))`."""
    running: list[FaultProxy] = []

    def start(target: int, seed: int = 0, **faults: Any) -> FaultProxy:
        running.append(FaultProxy(target, seed, **faults))
        return running[-1]

    yield start
    for proxy in running:
        proxy.close()
