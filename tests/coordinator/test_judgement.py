"""Who is too large for a round, and how much a client may say that it counts for: against the round's median."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.aggregate import Contribution, aggregate
from coordinator.checks import Late
from coordinator.collection import Collection
from coordinator.defence import Defence
from coordinator.judgement import Yardstick, defended
from coordinator.personal import personalise
from coordinator.recipe import FederationRecipe
from protocol.events import UpdateArrived

START = 1000.0
RULER = Yardstick(4.0, factors=True)
CLIENTS = ("ann", "bob", "cid", "dan")


def scaled(make_update, a=1.0, b=1.0, seed=0, **fields):
    """An update of the same directions as all others of its seed, its factors multiplied."""
    update = make_update(seed, **fields)
    factors = {
        name: (factor * (a if name.endswith("A") else b)).astype(np.float32) for name, factor in update.adapter.items()
    }
    return dataclasses.replace(update, adapter=factors)


@pytest.fixture
def fleet(make_update, make_offer):
    """Contributions whose B is multiplied by so much: `fleet(1, 1, 40)`."""

    def make(*scales, samples=None):
        updates = [scaled(make_update, b=scale) for scale in scales]
        counts = samples or [6] * len(scales)
        pairs = zip(updates, counts, strict=True)
        return {f"client-{k}": Contribution(make_offer(u, samples=n), u) for k, (u, n) in enumerate(pairs)}

    return make


def over(fleet, ruler=RULER):
    return sorted(ruler.excess({client: ruler.sizes(c.update.adapter) for client, c in fleet.items()}))


def norm(adapter):
    """||B A||_F by whole matrices."""
    parts = [adapter[f"layer.{k}.lora_B"].astype(float) @ adapter[f"layer.{k}.lora_A"].astype(float) for k in (0, 1)]
    return math.sqrt(sum((part**2).sum() for part in parts))


def test_what_is_above_so_many_medians_is_over_the_limit_and_what_is_at_it_is_not(fleet):
    assert over(fleet(1, 1, 1, 4)) == []
    assert over(fleet(1, 1, 1, 4.01)) == ["client-3"]
    assert over(fleet(1, 1, 1, -40)) == ["client-3"]
    assert over(fleet(0.001, 1, 1, 1)) == []


def test_of_two_nobody_is_judged_and_without_a_limit_nobody_ever(fleet):
    assert over(fleet(1, 1000)) == []
    assert over(fleet(1, 1, 1, 1000), Yardstick(math.inf, factors=True)) == []


def test_of_those_that_have_not_moved_any_size_is_too_large(fleet):
    assert over(fleet(0, 0, 0)) == []
    assert over(fleet(0, 0, 0, 1e-3)) == ["client-3"]


def test_a_product_hidden_in_one_factor_is_seen_where_factors_are_averaged(make_update, make_offer, fleet):
    hidden = scaled(make_update, a=1000.0, b=0.001)
    parts = {**fleet(1, 1, 1, 1), "eve": Contribution(make_offer(hidden), hidden)}
    assert over(parts) == ["eve"]
    assert over(parts, Yardstick(4.0, factors=False)) == []
    assert Yardstick.of(FederationRecipe()).factors
    assert not Yardstick.of(FederationRecipe(aggregation="mean_of_products")).factors


@settings(deadline=None, max_examples=30)
@given(scales=st.lists(st.floats(0.01, 50), min_size=3, max_size=6), limit=st.floats(1, 10))
def test_clipped_adapters_are_exactly_at_the_limit_and_the_others_untouched(make_update, make_offer, scales, limit):
    updates = [scaled(make_update, b=scale, a=1 + k) for k, scale in enumerate(scales)]
    parts = {f"client-{k}": Contribution(make_offer(u), u) for k, u in enumerate(updates)}
    ruler = Yardstick(limit, factors=False)
    counted, clipped = defended(parts, Defence(norm_limit=limit, over_limit="clip"), ruler)
    median = float(np.median([norm(part.update.adapter) for part in parts.values()]))
    assert list(counted) == sorted(parts)
    for client, part in counted.items():
        before, after = norm(parts[client].update.adapter), norm(part.update.adapter)
        assert (client in clipped) == (before > limit * median * (1 + 1e-8)) or before == pytest.approx(limit * median)
        if client in clipped:
            assert after == pytest.approx(limit * median, rel=1e-5)
        else:
            assert part.update.adapter is parts[client].update.adapter


def test_no_norm_of_a_clipped_adapter_is_above_the_limit(make_update, make_offer, fleet):
    for a, b in ((1000.0, 0.001), (0.001, 1000.0), (100.0, 100.0), (1.0, 9.0)):
        bad = scaled(make_update, a=a, b=b)
        parts = {**fleet(1, 1, 1, 1), "eve": Contribution(make_offer(bad), bad)}
        counted, clipped = defended(parts, Defence(over_limit="clip"), RULER)
        assert clipped == ["eve"]
        sizes, usual = (RULER.sizes(counted[client].update.adapter) for client in ("eve", "client-0"))
        assert all(size <= 4.0 * one * (1 + 1e-6) for size, one in zip(sizes, usual, strict=True))
        assert len(counted["eve"].update.adapter) == 4


def test_a_clipped_adapter_is_what_is_averaged_and_what_personalises(fleet):
    how = FederationRecipe.model_validate({"rank": 2, "defence": {"over_limit": "clip"}, "personal": {"query": "R1"}})
    parts = {
        client: dataclasses.replace(part, update=dataclasses.replace(part.update, adapter=in_a_tower(part.update.adapter)))
        for client, part in fleet(1, 1, 1, 1, -1000).items()
    }
    counted, clipped = defended(parts, how.defence, Yardstick.of(how))
    assert clipped == ["client-4"]
    one = parts["client-0"].update.adapter
    mean = aggregate(counted, "mean_of_factors", 2, {})
    own, _ = personalise(counted, how, np.eye(3, 8, dtype=np.float32), mean)
    for name, factor in one.items():
        expected = factor if name.endswith("A") else factor * (4 - 4) / 5
        np.testing.assert_allclose(mean[name], expected, atol=1e-5)
        assert np.abs(own["client-0"][name]).max() <= 4.0 * np.abs(factor).max()


def in_a_tower(adapter):
    return {"vision_model.encoder.layers." + name.removeprefix("layer."): factor for name, factor in adapter.items()}


def test_samples_beyond_so_many_medians_weigh_no_more(fleet):
    counted, _ = defended(fleet(1, 1, 1, samples=[10, 10, 2**40]), Defence(), RULER)
    assert [part.offer.samples for part in counted.values()] == [10, 10, 40]
    counted, _ = defended(fleet(1, 1, 1, samples=[10, 10, 40]), Defence(), RULER)
    assert [part.offer.samples for part in counted.values()] == [10, 10, 40]
    counted, _ = defended(fleet(1, 1, 1, samples=[10, 10, 96]), Defence(sample_cap=math.inf), RULER)
    assert [part.offer.samples for part in counted.values()] == [10, 10, 96]


def test_prototypes_counts_are_lowered_in_proportion_and_none_to_nothing(make_update, make_offer, fleet):
    counts, correct = np.array([2**30, 1], np.int32), np.array([2**30, 1], np.int32)
    greedy = make_update(prototype_counts=counts, prototype_correct=correct)
    parts = {**fleet(1, 1, samples=[10, 10]), "eve": Contribution(make_offer(greedy, samples=2**30), greedy)}
    update = defended(parts, Defence(), RULER)[0]["eve"].update
    assert update.prototype_counts.tolist() == [39, 1]
    assert update.prototype_correct.tolist() == [39, 1]
    honest = defended(parts, Defence(), RULER)[0]["client-0"].update
    assert honest is parts["client-0"].update


def test_a_greedy_client_is_not_listened_to_more_than_its_capped_share(make_update, make_offer):
    """R1's log(n_j / n): all alike, the weights are the shares of samples."""
    how = FederationRecipe.model_validate({"rank": 2, "personal": {"query": "R1"}})

    def part(total):
        counts = np.array([total, total], np.int32)
        update = make_update(prototype_counts=counts, prototype_correct=counts)
        update = dataclasses.replace(update, adapter=in_a_tower(update.adapter))
        return Contribution(make_offer(update, samples=2 * total), update)

    parts = {"ann": part(8), "bob": part(8), "eve": part(2**29)}
    counted, _ = defended(parts, Defence(), RULER)
    _, heard = personalise(counted, how, np.eye(3, 8, dtype=np.float32), counted["ann"].update.adapter)
    np.testing.assert_allclose(heard.weights, np.tile([1 / 6, 1 / 6, 4 / 6], (3, 1)), atol=1e-9)


