"""A round's learning as a whole, and that a coordinator which stops and starts again learns the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from clip_lora.algebra import delta, layers
from clip_lora.shapes import initial_adapter
from clip_lora.towers import one_thread
from coordinator.aggregate import Contribution, aggregate
from coordinator.checks import Expectation, Start, check_update
from coordinator.errors import FederationError
from coordinator.learning import Knowledge, Learner, class_accuracy, stored
from coordinator.recipe import FederationRecipe
from coordinator.records import AttentionRecord, Identity, TextRecord, mean_told
from coordinator.state.store import Store
from coordinator.text_bank import make_bank
from protocol.codec import decode_update, encode_adapter, encode_bank, encode_update, reference, sha256
from protocol.messages import Offer, RoundPlan, Update
from tests.coordinator.conftest import a_record

CLASSES = ("zero", "one", "cat")
SHAPES = {
    f"vision_model.encoder.layers.{block}.self_attn.q_proj.lora_{factor}": shape
    for block in range(2)
    for factor, shape in (("A", (2, 5)), ("B", (5, 2)))
}
IDENTITY = Identity(
    federation="lab", model_digest="a" * 64, classes=CLASSES, rank=2, alpha=4.0, projections=("q_proj",), first_block=0
)
HELD = {"ann": {0: 12, 1: 5}, "bob": {1: 30, 2: 4}, "cid": {2: 9}}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def bank():
    return make_bank("tiny-clip", CLASSES, ["a photo of a {}"])


@pytest.fixture
def start(bank):
    return Knowledge(bank, stored(initial_adapter(SHAPES, 0)))


def recipe(name="fedalign", steps=2, **fields):
    given = {"name": name, "rank": 2, **fields}
    if name in ("fedalign", "feddtl"):
        given = {"text": {"steps": steps, "rank": 2}, **given}
    return FederationRecipe.model_validate(given)


def upload(bank, client, round_number=1, features=True):
    """What a client sends in a round: one feature of each of its classes but class 2, which nobody predicts correctly."""
    rng = np.random.default_rng((round_number, *client.encode()))
    counts = HELD[client]
    labels = [c for c in counts if c != 2] if features else []

    def near(classes):
        rows = bank.embeddings[classes] + rng.normal(0.0, 0.1, (len(classes), bank.embeddings.shape[1]))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    return Update(
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()},
        near(list(counts)),
        np.array(list(counts), np.int32),
        np.array(list(counts.values()), np.int32),
        np.array([n // 2 if c in labels else 0 for c, n in counts.items()], np.int32),
        near(labels),
        np.array(labels, np.int32),
    )


def contribution(update):
    """The update as it comes out of the wire."""
    blob = encode_update(update)
    offer = Offer(
        round=1,
        base="0" * 64,
        blob=reference(blob),
        samples=max(1, int(update.prototype_counts.sum())),
        loss=1.0,
        accuracy=0.5,
        train_seconds=1.0,
        bytes_received=0,
    )
    return Contribution(offer, decode_update(blob))


def contributions(bank, round_number=1, clients=tuple(HELD), features=True):
    return {client: contribution(upload(bank, client, round_number, features)) for client in clients}


def bits(known):
    """Everything that is known, to the bit."""
    return (
        encode_bank(known.bank),
        exact(known.adapter),
        known.text and exact(known.text),
        {client: exact(adapter) for client, adapter in sorted(known.own.items())},
    )


def exact(adapter):
    return {name: factor.tobytes() for name, factor in sorted(adapter.items())}


RECIPES = {
    "fedalign": recipe(),
    "products-of-clusters": recipe(
        aggregation="mean_of_products", personal={"query": "R2", "clusters": 2, "cut": 1, "own_share": 0.2}
    ),
    "text-as-query": recipe(personal={"query": "R3"}),
    "feddtl": recipe("feddtl", first_block=0),
    "fedlora": recipe("fedlora"),
}


@pytest.mark.parametrize("how", RECIPES.values(), ids=RECIPES)
def test_the_order_of_arrival_leaves_no_trace(bank, start, how):
    arrived = contributions(bank)
    one, lesson = Learner(bank, how, 0).learn(arrived, start)
    other, again = Learner(bank, how, 0).learn({c: arrived[c] for c in ("cid", "ann", "bob")}, start)
    assert bits(one) == bits(other)
    assert (lesson.text, lesson.class_accuracy, lesson.renewed) == (again.text, again.class_accuracy, again.renewed)
    if lesson.attention:
        assert lesson.attention.weights.tobytes() == again.attention.weights.tobytes()


@pytest.mark.parametrize("how", RECIPES.values(), ids=RECIPES)
def test_all_that_is_known_has_the_values_that_disk_and_wire_keep(bank, start, how):
    known, _ = Learner(bank, how, 0).learn(contributions(bank), start)
    for adapter in (known.adapter, known.text or {}, *known.own.values()):
        for factor in adapter.values():
            assert factor.dtype == np.float32
            assert np.array_equal(factor.astype(np.float16).astype(np.float32), factor)


def test_fedalign_trains_the_text_side_averages_and_personalises(bank, start):
    arrived = contributions(bank)
    known, lesson = Learner(bank, recipe(), 0).learn(arrived, start)
    assert lesson.text.after < lesson.text.before
    assert lesson.text.samples == 3 + 2, "the features of ann and bob, and two prototypes of class 2"
    assert known.bank.version == 2
    assert not np.array_equal(known.bank.embeddings, bank.embeddings)
    assert exact(known.adapter) == exact(stored(aggregate(arrived, "mean_of_factors", 2, {})))
    assert lesson.renewed == tuple(sorted(known.own)) == ("ann", "bob", "cid")
    assert len({encode_adapter(adapter) for adapter in (*known.own.values(), known.adapter)}) == 4


def test_the_bank_is_that_of_the_text_adapter_which_is_kept(bank, start):
    # Not of the one before rounding: a restarted coordinator has only the rounded one.
    learner = Learner(bank, recipe(), 0)
    known, _ = learner.learn(contributions(bank), start)
    other = Learner(bank, recipe(), 1)
    other._model._text.load(known.text)
    assert other._model._text.bank(2).embeddings.tobytes() == known.bank.embeddings.tobytes()


def test_r3_asks_with_the_newest_class_bank(bank, start):
    _, lesson = Learner(
        bank, recipe(steps=30, text={"steps": 30, "learning_rate": 0.01}, personal={"query": "R3"}), 0
    ).learn(contributions(bank), start)
    _, frozen = Learner(bank, recipe(text={"steps": 0}, personal={"query": "R3"}), 0).learn(contributions(bank), start)
    assert np.abs(lesson.attention.weights - frozen.attention.weights).max() > 1e-3


def test_fedlora_leaves_text_side_and_clients_own_adapters_out(bank, start):
    arrived = contributions(bank)
    learner = Learner(bank, recipe("fedlora"), 0)
    known, lesson = learner.learn(arrived, start)
    assert learner.text_shapes is None
    assert (lesson.text, lesson.attention, lesson.renewed) == (None, None, ())
    assert (known.text, dict(known.own)) == (None, {})
    assert known.bank is start.bank
    assert exact(known.adapter) == exact(stored(aggregate(arrived, "mean_of_factors", 2, {})))


def test_local_keeps_everybodys_own_adapter_and_no_common_one(bank, start):
    arrived = contributions(bank)
    known, lesson = Learner(bank, recipe("local"), 0).learn(arrived, start)
    assert lesson.text is None
    assert exact(known.adapter) == exact(start.adapter)
    for client, part in arrived.items():
        assert exact(known.own[client]) == exact(stored(part.update.adapter))
    assert np.array_equal(lesson.attention.weights, np.eye(3))


def test_zero_shot_learns_nothing(bank, start):
    known, lesson = Learner(bank, recipe("zero-shot"), 0).learn(contributions(bank), start)
    assert bits(known) == bits(start)
    assert (lesson.text, lesson.attention) == (None, None)


def test_the_text_side_rests_where_nothing_came_up_to_learn_from(bank, start):
    how = recipe("feddtl", first_block=0)
    learner = Learner(bank, how, 0)
    known, lesson = learner.learn(contributions(bank, features=False), start)
    assert (lesson.text, known.text, known.bank.version) == (None, None, 1)
    later, _ = learner.learn(contributions(bank, 2), known)
    rested, _ = learner.learn(contributions(bank, 3, features=False), later)
    assert exact(rested.text) == exact(later.text)
    assert (later.bank.version, rested.bank.version) == (2, 2)


def test_each_round_that_trains_the_text_side_makes_the_next_version(bank, start):
    learner, known = Learner(bank, recipe(), 0), start
    for number in (1, 2, 3):
        known, _ = learner.learn(contributions(bank, number), known)
        assert known.bank.version == 1 + number
        assert (known.bank.classes, known.bank.model_digest) == (bank.classes, bank.model_digest)


def test_the_text_side_learns_on_from_what_is_known(bank, start):
    learner = Learner(bank, recipe(text={"steps": 4, "continued": True}), 0)
    first, one = learner.learn(contributions(bank), start)
    _, two = learner.learn(contributions(bank), first)
    assert two.text.before == pytest.approx(one.text.after, rel=0.05)
    assert two.text.after < one.text.after


def test_the_text_side_begins_anew_in_every_round_unless_told_otherwise(bank, start):
    learner = Learner(bank, recipe(steps=4), 0)
    first, one = learner.learn(contributions(bank), start)
    second, two = learner.learn(contributions(bank), first)
    assert (two.text, exact(second.text)) == (one.text, exact(first.text))


def test_aligning_moves_the_class_bank_alone(bank, start):
    learner = Learner(bank, recipe(steps=4), 0)
    known, lesson = learner.align(contributions(bank), start)
    assert (known.bank.version, known.text is not None) == (2, True)
    assert exact(known.adapter) == exact(start.adapter)
    assert (known.own, lesson.attention, lesson.renewed) == (start.own, None, ())
    assert lesson.text.after < lesson.text.before
    assert lesson.class_accuracy


def test_closing_moves_the_own_adapters_of_those_who_answered_alone(bank, start):
    arrived = contributions(bank, clients=("ann", "bob"))
    before = replace(start, own={"bob": start.adapter, "cid": start.adapter})
    known, lesson = Learner(bank, recipe(steps=4), 0).close(arrived, before)
    assert replace(known, own={}) == replace(before, own={})
    assert exact(known.own["cid"]) == exact(start.adapter)
    for client in ("ann", "bob"):
        assert exact(known.own[client]) == exact(stored(arrived[client].update.adapter))
    assert lesson.renewed == ("ann", "bob")


def test_a_client_that_is_absent_keeps_its_own_adapter(bank, start):
    learner = Learner(bank, recipe(), 0)
    first, _ = learner.learn(contributions(bank), start)
    second, lesson = learner.learn(contributions(bank, 2, ("bob", "cid")), first)
    assert lesson.renewed == ("bob", "cid")
    assert exact(second.own["ann"]) == exact(first.own["ann"])
    assert exact(second.own["bob"]) != exact(first.own["bob"])
    assert sorted(first.own) == ["ann", "bob", "cid"]


def blocks(adapter, number):
    """The factors of one block, exactly."""
    return {name: array.tobytes() for name, array in adapter.items() if f".layers.{number}." in name}


def test_below_the_cut_everybody_has_the_global_adapter_the_absent_too(bank, start):
    learner = Learner(bank, recipe(personal={"query": "R1", "cut": 1}), 0)
    first, _ = learner.learn(contributions(bank), start)
    second, lesson = learner.learn(contributions(bank, 2, ("bob", "cid")), first)
    assert lesson.renewed == ("ann", "bob", "cid")
    for client in ("ann", "bob", "cid"):
        assert blocks(second.own[client], 0) == blocks(second.adapter, 0)
    assert blocks(second.own["ann"], 1) == blocks(first.own["ann"], 1)
    assert blocks(second.own["bob"], 1) != blocks(first.own["bob"], 1)


@pytest.mark.parametrize("ex_query", [True, False])
def test_closing_keeps_the_cut(bank, start, ex_query):
    how = recipe(personal={"query": "R1", "cut": 1, "closing_steps": 2, "ex_query": ex_query})
    known, _ = Learner(bank, how, 0).close(contributions(bank, clients=("ann", "bob")), start)
    for client in ("ann", "bob"):
        assert blocks(known.own[client], 0) == blocks(start.adapter, 0)
        assert blocks(known.own[client], 1) != blocks(start.adapter, 1)


def test_a_client_starts_from_its_own_adapter_or_else_the_global_one_at_its_rank(bank, start):
    known, _ = Learner(bank, recipe(), 0).learn(contributions(bank, clients=("ann", "bob")), start)
    assert exact(known.start_of("ann", 2)) == exact(known.own["ann"])
    assert exact(known.start_of("eve", 2)) == exact(known.adapter)
    wider = known.start_of("eve", 4)
    for layer in layers(known.adapter):
        assert wider[layer + ".lora_A"].shape == (4, 5)
        np.testing.assert_allclose(delta(wider, layer, 1.0), delta(known.adapter, layer, 1.0), atol=1e-5)


def test_class_accuracy_equals_a_loop_over_clients_and_classes(bank):
    arrived = contributions(bank, clients=("ann", "bob"))
    seen, correct = dict.fromkeys(CLASSES, 0), dict.fromkeys(CLASSES, 0)
    for part in arrived.values():
        for c, n, right in zip(
            part.update.prototype_classes, part.update.prototype_counts, part.update.prototype_correct, strict=True
        ):
            seen[CLASSES[c]] += int(n)
            correct[CLASSES[c]] += int(right)
    assert class_accuracy(arrived, bank) == {name: correct[name] / seen[name] for name in CLASSES}
    assert class_accuracy(arrived, bank) == {"zero": 6 / 12, "one": 17 / 35, "cat": 0.0}


def test_who_does_not_tell_what_is_correct_is_left_out_of_the_accuracy(bank):
    untold = replace(upload(bank, "bob"), prototype_correct=np.zeros(0, np.int32))
    arrived = {**contributions(bank, clients=("ann",)), "bob": contribution(untold)}
    assert class_accuracy(arrived, bank) == class_accuracy(contributions(bank, clients=("ann",)), bank)
    assert class_accuracy({"bob": contribution(untold)}, bank) == {}


def test_a_mean_is_of_what_is_told():
    assert mean_told([(1.0, 3), (None, 100), (5.0, 1)]) == 2.0
    assert mean_told([(None, 3)]) is None
    assert mean_told([]) is None


def test_a_class_that_nobody_holds_has_no_accuracy(bank):
    assert list(class_accuracy(contributions(bank, clients=("cid",)), bank)) == ["cat"]


# At rest.


def a_plan(number):
    return RoundPlan(
        run="run-1",
        start=1,
        round=number,
        state="open",
        classes="c" * 64,
        adapter=reference(b"the global adapter"),
        participants=("ann", "bob", "cid"),
        recipe=recipe().training(2),
        seed=0,
        deadline_s=60.0,
    )


def keep(store, number, known, lesson, accepted):
    """Keep a round as the coordinator's loop does."""
    text, attention = lesson.text, lesson.attention
    store.open(a_plan(number), dict.fromkeys(accepted, 2), dict.fromkeys(accepted, "0" * 64))
    store.finish(
        a_record(
            number,
            accepted=sorted(accepted),
            adapter_sha256=sha256(encode_adapter(known.adapter)),
            bank_version=known.bank.version,
            text=text and TextRecord.of(text),
            own=list(lesson.renewed),
            attention=attention and AttentionRecord.of(attention),
            class_accuracy=lesson.class_accuracy,
        ),
        known,
        lesson,
    )


