"""R7: thousands of clients lose their broker at once and come back, jittered, and the federation goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import is_listening, wait_until
from tests.faults.cast import BROKER, COORDINATOR, Cast, Mosquitto
from tests.faults.evidence import fleet_lost, fleet_notes, records
from tests.faults.processes import Zygote

SAMPLED = 10
PROCESSES = 2
AWAY_S = 2.0
RECOMMENDED = ("persistence false", "max_queued_messages 10000", "max_queued_bytes 8388608")  # `clipcast broker config`
SETTINGS = {
    "federation": "storm",
    "classes": ["cat", "dog"],
    "recipe": {"name": "fedlora"},
    "clients_per_round": SAMPLED,
    "quorum": SAMPLED,
    "deadline_s": 600,
    "rounds": 10_000,
    "seed": 3,
}


def newest(folder: Path) -> list[dict[str, Any]]:
    """Return each fleet's newest counts."""
    fleets = [fleet_notes(folder / f"fleet-{number}.notes", "counts") for number in range(PROCESSES)]
    return [counts[-1] for counts in fleets if counts]


def peak(folder: Path, what: str, since: float) -> float:
    """Return how often something happened in a second at most, over all fleets together."""
    seconds: dict[int, int] = {}
    for number in range(PROCESSES):
        last = 0
        for note in fleet_notes(folder / f"fleet-{number}.notes", "counts"):
            if note["at"] >= since:
                second = int(note["at"] - since)
                seconds[second] = seconds.get(second, 0) + note.get(what, 0) - last
            last = note.get(what, 0)
    return max(seconds.values())


def test_thousands_of_clients_come_back_after_the_broker_died(
    zygote: Zygote, folder: Path, full: bool, score: Callable[..., None]
) -> None:
    size = 5000 if full else 300
    broker = Mosquitto(zygote, folder / BROKER, RECOMMENDED)
    with Cast(zygote, folder, SETTINGS, broker, (), by_command=True) as cast:
        cast.begin()
        cast.fleet([f"client-{number:04}" for number in range(size)], PROCESSES)

        def back() -> int:
            cast.check()
            return sum(counts["back"] for counts in newest(folder))

        wait_until(lambda: back() == size, 120.0, f"{size} clients to come")
        cast.await_rounds(2)
        died = time.monotonic()
        cast.children[BROKER].kill()
        time.sleep(AWAY_S)  # it waits for nothing: so long the broker is away
        wait_until(lambda: back() == 0, 10.0, "the clients to notice")
        cast.start(BROKER)
        wait_until(lambda: is_listening(broker.port), what="the broker to listen")
        wait_until(lambda: back() == size, 120.0, f"{size} clients to come back")
        seconds = time.monotonic() - died
        cast.await_rounds(cast.rounds_done() + 2)
        memory = cast.children[COORDINATOR].memory()
        cast.children[COORDINATOR].kill()
        missing, told = fleet_lost(folder, cast.state, PROCESSES)
        short = [record["round"] for record in records(cast.state) if len(record["accepted"]) != SAMPLED]
    who = f"{size} clients"
    score("R7", f"{who}: all back after", round(seconds, 1), "s", "<= 30", passed=seconds <= 30.0)
    score("R7", f"{who}: most tries in a second", peak(folder, "tries", died), "", "", passed=True)
    score("R7", f"{who}: most taken in in a second", peak(folder, "taken in", died), "", "", passed=True)
    score("R7", f"{who}: coordinator's peak memory", memory // 2**20, "MB", "<= 300", passed=memory <= 300 * 2**20)
    score("R7", f"{who}: updates lost", len(missing), f"of {told}", "0", passed=not missing and told >= SAMPLED)
    assert not short
