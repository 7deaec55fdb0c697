"""R1 with clients that really train a quantised tower: killed -9 in the middle of it, they end in the same bits."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_client.data import find_pictures
from tests.conftest import wait_until
from tests.faults.cast import BROKER, COORDINATOR, Cast, Mosquitto
from tests.faults.evidence import made, records
from tests.faults.processes import Zygote

CLASSES = ("zero", "one", "two", "three")
CLIENTS = ("ann", "bob")
PICTURES = 16
PAUSE_S = (0.3, 1.5)


@pytest.fixture
def homes(folder: Path) -> dict[str, Path]:
    """Each client's folder of real digits."""
    digits = [picture for picture in find_pictures("digits") if picture.label in CLASSES]
    for number, client in enumerate(CLIENTS):
        for index, picture in enumerate(digits[number * PICTURES : (number + 1) * PICTURES]):
            file = folder / "pictures" / client / picture.label / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.load().save(file)
    return {client: folder / "pictures" / client for client in CLIENTS}


def settings_for(rounds: int) -> dict[str, Any]:
    """Return a federation of few, real steps."""
    training = {"local_steps": 6, "batch_size": 8, "features_per_class": 2}
    recipe = {"name": "fedalign", "text": {"steps": 2, "aligning_round": False}, "personal": {"start": "own"}, **training}
    size = {"clients_per_round": 2, "quorum": 2, "deadline_s": 3600, "rounds": rounds}
    return {"federation": "training", "classes": list(CLASSES), "recipe": recipe, "seed": 5, **size}


def start(cast: Cast, name: str, home: Path) -> None:
    """Start a real client, for the first time or again."""
    path = cast.folder / f"{name}.toml"
    path.write_text(
        f"id = '{name}'\nfederation = 'training'\ndata = '{home}'\nstate = '{name}'\nbits = 4\nthreads = 1\n"
        f"profile = 'generic-cpu'\n[broker]\nurl = '{cast.broker.url}'\n"
    )
    log = cast.folder / f"{name}.log"
    cast.children[name] = cast.zygote.fork(name, log, "tests.faults.actors:train_for_real", path=str(path))


def run(cast: Cast, homes: dict[str, Path], kills: int) -> Path:
    """Run a federation to its end, and kill a client so many times meanwhile; return the coordinator's state."""
    rng = random.Random(7)
    with cast:
        cast.begin()
        for name, home in homes.items():
            start(cast, name, home)
        coordinator = cast.children[COORDINATOR]
        for _ in range(kills):
            time.sleep(rng.uniform(*PAUSE_S))  # it waits for nothing: this is how often somebody dies
            name = rng.choice(CLIENTS)
            cast.children[name].kill()
            start(cast, name, homes[name])
        wait_until(lambda: not coordinator.is_alive, 300.0, "the last round")
        assert coordinator.wait() == 0, coordinator.tail()
    return cast.state


def test_kill_9_in_the_middle_of_training_changes_no_bit(
    zygote: Zygote, folder: Path, homes: dict[str, Path], full: bool, score: Callable[..., None]
) -> None:
    rounds, kills = (6, 60) if full else (2, 12)
    states = []
    for name, count in (("calm", 0), ("killed", kills)):
        home = folder / name
        cast = Cast(zygote, home, settings_for(rounds), Mosquitto(zygote, home / BROKER), ())
        states.append(run(cast, homes, count))
    calm, killed = (records(state) for state in states)
    other = sum(one != two for one, two in zip(calm, killed, strict=True))
    assert calm[0]["loss"] is not None
    score(
        "R1",
        "kill -9 of training clients: rounds with other bits",
        other,
        f"of {len(calm)}, {kills} kills",
        "0",
        passed=other == 0,
    )
    assert made(states[0], 0, rounds + 1) == made(states[1], 0, rounds + 1)
