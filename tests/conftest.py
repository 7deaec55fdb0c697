"""Fixtures that several packages' tests share."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clipcast.demo.broker import embedded_broker


def wait_until(condition: Callable[[], bool], deadline_s: float = 20.0, what: str = "the condition") -> None:
    """Wait for a condition with a deadline; the only way in which tests wait."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"waited {deadline_s} s for {what}"
        time.sleep(0.01)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[str]:
    """URL of the embedded broker."""
    with embedded_broker(tmp_path / "broker") as url:
        yield url


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Start real Mosquittos on free ports: `url = mosquitto("max_packet_size 2000000")`."""
    binary = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    running: list[subprocess.Popen[bytes]] = []

    def start(*lines: str, listener: str = "", port: int | None = None) -> str:
        port = port or free_port()
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
