"""Seconds of a round in which nobody trains: 2 clients, a 1.2 MB adapter, real broker, loopback.

    python benchmarks/round_overhead.py [--broker mqtt://HOST:PORT] [--rounds 20]

Coordinator and both clients run as they do in production, in one process of three threads, over the embedded broker
unless another is named. A client answers a plan at once with an update of the same size as the global adapter: what is
measured is the plan's way down, the adapter's way down, the update's way up, the checks, the mean, and the atomic save.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np

from clip_lora.shapes import adapter_shapes
from clip_lora.towers import load_sizes
from clipcast.demo.broker import embedded_broker
from coordinator.config import CoordinatorConfig
from coordinator.rounds import Federation
from coordinator.state.store import Store
from coordinator.text_bank import make_bank
from edge_client.config import Placement
from edge_client.participate import participate
from edge_client.participation import Participation
from edge_client.trainer import Trainer
from protocol.client_end import ClientEnd
from protocol.codec import encode_adapter
from protocol.coordinator_end import CoordinatorEnd
from protocol.events import PlanReady
from protocol.link import Link
from protocol.messages import Recipe, Status, TrainingResult, Update
from protocol.mqtt import MqttBus
from protocol.settings import BrokerSettings

# tiny-clip's adapter at rank 64: 589,824 values, as many as ViT-B's at rank 8.
RECIPE = Recipe(rank=64, alpha=64.0)


class NoTraining(Trainer):
    """Answers a plan at once, with an adapter of the same shape."""

    def __init__(self) -> None:
        super().__init__("bench", "", Placement(4, 1, 64, "cpu"), None)

    def run(self, ready: PlanReady, stopped: Callable[[], bool]) -> TrainingResult:  # noqa: ARG002 - Trainer's signature
        """Return an update without training."""
        width = ready.bank.embeddings.shape[1]
        none = np.zeros(0, np.int32)
        # A changed adapter: an unchanged one has the same hash, and nobody would fetch it again.
        adapter = {name: factor + np.float32(0.01) for name, factor in ready.adapter.items()}
        update = Update(adapter, np.zeros((0, width), np.float32), none, none, none, np.zeros((0, width), np.float32), none)
        return TrainingResult(ready.plan.round, ready.base, update, 100, 0.0, 0.0, 0.0)


def client(name: str, url: str, stop: threading.Event) -> None:
    """Run one client until `stop`."""
    end = ClientEnd("bench", name, random.Random(name))
    bus = MqttBus.open(BrokerSettings(url=url), f"bench-{name}", end.will())
    end.announce(Status(state="online"))
    participate(Link(bus, end), end, NoTraining(), Participation(Status(state="online")), stop)


def measure(url: str, rounds: int, state: Path) -> list[float]:
    """Return the seconds from one round's record to the next."""
    config = CoordinatorConfig(
        federation="bench", classes=("cat", "dog"), rounds=rounds, deadline_s=60, state=state, recipe=RECIPE
    )
    bank = make_bank(config.model, config.classes, config.templates)
    stop = threading.Event()
    threads = [threading.Thread(target=client, args=(name, url, stop)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    bus = MqttBus.open(config.broker.model_copy(update={"url": url}), "bench-coordinator")
    marks = []
    try:
        end = CoordinatorEnd("bench", random.Random(0))
        for _ in Federation(config, bank, Link(bus, end), end, Store(state)).run():
            marks.append(time.monotonic())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        bus.close()
    return [later - earlier for earlier, later in pairwise(marks)]


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--broker")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    shapes = adapter_shapes(load_sizes("tiny-clip"), "vision", RECIPE)
    size = len(encode_adapter({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}))
    with (
        tempfile.TemporaryDirectory() as folder,
        embedded_broker(Path(folder)) if options.broker is None else nullcontext(options.broker) as url,
    ):
        seconds = measure(url, options.rounds, Path(folder) / "state")
    print(
        json.dumps(
            {
                "what": "seconds of a round without training, 2 clients, loopback",
                "adapter_bytes": size,
                "rounds": len(seconds),
                "median": round(statistics.median(seconds), 3),
                "max": round(max(seconds), 3),
                "machine": f"{platform.machine()}, Python {platform.python_version()}",
                "date": time.strftime("%Y-%m-%d"),
            }
        )
    )


if __name__ == "__main__":
    main()