# The open round.


@pytest.fixture
def arrive(make_update, make_offer):
    def make(client, b=1.0, **fields):
        update = scaled(make_update, b=b, **fields)
        return UpdateArrived(client, make_offer(update), update)

    return make


def collect(expected, events, quorum=3, ruler=RULER):
    collection = Collection(expected, quorum, START, yardstick=ruler)
    for event in events:
        assert collection.take(event).verdict.accepted
    return collection


def test_an_outlier_does_not_count_towards_the_quorum_and_the_round_waits_for_others(expected, arrive):
    collection = collect(expected, [arrive("ann"), arrive("bob", b=-10), arrive("cid")])
    assert sorted(collection.accepted) == ["ann", "bob", "cid"]
    assert sorted(collection.counted) == ["ann", "cid"]
    assert not collection.has_quorum
    assert collection.patience(START + 40) == 60.0
    verdict = collection.set_aside["bob"]
    assert (verdict.accepted, verdict.reason) == (False, "norm-too-large")
    assert verdict.detail == "in medians of the round: |B A| 10, |A| 1, |B| 10"
    assert collection.take(arrive("dan")).verdict.accepted
    assert collection.has_quorum
    assert collection.patience(START + 40) == 0.0


def test_who_was_set_aside_counts_once_the_median_has_moved(expected, arrive):
    collection = collect(expected, [arrive("ann"), arrive("bob"), arrive("cid", b=6)], quorum=4)
    assert sorted(collection.set_aside) == ["cid"]
    assert collection.take(arrive("dan", b=6)).verdict.accepted  # the median is now 3.5
    assert not collection.set_aside
    assert collection.has_quorum


