"""A client without torch: what it sends is drawn from the plan's seed, the round, its name and its start adapter."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import numpy as np

from protocol.events import PlanReady
from protocol.messages import FloatArray, TrainingResult, Update

STEP = 0.01
RANK_BYTES = 18_432  # of an update of tiny-clip, by rank
FEATURE_BYTES = 264
MOST_RANK = 256
SAMPLES = (8, 64)


def light_result(ready: PlanReady, client: str) -> TrainingResult:
    """Return a result of the plan's shapes: a step from the start adapter, unit prototypes of all classes, unit features."""
    plan, (classes, width) = ready.plan, ready.bank.embeddings.shape
    said = f"{plan.seed}:{plan.round}:{client}:{ready.base}"
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big"))
    adapter = {
        name: factor + np.float32(STEP) * rng.standard_normal(factor.shape, np.float32)
        for name, factor in sorted(ready.adapter.items())
    }
    counts = rng.integers(*SAMPLES, classes).astype(np.int32)
    labels = np.repeat(np.arange(classes, dtype=np.int32), plan.recipe.features_per_class)
    update = Update(
        adapter,
        _unit(rng.standard_normal((classes, width), np.float32)),
        np.arange(classes, dtype=np.int32),
        counts,
        (counts // 2).astype(np.int32),
        _unit(rng.standard_normal((len(labels), width), np.float32)),
        labels,
    )
    loss, accuracy = rng.random(2)
    return TrainingResult(plan.round, ready.base, update, int(counts.sum()), float(loss), float(accuracy), 0.0)


def recipe_of(size: int, classes: int) -> dict[str, object]:
    """Return a recipe by which tiny-clip's updates have about `size` bytes."""
    rank = max(1, min(MOST_RANK, size // RANK_BYTES))
    features = (size - rank * RANK_BYTES) // (FEATURE_BYTES * classes)
    return {"name": "fedlora", "rank": rank, "features_per_class": features}


def _unit(rows: FloatArray) -> FloatArray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class LightTrainer:
    """Stands where edge_client/trainer.py's Trainer stands; takes `seconds` for a round."""

    def __init__(self, client: str, seconds: float = 0.0) -> None:
        self._client = client
        self._seconds = seconds

    def run(self, ready: PlanReady, stopped: Callable[[], bool]) -> TrainingResult:
        """Return the round's result."""
        until = time.monotonic() + self._seconds
        while time.monotonic() < until and not stopped():
            time.sleep(0.02)
        return light_result(ready, self._client)
