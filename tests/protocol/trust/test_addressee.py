"""What is said to one client is that client's alone, and not for ever."""

from __future__ import annotations

import random

import pytest

from protocol.bus import Delivery
from protocol.client_end import ClientEnd
from protocol.envelope import COORDINATOR
from protocol.events import Noticed
from protocol.messages import BlobRef, ClassBankManifest, ClientAdapter, Need, Notice, Receipt
from protocol.topics import Topics
from protocol.trust.signing import Signer

TOPICS = Topics("fed")
SHA = "a" * 64
TO_ONE = (
    Notice(reason="cloned", detail="two devices"),
    ClientAdapter(run="run", round=1, adapter=BlobRef(sha256=SHA, size=10)),
    Need(sha256=SHA, missing="80"),
    Receipt(round=1, sha256=SHA, accepted=True, reason="accepted"),
)


@pytest.mark.parametrize("manifest", TO_ONE, ids=lambda manifest: manifest.kind)
@pytest.mark.parametrize("to", ["b", None])
def test_what_is_for_another_client_or_for_nobody_is_not_heard(manifest, to):
    end, coordinator = ClientEnd("fed", "a", random.Random(0)), Signer()
    token = coordinator.seal("fed", COORDINATOR, manifest, to)
    end.handle(Delivery(TOPICS.to("a", manifest.kind), token), 0.0)
    assert end.gate.counts["wrong-topic"] == 1
    end.handle(Delivery(TOPICS.to("a", manifest.kind), coordinator.seal("fed", COORDINATOR, manifest, "a")), 0.0)
    assert end.gate.counts.total() == 1


def test_what_is_for_one_client_is_no_broadcast():
    end, coordinator = ClientEnd("fed", "a", random.Random(0)), Signer()
    bank = ClassBankManifest(version=1, blob=BlobRef(sha256=SHA, size=10))
    end.handle(Delivery(TOPICS.broadcast("classes"), coordinator.seal("fed", COORDINATOR, bank, "a")), 0.0)
    assert end.gate.counts["wrong-topic"] == 1


def test_a_notice_that_was_heard_is_not_heard_again_after_a_restart(tmp_path):
    coordinator = Signer()
    old = Delivery(TOPICS.to("a", "notice"), coordinator.seal("fed", COORDINATOR, TO_ONE[0], "a"))
    end = ClientEnd("fed", "a", random.Random(0), tmp_path)
    assert [type(event) for event in end.handle(old, 0.0)[1]] == [Noticed]
    restarted = ClientEnd("fed", "a", random.Random(0), tmp_path)
    assert restarted.handle(old, 0.0)[1] == []
    assert restarted.gate.counts["replayed"] == 1
