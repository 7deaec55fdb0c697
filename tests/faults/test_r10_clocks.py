"""R10: clocks that are wrong by up to 400 days, each by its own, and another one every second: rounds ask for no time.

Mutual TLS throughout, with certificates by `clipcast ca` and the broker's configuration by `clipcast broker config`.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from coordinator.broker.authority import Authority
from coordinator.broker.mosquitto import mosquitto
from tests.conftest import a_free_port
from tests.faults.cast import BROKER, COORDINATOR, Cast, Mosquitto
from tests.faults.evidence import records
from tests.faults.processes import Zygote

CLIENTS = ("one", "two")
DAYS = 400
JUMP_S = 1.0
FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
SETTINGS = {
    "federation": "clocks",
    "classes": ["cat", "dog"],
    "recipe": {"name": "fedlora"},
    "clients_per_round": 2,
    "quorum": 2,
    "deadline_s": 600,
    "rounds": 10_000,
}


@contextmanager
def clocked(clock: Path) -> Iterator[Zygote]:
    """Start a zygote whose processes are wrong by what the file `clock` says, e.g. +400d."""
    clock.write_text("+0d\n")
    env = {
        "LD_PRELOAD": str(FAKETIME[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    running = Zygote(env=env)
    try:
        yield running
    finally:
        running.close()


def certified(folder: Path, zygote: Zygote) -> tuple[Mosquitto, dict[str, dict[str, Any]]]:
    """Make an authority, certificates for all, and the broker that asks for them."""
    authority = Authority.create(folder / "ca", "clocks")
    authority.issue("broker", ["localhost", "127.0.0.1"])
    links: dict[str, dict[str, Any]] = {}
    port = a_free_port()
    for name in (COORDINATOR, *CLIENTS):
        authority.issue(name)
        files = {"cert_file": folder / "ca" / f"{name}.pem", "key_file": folder / "ca" / f"{name}.key"}
        ca = {"ca_file": folder / "ca" / "ca.pem"}
        links[name] = {"url": f"mqtts://localhost:{port}", **{key: str(path) for key, path in {**ca, **files}.items()}}
    (folder / BROKER).mkdir()
    texts = mosquitto("clocks", folder / BROKER, folder / "ca", port=port)
    (folder / BROKER / "acl").write_text(texts["acl"])
    return Mosquitto(zygote, folder / BROKER, port=port, given=texts["mosquitto.conf"]), links


@contextmanager
def jumping(clocks: dict[str, Path], rng: random.Random) -> Iterator[list[int]]:
    """Set a clock to another day every second: all to the worst days first. Yields the days that they were set to."""
    days = dict(zip(clocks, (DAYS, -DAYS, 0), strict=True))
    for name, clock in clocks.items():
        clock.write_text(f"{days[name]:+d}d\n")
    jumps, done = list(days.values()), threading.Event()

    def jump() -> None:
        while not done.wait(JUMP_S):
            jumps.append(rng.choice((-DAYS, DAYS, rng.randint(-DAYS, DAYS))))
            rng.choice(list(clocks.values())).write_text(f"{jumps[-1]:+d}d\n")

    thread = threading.Thread(target=jump)
    thread.start()
    try:
        yield jumps
    finally:
        done.set()
        thread.join()


def test_rounds_complete_whatever_the_clocks_say(
    zygote: Zygote, folder: Path, full: bool, score: Callable[..., None]
) -> None:
    if not FAKETIME:
        pytest.skip("libfaketime is not installed: apt-get install faketime")
    lives, rounds_a_life = (10, 10) if full else (1, 5)
    rng, names = random.Random(10), (COORDINATOR, *CLIENTS)
    clocks = {name: folder / f"{name}.clock" for name in names}
    broker, links = certified(folder, zygote)
    with ExitStack() as stack:
        zygotes = {name: stack.enter_context(clocked(clock)) for name, clock in clocks.items()}
        jumps = stack.enter_context(jumping(clocks, rng))
        cast = stack.enter_context(Cast(zygote, folder, SETTINGS, broker, CLIENTS, links, zygotes))
        cast.begin()
        for life in range(1, lives + 1):
            cast.await_rounds(life * rounds_a_life)
            for name in names:  # and get in again by TLS, whatever the time is
                cast.children[name].kill()
                cast.start(name)
        cast.await_rounds(lives * rounds_a_life + 1)
        cast.children[COORDINATOR].kill()
        done = records(cast.state)
    whole = sum(record["accepted"] == list(CLIENTS) for record in done)
    what = f"clocks -{DAYS} to +{DAYS} days: rounds complete"
    score(
        "R10", what, whole, f"of {len(done)}, {len(jumps)} jumps", "all", passed=whole == len(done) > lives * rounds_a_life
    )
    logs = [(folder / f"{name}.log").read_text() for name in names]
    years = {line[:4] for log in logs for line in log.splitlines() if line[:2] == "20"}
    assert len(years) > 1, "the clocks were never wrong"