def test_who_was_set_aside_is_not_asked_again_and_a_round_that_cannot_reach_its_quorum_is_over(expected, arrive):
    collection = collect(expected, [arrive("ann"), arrive("bob", b=9), arrive("cid")], quorum=4)
    assert collection.take(arrive("bob", seed=1)).verdict.reason == "already-counted"
    assert collection.silent == ["dan"]
    collection.take(arrive("dan"))
    assert not collection.has_quorum
    assert collection.patience(START) == 0.0


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_order_of_arrival_does_not_decide_who_is_set_aside(expected, arrive, order):
    events = [arrive("ann"), arrive("bob", b=1.2), arrive("cid", b=30), arrive("dan", b=0.9)]
    collection = collect(expected, [events[k] for k in order])
    assert sorted(collection.set_aside) == ["cid"]
    assert collection.set_aside["cid"].detail == collect(expected, events).set_aside["cid"].detail


def test_after_a_restart_the_same_ones_are_set_aside(expected, arrive):
    before = collect(expected, [arrive("ann"), arrive("bob", b=-10), arrive("cid")])
    after = Collection(expected, 3, START, before.accepted, yardstick=RULER)
    assert after.set_aside == before.set_aside
    assert sorted(after.counted) == ["ann", "cid"]


def test_an_answer_that_could_not_be_kept_is_not_measured_against(expected, arrive):
    collection = collect(expected, [arrive("ann"), arrive("bob")])
    collection.take_back(collection.take(arrive("cid", b=10)))
    assert not collection.set_aside
    assert sorted(collection.counted) == ["ann", "bob"]


def test_without_a_yardstick_all_accepted_ones_count(expected, arrive):
    collection = collect(expected, [arrive("ann"), arrive("bob", b=1000), arrive("cid")], ruler=None)
    assert collection.has_quorum
    assert not collection.set_aside


def test_a_late_update_that_is_too_large_is_set_aside_too(expected, arrive):
    plan = expected.plan.model_copy(update={"round": 2})
    late = {2: Late(dataclasses.replace(expected, plan=plan), set(), 0.5)}
    collection = Collection(expected, 2, START, yardstick=RULER, late=late)
    for event in (arrive("ann"), arrive("bob")):
        assert collection.take(event).verdict.accepted
    for event in (arrive("cid", b=10), arrive("dan", seed=1)):
        offer = event.offer.model_copy(update={"round": 2})
        assert collection.take(dataclasses.replace(event, offer=offer)).verdict.accepted
    assert sorted(collection.contributions) == ["ann", "bob", "dan"]
    assert {client: verdict.reason for client, verdict in collection.set_aside.items()} == {"cid": "norm-too-large"}
