"""Every reason for which an update is refused, and the borders at which it is not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coordinator.checks import Expectation, Start, check_counts, check_offer, check_update
from protocol.codec import decode_update, encode_update


def test_a_good_update_is_accepted(make_update, expected):
    assert check_update("ann", make_update(), expected).accepted


def test_a_good_update_is_accepted_after_it_has_travelled(make_update, expected):
    assert check_update("ann", decode_update(encode_update(make_update())), expected).accepted


def test_an_update_without_features_is_accepted(make_update, expected):
    nothing = make_update(features=np.zeros((0, 8), np.float32), labels=np.zeros(0, np.int32))
    assert check_update("ann", nothing, expected).accepted


def test_an_update_without_features_or_prototypes_of_any_width_is_accepted(make_update, expected):
    empty = make_update(
        features=np.zeros((0, 0), np.float32),
        labels=np.zeros(0, np.int32),
        prototypes=np.zeros((0, 0), np.float32),
        prototype_classes=np.zeros(0, np.int32),
        prototype_counts=np.zeros(0, np.int32),
        prototype_correct=np.zeros(0, np.int32),
    )
    assert check_update("ann", empty, expected).accepted


def without_a_factor(update):
    return {"adapter": {name: a for name, a in update.adapter.items() if name != "layer.1.lora_B"}}


def with_an_extra_factor(update):
    return {"adapter": {**update.adapter, "layer.9.lora_A": np.zeros((2, 6), np.float32)}}


def with_another_rank(update):
    return {"adapter": {**update.adapter, "layer.0.lora_A": np.zeros((4, 6), np.float32)}}


def transposed(update):
    return {"adapter": {**update.adapter, "layer.0.lora_A": update.adapter["layer.0.lora_A"].T}}


def poisoned(name, value):
    def change(update):
        array = update.adapter[name].copy()
        array[-1, -1] = value
        return {"adapter": {**update.adapter, name: array}}

    return change


def changed(field, position, value):
    def change(update):
        array = getattr(update, field).copy()
        array[position] = value
        return {field: array}

    return change


def scaled(field, factor):
    return lambda update: {field: (getattr(update, field) * factor).astype(np.float32)}


def narrowed(field):
    def change(update):
        rows = getattr(update, field)[:, :-1]
        return {field: rows / np.linalg.norm(rows, axis=1, keepdims=True)}

    return change


BAD = {
    "missing-factor": (without_a_factor, "wrong-names", "layer.1.lora_B"),
    "extra-factor": (with_an_extra_factor, "wrong-names", "layer.9.lora_A"),
    "no-adapter": (lambda _: {"adapter": {}}, "wrong-names", "4 factors"),
    "another-rank": (with_another_rank, "wrong-shapes", "layer.0.lora_A"),
    "transposed": (transposed, "wrong-shapes", "layer.0.lora_A"),
    "narrow-prototypes": (narrowed("prototypes"), "wrong-shapes", "prototypes"),
    "narrow-features": (narrowed("features"), "wrong-shapes", "features"),
    "nan-in-a-factor": (poisoned("layer.1.lora_B", np.nan), "not-finite", "layer.1.lora_B"),
    "infinity-in-a-factor": (poisoned("layer.0.lora_A", -np.inf), "not-finite", "layer.0.lora_A"),
    "nan-in-prototypes": (changed("prototypes", (1, 3), np.nan), "not-finite", "prototypes"),
    "infinity-in-features": (changed("features", (0, 0), np.inf), "not-finite", "features"),
    "prototype-of-class-3-of-3": (changed("prototype_classes", 1, 3), "unknown-class", "prototypes"),
    "prototype-of-class-minus-1": (changed("prototype_classes", 0, -1), "unknown-class", "prototypes"),
    "label-3-of-3": (changed("labels", 0, 3), "unknown-class", "features"),
    "label-minus-1": (changed("labels", 2, -1), "unknown-class", "features"),
    "long-prototypes": (scaled("prototypes", 1.1), "not-unit", "prototypes"),
    "short-features": (scaled("features", 0.9), "not-unit", "features"),
    "zero-features": (scaled("features", 0.0), "not-unit", "features"),
    "two-prototypes-of-a-class": (changed("prototype_classes", 1, 0), "bad-counts", "own class"),
    "a-count-of-0": (changed("prototype_counts", 1, 0), "bad-counts", "at least 1"),
    "a-negative-count": (changed("prototype_counts", 0, -5), "bad-counts", "at least 1"),
    "more-correct-than-counted": (changed("prototype_correct", 1, 2), "bad-counts", "predicted correctly"),
    "fewer-correct-than-none": (changed("prototype_correct", 0, -1), "bad-counts", "predicted correctly"),
    "three-features-of-two": (changed("labels", 2, 0), "too-many-features", "3 features of one class, 2 allowed"),
}


@pytest.mark.parametrize(("change", "reason", "named"), BAD.values(), ids=BAD)
def test_an_update_is_refused_with_reason_and_detail_when_it_has(make_update, expected, change, reason, named):
    update = make_update()
    verdict = check_update("ann", make_update(**change(update)), expected)
    assert (verdict.accepted, verdict.reason) == (False, reason)
    assert named in verdict.detail


def test_unit_length_tolerates_the_rounding_of_the_wire_but_not_five_per_cent(make_update, expected):
    update = make_update()
    assert check_update("ann", make_update(**scaled("features", 1.04)(update)), expected).accepted
    assert check_update("ann", make_update(**scaled("features", 1.06)(update)), expected).reason == "not-unit"


def test_names_are_checked_before_shapes_and_shapes_before_values(make_update, expected):
    update = make_update()
    nan_and_rank = {**poisoned("layer.0.lora_B", np.nan)(update)["adapter"], "layer.0.lora_A": np.zeros((4, 6), np.float32)}
    assert check_update("ann", make_update(adapter=nan_and_rank), expected).reason == "wrong-shapes"
    nan_and_name = {**nan_and_rank, "stray.lora_A": np.zeros((2, 6), np.float32)}
    assert check_update("ann", make_update(adapter=nan_and_name), expected).reason == "wrong-names"


def test_a_very_long_factor_name_still_gives_a_detail_that_fits_a_receipt(make_update, expected):
    verdict = check_update("ann", make_update(adapter={"x" * 5000: np.zeros((1, 1), np.float32)}), expected)
    assert verdict.reason == "wrong-names"
    assert len(verdict.detail) <= 500


def test_an_offer_of_the_open_round_is_accepted(make_update, make_offer, expected):
    assert check_offer("bob", make_offer(make_update()), expected, {"ann"}).accepted


@pytest.mark.parametrize("number", [2, 4])
def test_an_offer_for_another_round_is_stale_and_told_which_round_is_open(make_update, make_offer, expected, number):
    verdict = check_offer("ann", make_offer(make_update(), round=number), expected, ())
    assert (verdict.accepted, verdict.reason) == (False, "stale-round")
    assert "round 3 is open" in verdict.detail


def test_an_offer_between_rounds_is_stale(make_update, make_offer):
    verdict = check_offer("ann", make_offer(make_update()), None, ())
    assert verdict.reason == "stale-round"
    assert "no round is open" in verdict.detail


def test_an_offer_trained_from_another_adapter_is_refused(make_update, make_offer, expected):
    verdict = check_offer("ann", make_offer(make_update(), base="e" * 64), expected, ())
    assert verdict.reason == "wrong-base"
    assert expected.plan.adapter.sha256[:12] in verdict.detail


def test_an_offer_of_a_client_that_was_not_drawn_is_refused(make_update, make_offer, expected):
    assert check_offer("eve", make_offer(make_update()), expected, ()).reason == "not-invited"


def test_a_second_offer_of_a_counted_client_is_refused(make_update, make_offer, expected):
    assert check_offer("ann", make_offer(make_update()), expected, {"ann", "bob"}).reason == "already-counted"


def test_an_offer_larger_than_any_update_of_the_round_is_refused_before_it_travels(make_update, make_offer, expected):
    offer = make_offer(make_update())
    most = expected.most_bytes("ann")
    assert offer.blob.size < most
    larger = {**offer.blob.model_dump(), "size": most + 1}
    verdict = check_offer("ann", make_offer(make_update(), blob=larger), expected, ())
    assert (verdict.reason, str(most) in verdict.detail) == ("too-large", True)
    assert check_offer("ann", make_offer(make_update(), blob={**larger, "size": most}), expected, ()).accepted


def test_how_many_of_a_class_are_correct_may_be_none_or_all(make_update, expected):
    counts = make_update().prototype_counts
    for correct in (counts * 0, counts):
        assert check_update("ann", make_update(prototype_correct=correct), expected).accepted


def test_how_many_are_correct_may_be_left_out(make_update, expected):
    assert check_update("ann", make_update(prototype_correct=np.zeros(0, np.int32)), expected).accepted


@pytest.mark.parametrize(("smallest", "reason"), [(4, "bad-counts"), (5, "accepted"), (6, "accepted")])
def test_a_prototype_of_fewer_samples_than_the_plan_allows_is_refused(make_update, expected, smallest, reason):
    strict = expected.plan.recipe.model_copy(update={"min_prototype_count": 5})
    plan = dataclasses.replace(expected, plan=expected.plan.model_copy(update={"recipe": strict}))
    verdict = check_update("ann", make_update(prototype_counts=np.array([9, smallest], np.int32)), plan)
    assert verdict.reason == reason
    assert verdict.accepted or "at least 5" in verdict.detail


OTHER_BASE = "b" * 64
NARROW = {
    "layer.0.lora_A": (1, 6),
    "layer.0.lora_B": (6, 1),
    "layer.1.lora_A": (1, 6),
    "layer.1.lora_B": (6, 1),
}


@pytest.fixture(scope="session")
def mixed(expected):
    """The round as it is for a client with an adapter and a rank of its own, `bob`."""
    starts = {**expected.starts, "bob": Start(OTHER_BASE, NARROW)}
    return Expectation(expected.plan, starts, expected.width, expected.classes)


def test_each_client_is_held_to_its_own_rank(make_update, mixed):
    narrow = make_update(adapter={name: np.ones(shape, np.float32) for name, shape in NARROW.items()})
    assert check_update("bob", narrow, mixed).accepted
    assert check_update("ann", make_update(), mixed).accepted
    assert check_update("ann", narrow, mixed).reason == "wrong-shapes"
    assert check_update("bob", make_update(), mixed).reason == "wrong-shapes"


def test_each_client_is_held_to_its_own_base(make_update, make_offer, mixed):
    common, own = make_offer(make_update()), make_offer(make_update(), base=OTHER_BASE)
    assert check_offer("ann", common, mixed, ()).accepted
    assert check_offer("bob", own, mixed, ()).accepted
    for client, offer, base in (("ann", own, mixed.plan.adapter.sha256), ("bob", common, OTHER_BASE)):
        verdict = check_offer(client, offer, mixed, ())
        assert verdict.reason == "wrong-base"
        assert f"began with {base[:12]} for this client" in verdict.detail


def test_an_uninvited_client_is_told_so_whatever_it_trained_from(make_update, make_offer, mixed):
    assert check_offer("eve", make_offer(make_update(), base="e" * 64), mixed, {"eve"}).reason == "not-invited"


@pytest.mark.parametrize(
    ("samples", "accepted"), [(6, True), (15, True), (16, True), (17, False), (1000, False), (960, True)]
)
def test_samples_are_told_in_buckets(make_update, make_offer, expected, samples, accepted):
    verdict = check_offer("bob", make_offer(make_update(), samples=samples), expected, ())
    assert (verdict.accepted, verdict.reason) == (accepted, "accepted" if accepted else "bad-counts")


@pytest.mark.parametrize(
    ("counts", "samples", "accepted"),
    [
        ([5, 1], 6, True),
        ([5, 2], 6, False),
        ([16, 16], 32, True),
        ([18, 17], 36, False),  # 17 is no bucket
        ([18, 15], 32, True),  # 33 samples are told as 32
        ([18, 18], 32, False),
        ([2**30, 2**30], 2**31, True),  # beyond 32 bits
        ([2**30, 2**30], 2**30, False),
        ([1, 1], 2**31, True),  # classes too small to be told
    ],
)
def test_prototypes_cannot_be_of_more_samples_than_the_offer_told(make_update, make_offer, counts, samples, accepted):
    update = make_update(prototype_counts=np.array(counts, np.int32), prototype_correct=np.array([0, 0], np.int32))
    verdict = check_counts(make_offer(update, samples=samples), update)
    assert (verdict.accepted, verdict.reason) == (accepted, "accepted" if accepted else "bad-counts")


def test_without_prototypes_any_number_of_samples_will_do(make_update, make_offer):
    none = {"prototypes": np.zeros((0, 8), np.float32)}
    none |= {f"prototype_{name}": np.zeros(0, np.int32) for name in ("classes", "counts", "correct")}
    update = make_update(**none)
    assert check_counts(make_offer(update, samples=60), update).accepted


def test_a_frozen_a_comes_back_as_it_was(make_update, expected):
    start = make_update(1).adapter
    frozen = dataclasses.replace(expected, starts={"ann": Start("0" * 64, expected.starts["ann"].shapes, start)})
    same = {name: (start if name.endswith("A") else make_update(2).adapter)[name] for name in start}
    as_it_travels = decode_update(encode_update(make_update(2, adapter=same)))
    assert check_update("ann", as_it_travels, frozen).accepted
    changed = dict(as_it_travels.adapter)
    changed["layer.1.lora_A"] = np.nextafter(changed["layer.1.lora_A"].astype(np.float16), np.float16(9)).astype(np.float32)
    verdict = check_update("ann", dataclasses.replace(as_it_travels, adapter=changed), frozen)
    assert (verdict.reason, "layer.1.lora_A" in verdict.detail) == ("frozen-factor-changed", True)
    assert check_update("ann", dataclasses.replace(as_it_travels, adapter=changed), expected).accepted
