"""R8: everybody sends a large update at once: the coordinator's memory is bounded, and what is too large never travels."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from protocol.client_end import ClientEnd
from protocol.events import Answered, PlanReady
from protocol.link import Link
from protocol.messages import Receipt, Status
from protocol.mqtt import MqttBus
from protocol.settings import BrokerSettings
from tests.conftest import wait_until
from tests.faults.cast import BROKER, COORDINATOR, Cast, Mosquitto
from tests.faults.evidence import fleet_lost
from tests.faults.light import light_result, recipe_of
from tests.faults.processes import Zygote
from tests.faults.proxy import FaultProxy
from tests.faults.relay import UP

MB = 2**20
GREEDY = "greedy"


def offer_too_much(url: str, cast: Cast) -> Receipt:
    """Be a client whose update is twice as large as it may be, until its receipt."""
    end = ClientEnd(cast.settings["federation"], GREEDY, random.Random(0))
    bus = MqttBus.open(BrokerSettings(url=url), GREEDY, end.will())
    link: Link = Link(bus, end)
    answers: list[Receipt] = []
    end.announce(Status(state="online"))

    def is_answered() -> bool:
        cast.check()
        for event in link.poll(0.1):
            if isinstance(event, PlanReady):
                result = light_result(event, GREEDY)
                for name, factor in list(result.update.adapter.items()):
                    result.update.adapter[f"{name}.again"] = factor
                end.offer(end.pack(result, event.plan))
            if isinstance(event, Answered):
                answers.append(event.receipt)
        return bool(answers)

    try:
        wait_until(is_answered, 120.0, "the receipt of what is too large")
    finally:
        bus.close(end.farewell())
    return answers[0]


def test_a_hundred_large_updates_at_once_fit_into_memory_and_too_large_ones_stay_away(
    zygote: Zygote, folder: Path, full: bool, score: Callable[..., None], fault_proxy: Callable[..., FaultProxy]
) -> None:
    clients, size = (100, 5_000_000) if full else (20, 2_000_000)
    settings = {
        "federation": "large",
        "classes": ["cat", "dog"],
        "recipe": recipe_of(size, 2),
        "clients_per_round": clients + 1,
        "quorum": clients,
        "deadline_s": 600,
        "rounds": 1,
    }
    broker = Mosquitto(zygote, folder / BROKER)
    with Cast(zygote, folder, settings, broker, (), by_command=True) as cast:
        cast.begin()
        coordinator = cast.children[COORDINATOR]
        wait_until(lambda: "waits for" in coordinator.tail(), 60.0, "the coordinator to wait")
        at_rest = coordinator.memory("VmRSS")
        cast.fleet([f"client-{number:03}" for number in range(clients)], 2)
        proxy = fault_proxy(broker.port)
        refusal = offer_too_much(f"mqtt://127.0.0.1:{proxy.port}", cast)
        sent = proxy.moved[UP]
        peak = 0

        def over() -> bool:
            nonlocal peak
            peak = max(peak, coordinator.memory())
            return not coordinator.is_alive

        wait_until(over, 300.0, "the round")
        assert coordinator.wait() == 0, coordinator.tail()
        broker_peak = cast.children[BROKER].memory()
        missing, told = fleet_lost(folder, cast.state, 2)
    what = f"{clients} x {size / 1e6:g} MB"
    score("R8", f"{what}: coordinator's peak", peak // MB, f"MB, {at_rest // MB} at rest", "<= 400", passed=peak <= 400 * MB)
    score("R8", f"{what}: broker's peak", broker_peak // MB, "MB", "<= 300", passed=broker_peak <= 300 * MB)
    score("R8", f"{what}: updates lost", len(missing), f"of {told}", "0", passed=not missing and told == clients)
    assert (refusal.accepted, refusal.reason) == (False, "too-large")
    score("R8", "bytes sent for an update that is too large", sent, "bytes", "< 64 KiB", passed=sent < 65_536)
