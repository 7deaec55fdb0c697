"""Messages lost, doubled, reordered and acknowledged late, on every link and in both directions: the bits stay the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.faults.cast import BROKER, COORDINATOR, Cast, Embedded, Mosquitto
from tests.faults.evidence import lost, made, records
from tests.faults.mqtt_proxy import MqttFaults, MqttProxy
from tests.faults.processes import Zygote
from tests.faults.test_r1_kills import settings_for

CLIENTS = ("one", "two", "three")
FAULTS = {
    "lost": MqttFaults(drop=0.1),
    "doubled and reordered": MqttFaults(double=0.4, reorder=0.4, hold_acks=0.3),
    "lost, doubled and reordered": MqttFaults(drop=0.03, double=0.2, reorder=0.2, hold_acks=0.2),
}


def settings(rounds: int) -> dict[str, Any]:
    """Return a whole federation, with its aligning and its closing round."""
    return {**settings_for(CLIENTS), "rounds": rounds, "deadline_s": 600}


def run_to_its_end(cast: Cast, deadline_s: float) -> Path:
    """Run a federation to its last round; return its state."""
    with cast:
        cast.begin()
        coordinator = cast.children[COORDINATOR]
        wait_until(lambda: not coordinator.is_alive, deadline_s, "the last round")
        assert coordinator.wait() == 0, coordinator.tail()
    assert not lost(cast.folder, cast.state, CLIENTS)
    return cast.state


@pytest.mark.parametrize("embedded", [False, True], ids=["mosquitto", "embedded"])
def test_lost_doubled_and_reordered_messages_change_no_bit(
    zygote: Zygote, folder: Path, full: bool, score: Callable[..., None], embedded: bool
) -> None:
    rounds = 4 if full else 1
    quick = list(FAULTS)[1:2] if embedded else list(FAULTS)[2:]
    chosen = list(FAULTS) if full else quick
    calm = run_to_its_end(Cast(zygote, folder / "calm", settings(rounds), Mosquitto(zygote, folder / BROKER), CLIENTS), 60)
    for seed, name in enumerate(chosen, start=1):
        home = folder / name.replace(" ", "-")
        broker = (Embedded if embedded else Mosquitto)(zygote, home / BROKER)
        proxy = MqttProxy(broker.port, seed, FAULTS[name])
        everybody = {name: {"url": f"mqtt://127.0.0.1:{proxy.port}"} for name in (COORDINATOR, *CLIENTS)}
        try:
            state = run_to_its_end(Cast(zygote, home, settings(rounds), broker, CLIENTS, everybody), 60 + 90 * rounds)
        finally:
            proxy.close()
        other = sum(one != two for one, two in zip(records(state), records(calm), strict=True))
        what = f"messages {name}, {type(broker).__name__}: rounds with other bits"
        score("R5", what, other, f"of {len(records(calm))}, {proxy.counts['messages']} messages", "0", passed=other == 0)
        assert made(state, 0, rounds + 2) == made(calm, 0, rounds + 2)
