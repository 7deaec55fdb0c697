"""One round as a state machine: what closes it, who is missing, and that the order of arrival leaves no trace."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_lora.algebra import mean_of_factors
from coordinator.aggregate import Contribution, aggregate
from coordinator.checks import Late, Start
from coordinator.collection import Answer, Collection, Wanted, refuse_all
from protocol.codec import encode_adapter
from protocol.events import BrokerLink, ClientSeen, OfferMade, OfferTooLarge, UpdateArrived, UpdateUnreadable
from protocol.messages import BlobRef, Status, Verdict

START = 1000.0
CLIENTS = ("ann", "bob", "cid", "dan")


@pytest.fixture(scope="session")
def arrival(make_update, make_offer):
    """An update of a client, on its own data and with its own number of samples; `bad` ones hold a NaN."""

    def make(client, *, bad=False, **fields):
        seed = CLIENTS.index(client) if client in CLIENTS else 99
        update = make_update(seed)
        offer = make_offer(update, samples=10 * seed + 6, **fields)
        if bad:
            adapter = {name: np.full_like(array, np.nan) for name, array in update.adapter.items()}
            update = make_update(seed, adapter=adapter)
        return UpdateArrived(client, offer, update)

    return make


def test_the_quorum_closes_the_round(expected, arrival):
    collection = Collection(expected, 2, START)
    assert collection.take(arrival("bob")).verdict.accepted
    assert not collection.has_quorum
    assert collection.patience(START + 40) == 60.0
    assert collection.take(arrival("ann")).verdict.accepted
    assert collection.has_quorum
    assert collection.patience(START + 40) == 0.0


def test_the_deadline_closes_the_round_without_a_quorum(expected, arrival):
    collection = Collection(expected, 2, START)
    collection.take(arrival("bob"))
    assert collection.patience(START) == 100.0
    assert collection.patience(START + 99.5) == 0.5
    assert collection.patience(START + 100) == 0.0
    assert collection.patience(START + 1e6) == 0.0
    assert not collection.has_quorum


def told(client, phase, number=None):
    return ClientSeen(client, Status(state="online", phase=phase, round=number))


def test_a_round_whose_clients_have_failed_is_not_waited_for(expected, arrival):
    """Of four participants three are the quorum: one failure leaves hope, two do not."""
    number = expected.plan.round
    collection = Collection(expected, len(expected.plan.participants) - 1, START)
    one, two, *_ = expected.plan.participants
    collection.take(told(one, "failed", number - 1))
    collection.take(told(two, "failed", number))
    assert collection.patience(START) == 100.0
    collection.take(told(one, "failed", number))
    assert collection.patience(START) == 0.0
    collection.take(told(one, "training", number))  # it was restarted
    assert collection.patience(START) == 100.0


def test_a_client_that_said_it_failed_and_delivers_all_the_same_counts(expected, arrival):
    collection = Collection(expected, 2, START)
    collection.take(told("ann", "failed", expected.plan.round))
    assert collection.take(arrival("ann")).verdict.accepted
    assert collection.take(arrival("bob")).verdict.accepted
    assert collection.has_quorum


def test_an_update_that_arrives_with_the_last_of_the_quorum_counts_too(expected, arrival):
    collection = Collection(expected, 1, START)
    collection.take(arrival("bob"))
    assert collection.take(arrival("ann")).verdict.accepted
    assert sorted(collection.accepted) == ["ann", "bob"]


def test_the_silent_are_the_participants_without_an_accepted_update(expected, arrival):
    collection = Collection(expected, 4, START)
    assert collection.silent == ["ann", "bob", "cid", "dan"]
    collection.take(arrival("cid"))
    collection.take(arrival("ann", bad=True))
    collection.take(arrival("eve"))
    assert collection.silent == ["ann", "bob", "dan"]


def test_a_refused_client_may_try_again(expected, arrival):
    collection = Collection(expected, 1, START)
    assert collection.take(arrival("ann", bad=True)).verdict.reason == "not-finite"
    assert not collection.has_quorum
    assert collection.take(arrival("ann")).verdict.accepted
    assert collection.has_quorum
    assert [(answer.client, answer.verdict.reason) for answer in collection.refused] == [("ann", "not-finite")]


def test_an_accepted_update_is_counted_once_and_keeps_its_arrays(expected, arrival, make_update):
    collection = Collection(expected, 2, START)
    first = arrival("ann")
    collection.take(first)
    second = UpdateArrived("ann", first.offer, make_update(55))
    assert collection.take(second).verdict.reason == "already-counted"
    assert collection.accepted["ann"].update is first.update
    assert not collection.has_quorum


def test_an_offer_that_fails_is_refused_before_its_arrays_are_looked_at(expected, arrival):
    collection = Collection(expected, 1, START)
    assert collection.take(arrival("ann", bad=True, round=2)).verdict.reason == "stale-round"
    assert collection.take(arrival("ann", bad=True, base="0" * 64)).verdict.reason == "wrong-base"
    assert collection.take(arrival("eve", bad=True)).verdict.reason == "not-invited"
    assert not collection.accepted


def test_an_unreadable_and_an_oversized_update_get_an_answer(expected, arrival):
    collection = Collection(expected, 1, START)
    offer = arrival("ann").offer
    unreadable = collection.take(UpdateUnreadable("ann", offer, "header is not JSON"))
    large = collection.take(OfferTooLarge("bob", offer, "99 bytes exceed 10"))
    assert (unreadable.client, unreadable.verdict.reason) == ("ann", "unreadable")
    assert (large.client, large.verdict.reason, large.verdict.detail) == ("bob", "too-large", "99 bytes exceed 10")
    assert collection.refused == [unreadable, large]


def test_an_offer_is_wanted_or_answered_before_anything_travels(expected, arrival):
    collection = Collection(expected, 3, START)
    good = arrival("ann")
    assert collection.take(OfferMade("ann", good.offer)) == Wanted("ann", good.offer)
    assert collection.accepted == {}
    for client, fields, reason in (
        ("ann", {"round": 2}, "stale-round"),
        ("ann", {"base": "0" * 64}, "wrong-base"),
        ("eve", {}, "not-invited"),
    ):
        answer = collection.take(OfferMade(client, arrival(client, **fields).offer))
        assert (answer.client, answer.verdict.reason) == (client, reason)
    collection.take(good)
    assert collection.take(OfferMade("ann", good.offer)).verdict.reason == "already-counted"


def test_a_round_goes_on_with_what_it_had_before_a_restart(expected, arrival):
    had = arrival("ann")
    refusal = Answer("bob", arrival("bob").offer, Verdict(accepted=False, reason="not-finite"))
    collection = Collection(expected, 2, START, {"ann": Contribution(had.offer, had.update)}, [refusal])
    assert collection.silent == ["bob", "cid", "dan"]
    assert collection.refused == [refusal]
    assert collection.take(arrival("ann")).verdict.reason == "already-counted"
    assert collection.patience(START) == 100.0
    assert collection.take(arrival("cid")).verdict.accepted
    assert collection.has_quorum
    assert collection.accepted["ann"].update is had.update


@pytest.mark.parametrize("event", [BrokerLink(up=False), ClientSeen("ann", Status(state="online"))], ids=["link", "seen"])
def test_events_that_are_no_updates_get_no_answer(expected, event):
    assert Collection(expected, 1, START).take(event) is None
    assert refuse_all(event, 99) is None


def test_between_rounds_every_kind_of_update_is_stale(arrival):
    good = arrival("ann")
    for event in (
        OfferMade("ann", good.offer),
        good,
        UpdateUnreadable("ann", good.offer, "x"),
        OfferTooLarge("ann", good.offer, "x"),
    ):
        answer = refuse_all(event, 4)
        assert (answer.client, answer.offer, answer.verdict.reason) == ("ann", good.offer, "stale-round")
        assert refuse_all(event, 3) is None  # the next round will take what is late


OLD_BASE = "f" * 64


@pytest.fixture
def late(expected):
    """What was expected in round 2, for which ann has delivered, and from which updates count half."""
    plan = expected.plan.model_copy(update={"round": 2})
    starts = {client: Start(OLD_BASE, start.shapes) for client, start in expected.starts.items() if client != "dan"}
    return {2: Late(dataclasses.replace(expected, plan=plan, starts=starts), {"ann"}, 0.5)}


def test_a_late_update_counts_with_its_discount_and_towards_no_quorum(expected, arrival, late):
    collection = Collection(expected, 1, START, late=late)
    came = arrival("bob", round=2, base=OLD_BASE)
    assert collection.take(OfferMade("bob", came.offer)) == Wanted("bob", came.offer)
    assert collection.take(came).verdict.accepted
    assert (collection.has_quorum, collection.silent, dict(collection.accepted)) == (False, list(CLIENTS), {})
    assert collection.contributions == {"bob": Contribution(came.offer, came.update, 0.5)}
    assert collection.patience(START) == 100.0
    one = collection.take(arrival("cid"))
    assert one.verdict.accepted
    weights = [0.5 * came.offer.samples, one.offer.samples]
    mean = mean_of_factors([came.update.adapter, arrival("cid").update.adapter], weights)
    found = aggregate(collection.contributions, "mean_of_factors", 2, {})
    assert all(mean[name].tobytes() == found[name].tobytes() for name in mean)


@pytest.mark.parametrize("first", ["late", "new"])
def test_of_a_client_with_a_late_and_a_new_update_the_new_one_counts(expected, arrival, late, first):
    collection = Collection(expected, 2, START, late=late)
    both = [arrival("bob", round=2, base=OLD_BASE), arrival("bob")]
    for event in both if first == "late" else both[::-1]:
        assert collection.take(event).verdict.accepted
    assert [c.discount for c in collection.contributions.values()] == [1.0]


@pytest.mark.parametrize(
    ("client", "fields", "reason"),
    [
        ("ann", {"base": OLD_BASE}, "already-counted"),
        ("dan", {"base": OLD_BASE}, "not-invited"),
        ("bob", {}, "wrong-base"),
        ("bob", {"base": OLD_BASE, "round": 1}, "stale-round"),
        ("bob", {"base": OLD_BASE, "run": "another"}, "stale-round"),
        ("bob", {"base": OLD_BASE, "bad": True}, "not-finite"),
    ],
)
def test_a_late_update_is_held_to_what_its_own_round_asked_for(expected, arrival, late, client, fields, reason):
    collection = Collection(expected, 1, START, late=late)
    assert collection.take(arrival(client, **{"round": 2, **fields})).verdict.reason == reason
    assert not collection.contributions


def test_a_late_update_counts_once_and_can_be_taken_back(expected, arrival, late):
    collection = Collection(expected, 1, START, late=late)
    came = arrival("bob", round=2, base=OLD_BASE)
    answer = collection.take(came)
    assert collection.take(came).verdict.reason == "already-counted"
    collection.take_back(answer)
    assert not collection.contributions
    assert collection.take(came).verdict.accepted


def test_late_updates_outlive_a_restart(expected, arrival, late):
    came = arrival("bob", round=2, base=OLD_BASE)
    had = {"bob": Contribution(came.offer, came.update, 0.5)}
    collection = Collection(expected, 1, START, late=late, came_late=tuple(had.items()))
    assert collection.contributions == had
    assert collection.take(came).verdict.reason == "already-counted"


@pytest.fixture
def two_late(expected):
    """What was expected in rounds 1 and 2, from which updates count a quarter and half."""
    plans = {number: expected.plan.model_copy(update={"round": number}) for number in (1, 2)}
    starts = {client: Start(OLD_BASE, start.shapes) for client, start in expected.starts.items()}
    return {n: Late(dataclasses.replace(expected, plan=plan, starts=starts), set(), 0.25 * n) for n, plan in plans.items()}


def test_a_late_update_that_could_not_be_kept_leaves_the_one_that_was(expected, arrival, two_late):
    """As after a restart: what the journal has counts."""
    one, two = (arrival("bob", round=number, base=OLD_BASE) for number in (1, 2))
    collection = Collection(expected, 1, START, late=two_late)
    collection.take(one)
    collection.take_back(collection.take(two))
    assert collection.contributions == {"bob": Contribution(one.offer, one.update, 0.25)}
    assert collection.take(one).verdict.reason == "already-counted"
    assert collection.take(two).verdict.accepted


def test_an_older_late_update_that_could_not_be_kept_may_come_again(expected, arrival, two_late):
    one, two = (arrival("bob", round=number, base=OLD_BASE) for number in (1, 2))
    collection = Collection(expected, 1, START, late=two_late)
    collection.take(two)
    collection.take_back(collection.take(one))
    assert collection.lacks(Answer("bob", one.offer, Verdict(True, "accepted")))
    assert collection.take(one).verdict.accepted
    assert collection.contributions["bob"].offer == two.offer


@pytest.mark.parametrize("method", ["mean_of_factors", "mean_of_products"])
@settings(deadline=None, max_examples=24)
@given(order=st.permutations(CLIENTS))
def test_any_order_of_arrival_gives_the_same_bytes(expected, arrival, method, order):
    def collect(clients):
        collection = Collection(expected, len(CLIENTS), START)
        for client in clients:
            collection.take(arrival(client))
        assert collection.has_quorum
        return aggregate(collection.accepted, method, 2, {})

    one, other = collect(CLIENTS), collect(order)
    assert encode_adapter(one) == encode_adapter(other)
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


@settings(deadline=None, max_examples=60)
@given(events=st.lists(st.tuples(st.sampled_from([*CLIENTS, "eve"]), st.booleans()), max_size=25), quorum=st.integers(1, 4))
def test_whatever_arrives_each_participant_counts_once_from_its_first_good_update(expected, arrival, events, quorum):
    collection = Collection(expected, quorum, START)
    counted, refusals = set(), set()
    for client, bad in events:
        good = client in CLIENTS and not bad and client not in counted
        verdict = collection.take(arrival(client, bad=bad)).verdict
        assert verdict.accepted == good
        counted |= {client} if good else set()
        refusals |= set() if good else {(client, verdict.reason)}
        assert collection.accepted.keys() == counted
        assert collection.has_quorum == (len(counted) >= quorum)
        assert collection.silent == sorted(set(CLIENTS) - counted)
    assert {(answer.client, answer.verdict.reason) for answer in collection.refused} == refusals
    assert len(collection.refused) == len(refusals)


def test_the_deadline_stands_still_while_nothing_can_arrive(expected):
    collection = Collection(expected, 1, START)
    collection.pause(START + 40.0)
    collection.pause(START + 50.0)
    assert collection.patience(START + 9000.0) == 60.0
    collection.resume(START + 9000.0)
    collection.resume(START + 9001.0)
    assert collection.patience(START + 9000.0) == 60.0
    assert collection.patience(START + 9060.0) == 0.0


def test_what_the_journal_has_and_the_round_has_not_is_taken_in_once(expected, arrival, late):
    collection = Collection(expected, 2, START, late=late)
    now, old = arrival("cid"), arrival("bob", round=2, base=OLD_BASE)
    for came in (now, old):
        answer = Answer(came.client, came.offer, Verdict(True, "accepted"))
        assert collection.lacks(answer)
        collection.recover(came.client, came.offer, came.update)
        assert not collection.lacks(answer)
        collection.recover(came.client, came.offer, came.update)
    assert sorted(collection.contributions) == ["bob", "cid"]
    assert collection.contributions["bob"].discount == 0.5
    assert not collection.lacks(Answer("ann", arrival("ann", round=2).offer, Verdict(True, "accepted")))


def test_of_two_late_updates_of_a_client_the_newer_round_s_counts_in_any_order_and_both_are_known(expected, arrival):
    plans = {number: expected.plan.model_copy(update={"round": number}) for number in (1, 2)}
    starts = {client: Start(OLD_BASE, start.shapes) for client, start in expected.starts.items()}
    late = {n: Late(dataclasses.replace(expected, plan=plan, starts=starts), set(), 0.5) for n, plan in plans.items()}
    came = {number: arrival("bob", round=number, base=OLD_BASE) for number in (1, 2)}
    for order in ((1, 2), (2, 1)):
        live = Collection(expected, 1, START, late=late)
        for number in order:
            assert live.take(came[number]).verdict.accepted
        parts = [("bob", Contribution(came[number].offer, came[number].update, 0.5)) for number in order]
        again = Collection(expected, 1, START, late=late, came_late=parts)
        for collection in (live, again):
            assert collection.contributions["bob"].offer.round == 2
            assert all(collection.take(one).verdict.reason == "already-counted" for one in came.values())


def test_a_round_that_cannot_reach_its_quorum_any_more_is_over(expected, arrival):
    collection = Collection(expected, len(expected.plan.participants), START)
    assert collection.patience(START) == 100.0
    collection.take(arrival(expected.plan.participants[0], bad=True))
    assert collection.patience(START) == 0.0
    assert not collection.has_quorum


def test_what_a_client_wrote_is_told_printable_and_short(expected, arrival, make_update):
    event = UpdateUnreadable("ann", arrival("ann").offer, "a\u2028b" * 1000)
    detail = Collection(expected, 1, START).take(event).verdict.detail
    assert detail.isascii()
    assert len(detail) <= 300


def test_an_answer_that_could_not_be_kept_is_as_if_it_had_not_been_given(expected, arrival):
    collection = Collection(expected, 2, START)
    collection.take_back(collection.take(arrival("ann")))
    collection.take_back(collection.take(arrival("bob", bad=True)))
    assert not collection.accepted
    assert not collection.refused
    assert collection.take(arrival("ann")).verdict.accepted
    assert collection.take(arrival("bob")).verdict.accepted


def test_who_was_refused_eight_times_is_not_fetched_from_again_in_the_round(expected, arrival):
    collection = Collection(expected, 4, START)
    good = arrival("ann")
    for _ in range(8):
        assert collection.take(OfferMade("ann", good.offer)) == Wanted("ann", good.offer)
        assert not collection.take(arrival("ann", bad=True)).verdict.accepted
    assert collection.take(OfferMade("ann", good.offer)).verdict.reason == "too-many-tries"
    assert collection.take(OfferMade("bob", arrival("bob").offer)) == Wanted("bob", arrival("bob").offer)
    assert {answer.verdict.reason for answer in collection.refused} == {"not-finite", "too-many-tries"}


def test_a_flood_of_refusals_is_kept_once_and_counted(expected, arrival):
    collection = Collection(expected, 1, START)
    for number in range(5000):
        offer = arrival("eve").offer.model_copy(update={"blob": BlobRef(sha256=f"{number:064x}", size=1)})
        assert collection.take(OfferMade("eve", offer)).verdict.reason == "not-invited"
    collection.take(arrival("ann", bad=True))
    assert [(a.client, a.verdict.reason, times) for a, times in collection.refusals] == [
        ("eve", "not-invited", 5000),
        ("ann", "not-finite", 1),
    ]
    assert collection.refused == [answer for answer, _ in collection.refusals]


def test_refusals_from_before_a_restart_are_counted_with_those_after(expected, arrival):
    before = [Answer("ann", arrival("ann").offer, Verdict(False, "not-finite", f"no. {n}")) for n in range(3)]
    collection = Collection(expected, 1, START, refused=before)
    collection.take(arrival("ann", bad=True))
    assert [(answer.verdict.detail, times) for answer, times in collection.refusals] == [("no. 0", 4)]


def test_a_refusal_that_could_not_be_kept_is_not_counted_and_its_client_is_awaited_until_one_is(expected, arrival):
    collection = Collection(expected, 4, START)
    first = collection.take(arrival("ann", bad=True))
    collection.take_back(collection.take(arrival("ann", bad=True)))
    assert [times for _, times in collection.refusals] == [1]
    assert collection.patience(START) == 0.0
    collection.take_back(first)
    assert not collection.refusals
    assert collection.patience(START) == 100.0


def test_a_refusal_in_another_round_s_name_ends_no_wait(expected, arrival):
    collection = Collection(expected, 4, START)
    for number in (2, 1, 2):
        collection.take(arrival("ann", round=number))
    assert [(answer.verdict.reason, times) for answer, times in collection.refusals] == [("stale-round", 3)]
    assert collection.patience(START) == 100.0