def run_round(store, learner, number, known, bank, clients=tuple(HELD)):
    arrived = contributions(bank, number, clients)
    known, lesson = learner.learn(arrived, known)
    keep(store, number, known, lesson, arrived)
    return known


@pytest.fixture
def store(tmp_path, start):
    store = Store(tmp_path / "state")
    store.begin(IDENTITY)
    store.start(start)
    yield store
    store.close()


@pytest.mark.parametrize("how", RECIPES.values(), ids=RECIPES)
def test_what_comes_back_from_disk_is_what_was_known(bank, start, store, how):
    known = run_round(store, Learner(bank, how, 0), 1, start, bank)
    assert bits(Store(store.folder).models.knowledge()) == bits(known)


@pytest.mark.parametrize("how", RECIPES.values(), ids=RECIPES)
def test_a_restart_between_two_rounds_leaves_no_trace_in_the_bits(bank, start, store, how):
    through, known = Learner(bank, how, 0), start
    for number, clients in ((1, ("ann", "bob", "cid")), (2, ("bob", "cid"))):
        known, _ = through.learn(contributions(bank, number, clients), known)
    run_round(store, Learner(bank, how, 0), 1, start, bank)
    store.close()
    reopened, learner = Store(store.folder), Learner(bank, how, 0)
    number, found = reopened.resume(SHAPES, learner.text_shapes)
    assert number == 1
    restarted = run_round(reopened, learner, 2, found, bank, ("bob", "cid"))
    assert bits(restarted) == bits(known)
    assert bits(Store(store.folder).models.knowledge()) == bits(known)


