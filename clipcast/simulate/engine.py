"""Who trains the virtual clients: this process, one after another, all on one quantised base."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Literal, Protocol

from edge_client.config import Placement
from edge_client.encoders import Encoders
from edge_client.errors import PlanRefusedError
from edge_client.privacy.budget import virtual_budget
from edge_client.trainer import OpenPictures, Trainer
from protocol.events import PlanReady
from protocol.messages import TrainingResult

MAX_RANK = 256
BATCH_LIMIT = 4096


class Engine(Protocol):
    """Trains clients; results do not depend on which engine it is."""

    def submit(self, client: str, ready: PlanReady) -> Future[TrainingResult]:
        """Start a client's training."""

    def close(self) -> None:
        """Give back what the engine holds."""


class LocalEngine:
    """Trains at once, in the caller's thread."""

    def __init__(self, pictures: Mapping[str, OpenPictures], placement: Placement, encoders: Encoders) -> None:
        self._trainers = new_trainers(pictures, placement, encoders)

    def submit(self, client: str, ready: PlanReady) -> Future[TrainingResult]:
        """Train, and return what is done already."""
        done: Future[TrainingResult] = Future()
        try:
            done.set_result(self._trainers[client].run(ready, lambda: False))
        except PlanRefusedError as error:
            done.set_exception(error)
        return done

    def close(self) -> None:
        """Forget the clients' pictures."""
        self._trainers = {}


def place(bits: Literal[4, 8, 32], device: str) -> Placement:
    """Return how virtual clients train: the recipe alone limits batch and rank."""
    return Placement(bits, BATCH_LIMIT, MAX_RANK, "cuda" if device == "cuda" else "cpu")


def new_trainers(pictures: Mapping[str, OpenPictures], placement: Placement, encoders: Encoders) -> dict[str, Trainer]:
    """Return a trainer for each client, all with the same encoders."""
    return {
        client: Trainer(client, source, placement, None, encoders, budget=virtual_budget(client))
        for client, source in pictures.items()
    }
