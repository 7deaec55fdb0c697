"""The demo's processes: each is a `clipcast` command of its own, with its settings and log in the output folder."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipcast.demo.errors import DemoError
from clipcast.demo.pictures import Layout
from clipcast.demo.settings import DemoSettings
from protocol.messages import Recipe

STOP_S = 20.0
LOG_TAIL = 15


@dataclass(frozen=True)
class Process:
    """A running command and its log."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Raise DemoError if it has failed."""
        code = self.popen.poll()
        if code:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL:])
            raise DemoError(f"{self.name} ended with exit code {code}; the end of {self.log}:\n{tail}")


def write_settings(settings: DemoSettings, layout: Layout, broker: str) -> tuple[Path, list[Path]]:
    """Write the coordinator's and the clients' TOML; return their paths."""
    threads = max(1, (os.cpu_count() or 1) // settings.clients)
    training = settings.recipe.model_dump(mode="json", include=set(Recipe.model_fields), exclude_none=True)
    recipe = "\n".join(f"{key} = {json.dumps(value)}" for key, value in training.items())
    coordinator = settings.out / "coordinator.toml"
    coordinator.write_text(
        f'federation = {json.dumps(settings.federation)}\nclasses = {json.dumps(layout.classes)}\nmodel = "tiny-clip"\n'
        f"rounds = {settings.rounds}\nclients_per_round = {settings.clients}\nquorum = {settings.clients}\n"
        f'seed = {settings.seed}\nstate = "state"\n\n[recipe]\nname = {json.dumps(settings.recipe.name)}\n{recipe}\n'
        f"personal.closing_steps = {settings.recipe.personal.closing_steps}\n\n[broker]\nurl = {json.dumps(broker)}\n"
    )
    clients = []
    for home in layout.clients:
        path = settings.out / f"{home.name}.toml"
        path.write_text(
            f"id = {json.dumps(home.name)}\nfederation = {json.dumps(settings.federation)}\ndata = {json.dumps(str(home))}\n"
            f'state = {json.dumps(f"clients/{home.name}")}\nprofile = "generic-cpu"\nbits = {settings.bits}\n'
            f"threads = {threads}\n\n[broker]\nurl = {json.dumps(broker)}\n"
        )
        clients.append(path)
    return coordinator, clients


@contextlib.contextmanager
def running(commands: Sequence[tuple[str, Sequence[str]]], folder: Path) -> Iterator[list[Process]]:
    """Run `clipcast` commands side by side, logs in `folder`; on leaving, ask them to stop and then make them."""
    folder.mkdir(parents=True, exist_ok=True)
    processes: list[Process] = []
    with contextlib.ExitStack() as stack:
        try:
            for name, arguments in commands:
                log = folder / f"{name}.log"
                output = stack.enter_context(log.open("wb"))
                command = [sys.executable, "-m", "clipcast", *arguments]
                popen = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
                processes.append(Process(name, popen, log))
            yield processes
        finally:
            _stop(processes)


def _stop(processes: list[Process]) -> None:
    for process in processes:
        if process.popen.poll() is None:
            process.popen.terminate()
    for process in processes:
        try:
            process.popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.popen.kill()
            process.popen.wait()