def test_a_new_federation_knows_the_bank_and_the_initial_adapter(start, store):
    number, found = store.resume(SHAPES, None)
    assert number == 0
    assert bits(found) == bits(start)


def test_a_version_of_the_class_bank_stays_readable_after_the_next(bank, start, store):
    first = run_round(store, Learner(bank, recipe(), 0), 1, start, bank)
    run_round(store, Learner(bank, recipe(), 0), 2, first, bank)
    banks = [encode_bank(store.models.bank(version)) for version in (1, 2, 3)]
    assert banks[:2] == [encode_bank(start.bank), encode_bank(first.bank)]
    assert len(set(banks)) == 3


def test_a_round_writes_only_what_it_changed(bank, start, store):
    before = set(store.blobs.digests())
    known = run_round(store, Learner(bank, recipe(), 0), 1, start, bank, ("ann",))
    made = [known.adapter, known.text, known.own["ann"]]
    assert set(store.blobs.digests()) - before == {
        sha256(blob) for blob in (encode_bank(known.bank), *(encode_adapter(adapter) for adapter in made))
    }
    assert store.records()[0].adapter_sha256 == sha256(encode_adapter(store.models.adapter(1)))


def test_the_state_of_a_federation_with_another_text_rank_is_refused(bank, start, store):
    run_round(store, Learner(bank, recipe(), 0), 1, start, bank)
    other = Learner(bank, recipe(text={"steps": 2, "rank": 4}), 0)
    with pytest.raises(FederationError, match="another federation"):
        store.resume(SHAPES, other.text_shapes)


