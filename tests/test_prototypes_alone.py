"""Without single pictures' features: real devices send prototypes alone, or not even these, and the coordinator learns."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from clip_lora.shapes import adapter_shapes, initial_adapter
from clip_lora.towers import load_sizes, one_thread
from coordinator.aggregate import Contribution
from coordinator.checks import Expectation, Start, check_update
from coordinator.learning import Knowledge, Learner, stored
from coordinator.recipe import FederationRecipe
from coordinator.text_bank import make_bank
from edge_client.config import Placement
from edge_client.data import find_pictures, open_dataset
from edge_client.trainer import Trainer
from protocol.codec import decode_update, encode_adapter, encode_bank, reference
from protocol.events import PlanReady
from protocol.messages import RoundPlan
from protocol.transfer.parcel import pack

CLASSES = ("zero", "one", "two")
HELD = {"ann": {"zero": 6, "one": 6, "two": 2}, "bob": {"zero": 2, "one": 6, "two": 6}, "cid": {"zero": 2, "two": 3}}
CONFIG = load_sizes("tiny-clip")


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def homes(tmp_path_factory) -> dict[str, Path]:
    """Three devices' digits; cid has too few of every class."""
    folder = tmp_path_factory.mktemp("homes")
    digits = find_pictures("digits")
    for number, (client, counts) in enumerate(HELD.items()):
        for label, count in counts.items():
            place = folder / client / label
            place.mkdir(parents=True)
            for picture in [p for p in digits if p.label == label][number * 6 :][:count]:
                picture.load().save(place / f"{picture.name.split('/')[-1]}.png")
    return {client: folder / client for client in HELD}


@pytest.fixture(scope="module")
def bank():
    return make_bank("tiny-clip", CLASSES, ["a photo of a {}"])


def a_recipe(**fields):
    how = {"local_steps": 2, "batch_size": 8, "features_per_class": 0, "first_block": 4, "text": {"steps": 3}}
    return FederationRecipe.model_validate({**how, **fields})


def trained(recipe, bank, homes, number=1):
    """What the coordinator has of a round: every device's update, trained for real, packed, unpacked and checked."""
    how = recipe.training(CONFIG.vision.blocks)
    shapes = adapter_shapes(CONFIG, "vision", how)
    start = stored(initial_adapter(shapes, 0))
    ref = reference(encode_adapter(start))
    plan = RoundPlan(
        run="run-1",
        start=1,
        round=number,
        state="open",
        classes=reference(encode_bank(bank)).sha256,
        adapter=ref,
        participants=tuple(homes),
        recipe=how,
        seed=3,
        deadline_s=60.0,
    )
    expected = Expectation(plan, {client: Start(ref.sha256, shapes) for client in homes}, 256, len(CLASSES))
    arrived = {}
    for client, home in homes.items():
        trainer = Trainer(client, partial(open_dataset, str(home)), Placement(4, 32, 16, "cpu"), None)
        parcel = pack(trainer.run(PlanReady(plan, bank, start, ref.sha256), lambda: False))
        arrived[client] = Contribution(parcel.offer, decode_update(parcel.blob))
        assert check_update(client, arrived[client].update, expected).accepted
    return arrived, Knowledge(bank, start)


def test_the_text_side_learns_from_prototypes_alone(homes, bank):
    recipe = a_recipe()
    arrived, start = trained(recipe, bank, homes)
    assert {client: c.update.prototype_classes.tolist() for client, c in arrived.items()} == {
        "ann": [0, 1],
        "bob": [1, 2],
        "cid": [],
    }
    assert not any(len(c.update.features) for c in arrived.values())
    known, lesson = Learner(bank, recipe, 0).learn(arrived, start)
    assert lesson.text is not None
    assert lesson.text.samples == 4
    assert lesson.text.after < lesson.text.before
    assert known.bank.version == bank.version + 1
    assert not np.array_equal(known.bank.embeddings, bank.embeddings)
    assert lesson.class_accuracy.keys() == set(CLASSES)


def test_a_device_without_a_prototype_contributes_its_adapter_and_takes_the_global_one(homes, bank):
    recipe = a_recipe(personal={"query": "R1", "ex_query": True, "closing_steps": 2})
    arrived, start = trained(recipe, bank, homes)
    learner = Learner(bank, recipe, 0)
    known, lesson = learner.learn(arrived, start)
    without, _ = learner.learn({client: arrived[client] for client in ("ann", "bob")}, start)
    assert encode_adapter(known.adapter) != encode_adapter(without.adapter)
    assert lesson.renewed == ("ann", "bob")
    assert known.start_of("cid", recipe.rank) is known.adapter
    closed, _ = learner.close(arrived, known)
    assert encode_adapter(closed.own["cid"]) == encode_adapter(stored(arrived["cid"].update.adapter))


@pytest.mark.parametrize("query", ["R1", "R2", "R3", "identity"])
def test_with_neither_features_nor_prototypes_the_text_side_stays_as_it_is(homes, bank, query):
    recipe = a_recipe(min_prototype_count=7, personal={"query": query})
    arrived, start = trained(recipe, bank, homes)
    assert not any(len(c.update.prototypes) for c in arrived.values())
    known, lesson = Learner(bank, recipe, 0).learn(arrived, start)
    assert known.bank is bank
    assert (known.text, lesson.text, lesson.attention) == (None, None, None)
    assert lesson.class_accuracy == {}
    assert known.own == {}
    assert encode_adapter(known.adapter) != encode_adapter(start.adapter)


@pytest.mark.parametrize("query", ["R2", "R3"])
def test_every_reading_of_the_query_takes_who_has_no_prototype(homes, bank, query):
    recipe = a_recipe(personal={"query": query})
    arrived, start = trained(recipe, bank, homes)
    _, lesson = Learner(bank, recipe, 0).learn(arrived, start)
    assert lesson.attention is not None
    assert lesson.attention.clients == ("ann", "bob")
    np.testing.assert_allclose(lesson.attention.weights.sum(axis=1), 1.0)
