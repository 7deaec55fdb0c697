"""What of a round stands in its record for good: whatever devices say, it stays small and readable."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregate import Contribution
from coordinator.checks import Late
from coordinator.collection import Collection
from coordinator.learning import NO_LESSON, Knowledge
from coordinator.records import RoundRecord
from coordinator.summary import summary
from protocol.events import OfferMade
from protocol.messages import BlobRef, TextBank

BANK = TextBank(1, ("cat", "dog", "fox"), ("a {}",), np.eye(3, 8, dtype=np.float32), 10.0, "none", "d" * 64)


@pytest.fixture
def record_of(make_update):
    def make(collection, bytes_up, problem=""):
        known = Knowledge(BANK, make_update(9).adapter)
        return summary(collection, NO_LESSON, known, 1.0, bytes_up, problem)

    return make


def test_only_bytes_of_participants_and_of_who_delivered_are_kept(expected, make_update, make_offer, record_of):
    """With open admission whoever has a key may be heard, under any name that is free."""
    update = make_update()
    late = {2: Late(expected, (), 0.5)}
    came = [("zoe", Contribution(make_offer(update, round=2), update, 0.5))]
    collection = Collection(expected, 1, 0.0, late=late, came_late=came)
    said = {f"invented-{number}": 1 for number in range(5000)}
    record = record_of(collection, {**said, "ann": 7, "zoe": 8})
    assert record.bytes_up == {"ann": 7, "zoe": 8}


def test_a_flood_of_refusals_is_one_line_of_the_record(expected, make_update, make_offer, record_of):
    collection = Collection(expected, 1, 0.0)
    offer = make_offer(make_update())
    for number in range(1000):
        collection.take(OfferMade("eve", offer.model_copy(update={"blob": BlobRef(sha256=f"{number:064x}", size=1)})))
    (refusal,) = record_of(collection, {}).rejected
    assert (refusal.client, refusal.reason, refusal.times) == ("eve", "not-invited", 1000)


def test_a_record_from_before_refusals_were_counted_can_be_read(expected, make_update, make_offer, record_of):
    collection = Collection(expected, 1, 0.0)
    collection.take(OfferMade("eve", make_offer(make_update())))
    record = record_of(collection, {})
    older = record.model_dump_json().replace(',"times":1', "")
    assert "times" not in older
    assert RoundRecord.model_validate_json(older) == record
