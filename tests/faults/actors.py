"""What runs in the processes: the real coordinator and the real client, as their commands put them together."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from clipcast.commands.client import take_part
from clipcast.commands.coordinator import conduct
from clipcast.exit_codes import BUG, code_of
from coordinator.config import CoordinatorConfig
from coordinator.model import LocalModel
from edge_client.config import ClientConfig
from edge_client.participation import Participation, Send, Step
from edge_client.work import Work
from protocol.events import Answered, ClientEvent, PlanReady
from protocol.messages import RoundPlan, Status
from protocol.transfer.parcel import Parcel
from tests.faults.light import LightTrainer


def coordinate(settings: dict[str, Any]) -> None:
    """Run a coordinator to its last round; it ends as its command does."""
    try:
        config = CoordinatorConfig.model_validate(settings)
        for record in conduct(config, LocalModel(config.model)):
            counts = f"{len(record.accepted)} accepted, {len(record.rejected)} rejected"
            print(f"round {record.round}: {record.outcome}, {counts}", flush=True)
    except Exception as error:
        if code_of(error) == BUG:
            raise
        print(f"error: {error}", flush=True)
        sys.exit(code_of(error))


def take_part_lightly(settings: dict[str, Any], notes: str, seconds: float = 0.0) -> None:
    """Run a client that trains nothing, and note what it offers and the receipts that it gets."""
    config = ClientConfig.model_validate(settings)

    def prepare(done: Work | None) -> tuple[LightTrainer, NotingParticipation, Status]:
        status = Status(state="online")
        return LightTrainer(config.id, seconds), NotingParticipation(Participation(status, done), Path(notes)), status

    take_part(config, prepare)  # type: ignore[arg-type]


def train_for_real(path: str) -> None:
    """Run a real client by its settings file."""
    from clipcast.commands.client import run

    run(Path(path))


def embed_broker(folder: str, port: int) -> None:
    """Run the embedded broker until killed."""
    from clipcast.demo.broker import embedded_broker

    with embedded_broker(Path(folder), port):
        threading.Event().wait()


class NotingParticipation:
    """A Participation that writes down what happens, before anything follows from it: one JSON line each, in one write."""

    def __init__(self, part: Participation, notes: Path) -> None:
        self._part = part
        self._notes = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    @property
    def training(self) -> RoundPlan | None:
        """The plan that is being trained for."""
        return self._part.training

    def on(self, event: ClientEvent) -> list[Step]:
        """Take in an event of the wire."""
        if isinstance(event, Answered):
            self._note("receipt", **event.receipt.model_dump(mode="json"))
        elif isinstance(event, PlanReady):
            self._note("plan", round=event.plan.round)
        return self._noted(self._part.on(event))

    def trained(self, parcel: Parcel) -> list[Step]:
        """Take in a finished training."""
        return self._noted(self._part.trained(parcel))

    def failed(self, problem: str) -> list[Step]:
        """Take in a failed training."""
        return self._part.failed(problem)

    def missed(self, problem: str) -> list[Step]:
        """Take in a training that came to nothing."""
        return self._noted(self._part.missed(problem))

    def _noted(self, steps: list[Step]) -> list[Step]:
        for step in steps:
            if isinstance(step, Send):
                offer = step.work.parcel.offer
                self._note("send", round=offer.round, sha256=offer.blob.sha256, size=offer.blob.size)
        return steps

    def _note(self, what: str, **facts: Any) -> None:
        os.write(self._notes, (json.dumps({"what": what, "at": time.monotonic(), **facts}) + "\n").encode())


def read_notes(path: Path) -> list[dict[str, Any]]:
    """Return what a client noted, over all its lives."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
