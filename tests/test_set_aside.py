"""A device whose update outweighs the others: its receipt said accepted, and in the end it is set aside and told."""

from __future__ import annotations

import dataclasses
import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from coordinator.config import CoordinatorConfig
from coordinator.rounds import Federation
from coordinator.state.store import Store
from coordinator.text_bank import make_bank
from edge_client.participate import participate
from edge_client.participation import Participation
from edge_client.trainer import Trainer
from protocol.bus import MemoryBroker
from protocol.client_end import ClientEnd
from protocol.coordinator_end import CoordinatorEnd
from protocol.events import PlanReady
from protocol.link import Link
from protocol.messages import Status, TrainingResult
from tests.faults.light import LightTrainer

HONEST, EVIL = ("ann", "bob", "cid"), "eve"


class Scaled:
    """A trainer that blows its result up a thousandfold."""

    def __init__(self, trainer: LightTrainer) -> None:
        self._trainer = trainer

    def run(self, ready: PlanReady, stopped: Callable[[], bool]) -> TrainingResult:
        result = self._trainer.run(ready, stopped)
        blown = {name: factor * np.float32(1000) for name, factor in result.update.adapter.items()}
        return dataclasses.replace(result, update=dataclasses.replace(result.update, adapter=blown))


def test_who_is_set_aside_is_told_and_named_in_the_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broker, stop = MemoryBroker(), {name: threading.Event() for name in (*HONEST, EVIL)}
    config = CoordinatorConfig.model_validate(
        {
            "federation": "lab",
            "classes": ["cat", "dog"],
            "rounds": 1,
            "clients_per_round": 4,
            "quorum": 4,  # so that the round waits for all of them; without eve it is missed
            "recipe": {"name": "fedlora", "first_block": -1, "rank": 2, "features_per_class": 0},
            "state": tmp_path,
        }
    )

    def client(name: str) -> None:
        trainer = LightTrainer(name)
        end = ClientEnd("lab", name, random.Random(name))
        end.announce(status := Status(state="online"))
        link, part = Link(broker.connect(end.will()), end), Participation(status)
        participate(link, end, cast("Trainer", Scaled(trainer) if name == EVIL else trainer), part, stop[name])

    end, store = CoordinatorEnd("lab", random.Random(0)), Store(tmp_path)
    link = Link(broker.connect(), end)
    bank = make_bank(config.model, config.classes, config.templates)
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(4) as pool:
        running = [pool.submit(client, name) for name in stop]
        try:
            (record,) = Federation(config, bank, link, end, store).run()
            deadline = time.monotonic() + 60
            while not (told := [line for line in caplog.messages if line.startswith("the coordinator says")]):
                assert time.monotonic() < deadline, "waited 60 s for eve to be told"
                time.sleep(0.01)
        finally:
            for event in stop.values():
                event.set()
            store.close()
        assert [future.exception(60) for future in running] == [None] * 4
    assert (record.outcome, record.accepted) == ("quorum-missed", list(HONEST))
    assert [(refusal.client, refusal.reason) for refusal in record.rejected] == [(EVIL, "norm-too-large")]
    assert len(told) == 1
    assert "norm-too-large" in told[0]
