"""Real processes, forked by a zygote: started, killed -9, stopped, continued; each has its log."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
EVERYTHING = (
    "tests.faults.actors",
    "coordinator.rounds",
    "coordinator.state.devices",
    "coordinator.text_bank",
    "edge_client.device",
)
LOG_TAIL = 25


class Zygote:
    """Forks processes (zygote.py). `close` leaves none behind, stopped ones neither."""

    def __init__(self, imports: tuple[str, ...] = EVERYTHING, env: Mapping[str, str] | None = None) -> None:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        quiet = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self._lock = threading.Lock()
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote", *imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, **quiet, **(env or {})},
            start_new_session=True,
        )
        self._is_ready = False

    def fork(self, name: str, log: Path, target: str, **arguments: Any) -> Child:
        """Start a function "module:function" as a process."""
        return self._start(name, log, {"target": target, "arguments": arguments})

    def execute(self, name: str, log: Path, command: list[str]) -> Child:
        """Start a program as a process."""
        return self._start(name, log, {"command": command})

    def reap(self, pid: int) -> int:
        """Return the exit code of a process that has ended, negative for a signal."""
        return int(self._ask({"reap": pid})["code"])

    def close(self) -> None:
        """End every process that was started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait(30)
        for stream in (self._popen.stdin, self._popen.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()

    def _start(self, name: str, log: Path, request: dict[str, Any]) -> Child:
        log.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            pid = int(self._exchange({**request, "log": str(log)})["pid"])
            return Child(name, pid, os.pidfd_open(pid), log, self)  # before anybody can reap it

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            return self._exchange(request)

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._popen.stdin is not None
        if not self._is_ready:
            assert "ready" in self._answer(), "the zygote did not start: run it by hand to see why"
            self._is_ready = True
        print(json.dumps(request), file=self._popen.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._popen.stdout is not None
        answer: dict[str, Any] = json.loads(self._popen.stdout.readline() or "{}")
        return answer


@dataclass
class Child:
    """A process that a zygote started."""

    name: str
    pid: int
    handle: int
    log: Path
    zygote: Zygote
    code: int | None = None

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended; a stopped one is alive."""
        return self.code is None and not self._ended(0.0)

    def send(self, number: int) -> None:
        """Send a signal; nothing happens if it has ended."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.handle, number)

    def kill(self) -> None:
        """Kill -9, and wait until it is gone."""
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self, deadline_s: float = 30.0) -> int:
        """Wait for its end; return its exit code."""
        if self.code is None:
            assert self._ended(deadline_s), f"{self.name} still runs after {deadline_s} s:\n{self.tail()}"
            self.code = self.zygote.reap(self.pid)
            os.close(self.handle)
        return self.code

    def memory(self, what: str = "VmHWM") -> int:
        """Return its memory in bytes: the peak of what was resident, or another line of its status; 0 once it has ended."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{what}:")), 0)

    def tail(self) -> str:
        """Return the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return f"--- the end of {self.log.name}:\n" + "\n".join(lines[-LOG_TAIL:])

    def _ended(self, timeout_s: float) -> bool:
        poll = select.poll()
        poll.register(self.handle, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
