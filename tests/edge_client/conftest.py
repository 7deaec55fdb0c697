"""Real digits as folders, a real class bank, and one 4-bit encoder that the read-only tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from clip_lora.lora import load_adapter
from clip_lora.shapes import adapter_shapes, initial_adapter
from clip_lora.towers import load_sizes, one_thread
from coordinator.text_bank import make_bank
from edge_client.checkpoint import Checkpoint
from edge_client.config import Placement
from edge_client.data import Dataset, find_pictures, open_dataset
from edge_client.encoder import ImageEncoder
from edge_client.encoders import Encoders
from edge_client.privacy.budget import Budget
from edge_client.trainer import Trainer
from protocol.codec import encode_adapter, encode_bank, reference
from protocol.events import PlanReady
from protocol.messages import Recipe, RoundPlan, TextBank
from tests.edge_client.inference.exported import models, photograph

__all__ = ["models", "photograph"]  # fixtures of inference/ and releases/

CLASSES = ("zero", "one", "two")
RECIPE = Recipe(local_steps=3, batch_size=8, features_per_class=2)
MakeReady = Callable[..., PlanReady]
MakeTrainer = Callable[..., Trainer]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny-clip gains nothing from a second thread, and waits for it long when other work has the core."""
    with one_thread():
        yield


@pytest.fixture(scope="session")
def bank() -> TextBank:
    return make_bank("tiny-clip", CLASSES, ["a photo of a {}"])


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return RECIPE


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four real digits in one sub-folder per class."""
    folder = tmp_path_factory.mktemp("home")
    for name in CLASSES:
        (folder / name).mkdir()
        for number, picture in enumerate([p for p in find_pictures("digits") if p.label == name][:8]):
            picture.load().save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def make_ready() -> MakeReady:
    """A plan that has arrived whole: the initial adapter of its recipe, and a bank."""

    def make(bank: TextBank, recipe: Recipe = RECIPE, number: int = 1, clients: tuple[str, ...] = ("ann",)) -> PlanReady:
        adapter = initial_adapter(adapter_shapes(load_sizes("tiny-clip"), "vision", recipe), 0)
        plan = RoundPlan(
            run="0123456789abcdef",
            start=1,
            round=number,
            state="open",
            classes=reference(encode_bank(bank)).sha256,
            adapter=reference(encode_adapter(adapter)),
            participants=clients,
            recipe=recipe,
            seed=7,
            deadline_s=60.0,
        )
        return PlanReady(plan, bank, adapter, plan.adapter.sha256)

    return make


@pytest.fixture(scope="session")
def make_trainer(home: Path) -> MakeTrainer:
    """A trainer on `home`; keyword arguments replace parts of its placement."""

    def make(
        client: str = "ann",
        source: str = str(home),
        model: str | None = None,
        checkpoint: Checkpoint | None = None,
        budget: Budget | None = None,
        encoders: Encoders | None = None,
        report: Callable[[str], None] = lambda _: None,
        root: Path | None = None,
        **placement: object,
    ) -> Trainer:
        where = replace(Placement(4, 32, 16, "cpu"), **placement)  # type: ignore[arg-type]
        opener = partial(open_dataset, source)
        return Trainer(client, opener, where, model, encoders, checkpoint, budget, report, root)

    return make


@pytest.fixture(scope="session")
def encoder(make_ready: MakeReady, bank: TextBank) -> ImageEncoder:
    """Tiny-clip in 4 bits with the initial adapter; leave its adapter as it is."""
    encoder = ImageEncoder("tiny-clip", 4, "cpu", RECIPE)
    load_adapter(encoder.model, make_ready(bank).adapter)
    return encoder


@pytest.fixture(scope="session")
def dataset(home: Path, encoder: ImageEncoder) -> Dataset:
    return open_dataset(str(home), CLASSES, encoder.preprocessing)
