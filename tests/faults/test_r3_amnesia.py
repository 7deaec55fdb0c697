"""R3: a broker that dies again and again and forgets all, remembers too much or has its database destroyed loses nothing."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import is_listening, wait_until
from tests.faults.cast import BROKER, COORDINATOR, Cast, Mosquitto, calm
from tests.faults.evidence import differing, lost, receipts, records
from tests.faults.processes import Zygote
from tests.faults.test_r1_kills import settings_for

CLIENTS = ("one", "two", "three")
KEEPS = ("persistence true", "autosave_interval 1")
STALE, CORRUPT = "a stale database", "a corrupt database"
VARIANTS = {"no database": ("persistence false",), STALE: KEEPS, CORRUPT: KEEPS}


def spoil(broker: Mosquitto, early: Path, variant: str) -> None:
    """Put back an early database, or overwrite half of the present one."""
    if variant == STALE:
        shutil.copy(early, broker.database)
    if variant == CORRUPT:
        data = broker.database.read_bytes()
        broker.database.write_bytes(data[:8] + random.Random(0).randbytes(len(data) // 2) + data[8 + len(data) // 2 :])


def revive(cast: Cast, broker: Mosquitto) -> bool:
    """Start the broker. One that refuses its database ends: as a supervisor would, move that aside and start it again."""
    child = cast.start(BROKER)
    wait_until(lambda: is_listening(broker.port) or not child.is_alive, what="the broker to listen or to end")
    if child.is_alive:
        return False
    child.wait()
    broker.database.replace(broker.folder / "refused.db")
    cast.start(BROKER)
    return True


def let_it_die(cast: Cast, broker: Mosquitto, variant: str, pauses: list[float]) -> int:
    """Kill the broker after each pause, spoil what it kept, start it again; return how often it refused to."""
    early, refused = broker.folder / "early.db", 0
    if variant != "no database":
        wait_until(broker.database.exists, what="the broker to save its database")
        shutil.copy(broker.database, early)
    for pause in pauses:
        time.sleep(pause)  # it waits for nothing: this is how long the broker lives
        cast.check()
        if variant != "no database":
            wait_until(broker.database.exists, what="the broker to save its database")
        cast.children[BROKER].kill()
        spoil(broker, early, variant)
        refused += revive(cast, broker)
    return refused


def test_a_broker_that_keeps_dying_loses_no_update(
    zygote: Zygote, folder: Path, full: bool, score: Callable[..., None]
) -> None:
    rng, settings = random.Random(5), settings_for(CLIENTS)
    kills, span = (8, (5.0, 10.0)) if full else (2, (1.0, 2.0))
    found: dict[str, tuple[list[dict[str, object]], int, int, int]] = {}
    for variant, lines in VARIANTS.items():
        home = folder / variant.replace(" ", "-")
        broker = Mosquitto(zygote, home / BROKER, lines)
        with Cast(zygote, home, settings, broker, CLIENTS) as cast:
            cast.begin()
            cast.await_rounds(2)
            refused = let_it_die(cast, broker, variant, [rng.uniform(*span) for _ in range(kills)])
            cast.await_rounds(cast.rounds_done() + 2)
            cast.children[COORDINATOR].kill()
        missing = lost(home, cast.state, CLIENTS)
        found[variant] = (records(cast.state), len(receipts(home, CLIENTS)), len(missing), refused)
    reference = records(calm(zygote, folder / "calm", settings, CLIENTS, max(len(done) for done, *_ in found.values())))
    for variant, (done, told, missing, refused) in found.items():
        name = f"broker killed {kills} times, {variant}"
        score("R3", f"{name}: receipts lost", missing, f"of {told}", "0", passed=missing == 0 and told > 0)
        differ = differing(done, reference)
        for one, two in differ[:3]:
            print({key: (one[key], two[key]) for key in one if one[key] != two[key]}, "in round", one["round"])
        other = len(differ)
        score("R3", f"{name}: rounds with other bits", other, f"of {len(done)}", "0", passed=other == 0)
        assert (refused > 0) == (variant == CORRUPT), f"{variant}: refused {refused} times"
