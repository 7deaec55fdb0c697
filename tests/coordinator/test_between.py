"""Updates that end between two rounds wait for the next one: a few, and none of a client that was cut off."""

from __future__ import annotations

import pytest

from coordinator.between import MOST, Between
from protocol.events import ClientSeen, OfferMade, UpdateArrived, UpdateUnreadable
from protocol.messages import Status


@pytest.fixture
def arrived(make_update, make_offer):
    def make(client, **fields):
        update = make_update()
        return UpdateArrived(client, make_offer(update, **fields), update)

    return make


def test_the_newest_update_of_each_client_waits_and_is_given_out_once(arrived):
    between, older = Between(), arrived("ann", round=2)
    newer, unreadable = arrived("ann"), UpdateUnreadable("bob", older.offer, "x")
    for event in (older, newer, unreadable, OfferMade("cid", older.offer), ClientSeen("dan", Status(state="online"))):
        between.keep(event)
    assert between.take() == [newer, unreadable]
    assert between.take() == []


def test_what_was_cut_off_is_dropped(arrived):
    between = Between()
    for client in ("ann", "bob"):
        between.keep(arrived(client))
    between.drop("ann")
    between.drop("nobody")
    assert [event.client for event in between.take()] == ["bob"]


def test_a_few_wait_and_more_travel_again(arrived):
    between = Between()
    for number in range(3 * MOST):
        between.keep(arrived(f"client-{number}"))
    assert len(between.take()) == MOST