# What the checks let through must not stop the federation.

EMPTY = np.zeros((0, 256), np.float32)
NONE = np.zeros(0, np.int32)
NO_PROTOTYPES = {"prototype_classes": NONE, "prototype_counts": NONE, "prototype_correct": NONE}
SPARSE = {
    "no-features": {"features": EMPTY, "labels": NONE},
    "features-of-no-width": {"features": EMPTY[:, :0], "labels": NONE},
    "no-prototypes": {"prototypes": EMPTY, **NO_PROTOTYPES},
    "prototypes-of-no-width": {"prototypes": EMPTY[:, :0], **NO_PROTOTYPES},
    "only-an-adapter": {"features": EMPTY, "labels": NONE, "prototypes": EMPTY, **NO_PROTOTYPES},
    "as-many-samples-as-travel": {"prototype_counts": np.full(2, np.iinfo(np.int32).max, np.int32)},
}


PERSONAL = [{"query": "R1"}, {"query": "R2"}, {"query": "R3"}, {"query": "R3", "clusters": 1}]


def accepted(bank, fields):
    """What the wire makes of ann's update with these fields; None if the checks refuse it."""
    update = decode_update(encode_update(Update(**{**upload(bank, "ann").__dict__, **fields})))
    plan = RoundPlan(
        run="run",
        start=1,
        round=1,
        state="open",
        classes="c" * 64,
        adapter=reference(b"adapter"),
        participants=("ann",),
        recipe=recipe().training(2),
        seed=0,
        deadline_s=1.0,
    )
    verdict = check_update("ann", update, Expectation(plan, {"ann": Start("0" * 64, SHAPES)}, 256, len(CLASSES)))
    return Contribution(contributions(bank)["ann"].offer, update) if verdict.accepted else None


