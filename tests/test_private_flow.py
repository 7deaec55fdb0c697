"""A federation under differential privacy, in memory: one device runs out of its budget, and the others go on."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from clip_lora.towers import one_thread
from coordinator.config import CoordinatorConfig
from coordinator.records import RoundRecord
from coordinator.rounds import Federation
from coordinator.state.store import Store
from coordinator.text_bank import make_bank
from edge_client.config import ClientConfig
from edge_client.data import find_pictures
from edge_client.device import new_client
from edge_client.outbox import Outbox
from edge_client.participate import participate
from edge_client.privacy.accounting import epsilon_of
from edge_client.privacy.ledger import Ledger
from hardware_profiles.profile import load as load_profile
from protocol.bus import MemoryBroker
from protocol.client_end import ClientEnd
from protocol.coordinator_end import CoordinatorEnd
from protocol.link import Link
from protocol.messages import Status
from protocol.observer import Observer

CLASSES = ("zero", "one")
MULTIPLIER, DELTA = 0.5, 1e-5
PRIVACY = {"clip": 0.5, "noise_multiplier": MULTIPLIER, "delta": DELTA, "epsilon": 1000.0}
RECIPE = {
    "local_steps": 2,
    "first_block": 5,
    "features_per_class": 0,
    "privacy": PRIVACY,
    "text": {"steps": 2, "aligning_round": False},
    "personal": {"closing_steps": 0},
}
NAMES = ("ann", "bob", "cid")
ONE_ROUND, TWO_ROUNDS = epsilon_of([MULTIPLIER] * 2, DELTA), epsilon_of([MULTIPLIER] * 4, DELTA)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture
def homes(tmp_path: Path) -> dict[str, Path]:
    digits = [picture for picture in find_pictures("digits") if picture.label in CLASSES]
    for number, picture in enumerate(digits[:48]):
        file = tmp_path / "pictures" / NAMES[number % 3] / picture.label / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.load().save(file)
    return {name: tmp_path / "pictures" / name for name in NAMES}


def take_part(broker: MemoryBroker, config: ClientConfig, stop: threading.Event) -> None:
    """Run one client as `clipcast client run` does, on the bus in memory."""
    outbox = Outbox(config.state)
    try:
        trainer, part, status = new_client(config, load_profile("generic-cpu"), outbox.load())
        end = ClientEnd("private", config.id, random.Random(config.id), config.state)
        end.announce(status)
        participate(Link(broker.connect(end.will()), end), end, trainer, part, stop, outbox)
    finally:
        outbox.close()


def coordinate(broker: MemoryBroker, state: Path, rounds: int, quorum: int) -> list[RoundRecord]:
    """One life of a coordinator."""
    config = CoordinatorConfig.model_validate(
        {
            "federation": "private",
            "classes": CLASSES,
            "rounds": rounds,
            "clients_per_round": 3,
            "quorum": quorum,
            "deadline_s": 60,
            "recipe": RECIPE,
            "state": state,
        }
    )
    bus, store = broker.connect(), Store(state)
    try:
        end = CoordinatorEnd("private", random.Random(0), state=state)
        bank = make_bank(config.model, config.classes, config.templates)
        return list(Federation(config, bank, Link(bus, end), end, store).run())
    finally:
        store.close()
        bus.close()


def test_a_device_whose_budget_is_spent_stays_and_the_round_goes_on_without_it(homes, tmp_path) -> None:
    """Cid's owner allows one round. The first needs all three updates, the second, after a restart, two."""
    broker, stop = MemoryBroker(), threading.Event()
    told: list[Status] = []
    limits = {"cid": (ONE_ROUND + TWO_ROUNDS) / 2}
    configs = {
        name: ClientConfig(
            id=name,
            federation="private",
            data=str(homes[name]),
            state=tmp_path / name,
            bits=4,
            threads=1,
            max_epsilon=limits.get(name),
        )
        for name in NAMES
    }
    watch = Link(broker.connect(), Observer("private"))
    watch.poll(0.0)
    with ThreadPoolExecutor(4) as pool:
        clients: dict[str, Future[None]] = {
            name: pool.submit(take_part, broker, config, stop) for name, config in configs.items()
        }
        try:
            (first,) = coordinate(broker, tmp_path / "state", 1, 3)
            (second,) = coordinate(broker, tmp_path / "state", 2, 2)
            deadline = time.monotonic() + 60
            while not told:
                assert time.monotonic() < deadline, "waited 60 s for cid to say why"
                seen = [event for event in watch.poll(0.1) if event.client == "cid"]
                told += [event.status for event in seen if event.status.phase == "failed"]
            assert not any(client.done() for client in clients.values())
        finally:
            stop.set()
        assert [client.exception(60) for client in clients.values()] == [None] * 3
    assert (first.accepted, first.silent, first.loss, first.train_accuracy) == (list(NAMES), [], None, None)
    assert first.epsilon == pytest.approx(dict.fromkeys(NAMES, ONE_ROUND))
    assert (second.accepted, second.silent, second.outcome) == (["ann", "bob"], ["cid"], "aggregated")
    assert second.epsilon == pytest.approx(dict.fromkeys(("ann", "bob"), TWO_ROUNDS))
    assert [(status.state, status.round) for status in told] == [("online", 2)]
    assert "this device's owner allows" in told[0].detail
    spent = {name: len(Ledger(tmp_path / name / "ledger.json").disclosures) for name in NAMES}
    assert spent == {"ann": 4, "bob": 4, "cid": 2}
    settings = tmp_path / "coordinator.toml"
    settings.write_text(f"federation = 'private'\nclasses = {list(CLASSES)}\nstate = '{tmp_path / 'state'}'\n")
    command = [sys.executable, "-m", "clipcast", "coordinator", "rounds", str(settings)]
    shown = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert [RoundRecord.model_validate_json(line).epsilon for line in shown] == [first.epsilon, second.epsilon]
    brief = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert f"no loss told, epsilon up to {TWO_ROUNDS:.2f}" in brief[1]
