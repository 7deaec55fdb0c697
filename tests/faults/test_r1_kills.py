"""R1: whoever is killed -9 at whatever moment, no receipt is lost, nobody is counted twice, and every bit is the same."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coordinator.state.store import KEEP_ROUNDS
from tests.faults.cast import BROKER, COORDINATOR, Cast, Embedded, Mosquitto, calm
from tests.faults.evidence import counted_twice, differing, lost, made, receipts, records
from tests.faults.processes import Zygote

CLIENTS = tuple(f"client-{number}" for number in range(6))
PAUSE_S = (0.1, 0.7)


def settings_for(clients: tuple[str, ...]) -> dict[str, Any]:
    """Return a federation in which everybody takes part in every round, so that a calm run has the same rounds."""
    recipe = {"name": "fedalign", "features_per_class": 2, "text": {"steps": 2}, "personal": {"start": "own"}}
    everybody = {"clients_per_round": len(clients), "quorum": len(clients), "deadline_s": 3600, "rounds": 10_000}
    return {"federation": "kills", "classes": ["zero", "one", "two", "three"], "seed": 11, "recipe": recipe, **everybody}


def disturb(cast: Cast, rng: random.Random, kills: int) -> Counter[str]:
    """Kill somebody again and again, and look into the journal whenever it was the coordinator."""
    died: Counter[str] = Counter()
    names = [COORDINATOR, COORDINATOR, BROKER, *cast.clients]
    while died.total() < kills:
        time.sleep(rng.uniform(*PAUSE_S))  # it waits for nothing: this is how often somebody dies
        cast.check()
        victim = rng.choice(names)
        cast.children[victim].kill()
        died["clients" if victim in cast.clients else victim] += 1
        if victim == COORDINATOR:
            assert not lost(cast.folder, cast.state, cast.clients)
        cast.start(victim)
    return died


def test_kill_9_of_anybody_at_any_moment_changes_no_bit(
    zygote: Zygote, folder: Path, full: bool, score: Callable[..., None]
) -> None:
    kills, settings = 1000 if full else 60, settings_for(CLIENTS)
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    began, home = time.monotonic(), folder / "disturbed"
    with Cast(zygote, home, settings, Mosquitto(zygote, home / BROKER), CLIENTS) as cast:
        cast.begin()
        cast.await_rounds(1)
        died = disturb(cast, random.Random(seed), kills)
        cast.await_rounds(cast.rounds_done() + 1)
        cast.children[COORDINATOR].kill()
        seconds, rounds = time.monotonic() - began, cast.rounds_done()
    told = receipts(home, CLIENTS)
    missing, twice = lost(home, cast.state, CLIENTS), counted_twice(cast.state)
    state = calm(zygote, folder / "calm", settings, CLIENTS, rounds)
    other = len(differing(records(cast.state), records(state)))
    who = ", ".join(f"{count} {name}" for name, count in sorted(died.items()))
    score("R1", "kill -9", died.total(), f"kills ({who})", f"{kills}", passed=died.total() == kills)
    score("R1", "time", round(seconds), "s", "", passed=True)
    score("R1", "receipts lost", len(missing), f"of {len(told)}", "0", passed=not missing and len(told) > rounds)
    score("R1", "updates counted twice", len(twice), f"in {rounds} rounds", "0", passed=not twice)
    score("R1", "rounds with other bits than the calm run", other, f"of {rounds}", "0", passed=other == 0 and rounds > 5)
    kept = len(records(state)) - KEEP_ROUNDS
    assert made(cast.state, kept, rounds) == made(state, kept, rounds)


def test_the_same_over_the_embedded_broker(zygote: Zygote, folder: Path, full: bool, score: Callable[..., None]) -> None:
    clients, kills = CLIENTS[:3], 100 if full else 20
    settings, home = settings_for(clients), folder / "disturbed"
    with Cast(zygote, home, settings, Embedded(zygote, home / BROKER), clients) as cast:
        cast.begin()
        cast.await_rounds(1)
        disturb(cast, random.Random(1), kills)
        cast.await_rounds(cast.rounds_done() + 1)
        cast.children[COORDINATOR].kill()
        rounds = cast.rounds_done()
    state = calm(zygote, folder / "calm", settings, clients, rounds)
    same = not differing(records(cast.state), records(state)) and not lost(home, cast.state, clients)
    score("R1", "kill -9 with the embedded broker, same bits", kills, "kills", f"{kills}", passed=same)