def test_an_update_as_clients_send_it_is_accepted(bank):
    assert accepted(bank, {}) is not None
    assert accepted(bank, SPARSE["no-features"]) is not None


@pytest.mark.parametrize("others", [(), ("bob", "cid")], ids=["alone", "among-others"])
@pytest.mark.parametrize("fields", SPARSE.values(), ids=SPARSE)
def test_whatever_passes_the_checks_can_be_personalised(bank, start, fields, others):
    sparse = accepted(bank, fields)
    for personal in PERSONAL if sparse else []:
        arrived = {"ann": sparse, **contributions(bank, clients=others)}
        known, lesson = Learner(bank, recipe(text={"steps": 0}, personal=personal), 0).learn(arrived, start)
        if lesson.attention is None:  # nobody sent a prototype
            assert (known.own, lesson.renewed) == ({}, ())
            continue
        np.testing.assert_allclose(lesson.attention.weights.sum(axis=1), 1.0)
        assert all(np.isfinite(factor).all() for adapter in known.own.values() for factor in adapter.values())


@pytest.mark.parametrize("others", [(), ("bob",)], ids=["alone", "among-others"])
@pytest.mark.parametrize("fields", SPARSE.values(), ids=SPARSE)
def test_whatever_passes_the_checks_can_train_the_text_side(bank, start, fields, others):
    if sparse := accepted(bank, fields):
        arrived = {"ann": sparse, **contributions(bank, clients=others)}
        known, _ = Learner(bank, recipe(personal={"query": "none"}), 0).learn(arrived, start)
        assert np.isfinite(known.bank.embeddings).all()
