"""A small round without a model: two layers of width 6, three classes, features 8 wide. Updates are real, only small."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from clip_lora.shapes import Shapes
from coordinator.checks import Expectation, Start
from coordinator.records import RoundRecord
from protocol.codec import encode_update, reference
from protocol.messages import Offer, Recipe, RoundPlan, Update

WIDTH, CLASSES = 8, 3
SHAPES: Shapes = {
    "layer.0.lora_A": (2, 6),
    "layer.0.lora_B": (6, 2),
    "layer.1.lora_A": (2, 6),
    "layer.1.lora_B": (6, 2),
}
MakeUpdate = Callable[..., Update]
MakeOffer = Callable[..., Offer]


def a_record(number: int, **fields: object) -> RoundRecord:
    """A round that somebody delivered in and nothing else is told of, but for the fields that are given."""
    plain = {
        "outcome": "aggregated",
        "accepted": [],
        "rejected": [],
        "silent": [],
        "samples": 1,
        "loss": None,
        "train_accuracy": None,
        "seconds": 1.0,
        "bytes_up": {},
        "bytes_down": {},
        "adapter_sha256": "a" * 64,
        "bank_version": 1,
    }
    return RoundRecord.model_validate({"round": number, **plain, **fields})


@pytest.fixture(scope="session")
def shapes() -> Shapes:
    return SHAPES


@pytest.fixture(scope="session")
def plan() -> RoundPlan:
    return RoundPlan(
        run="run-1",
        start=1,
        round=3,
        state="open",
        classes="c" * 64,
        adapter=reference(b"the global adapter"),
        participants=("ann", "bob", "cid", "dan"),
        recipe=Recipe(rank=2, features_per_class=2, min_prototype_count=1),
        seed=0,
        deadline_s=100.0,
    )


@pytest.fixture(scope="session")
def expected(plan: RoundPlan) -> Expectation:
    starts = {client: Start(plan.adapter.sha256, SHAPES) for client in plan.participants}
    return Expectation(plan, starts, WIDTH, CLASSES)


@pytest.fixture(scope="session")
def make_update() -> MakeUpdate:
    """An update that deserves to be accepted, different for every seed; keyword arguments replace its fields."""

    def make(seed: int = 0, **fields: object) -> Update:
        rng = np.random.default_rng(seed)

        def unit(rows: int) -> np.ndarray:
            array = rng.normal(size=(rows, WIDTH))
            return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)

        good = {
            "adapter": {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()},
            "prototypes": unit(2),
            "prototype_classes": np.array([0, 2], np.int32),
            "prototype_counts": np.array([5, 1], np.int32),
            "prototype_correct": np.array([3, 1], np.int32),
            "features": unit(3),
            "labels": np.array([0, 0, 2], np.int32),
        }
        return Update(**{**good, **fields})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def make_offer(plan: RoundPlan) -> MakeOffer:
    """An offer that fits an update of the plan; keyword arguments replace its fields."""

    def make(update: Update, samples: int = 6, **fields: object) -> Offer:
        good = {
            "round": plan.round,
            "base": plan.adapter.sha256,
            "blob": reference(encode_update(update)),
            "samples": samples,
            "loss": 1.0,
            "accuracy": 0.5,
            "train_seconds": 1.0,
            "bytes_received": 0,
        }
        return Offer.model_validate({**good, **fields})

    return make
