"""What the ends ignore, and where they must not stumble: strangers, rewritten history, other brokers' limits."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.bus import Connected, Delivery, Publish
from protocol.client_end import ClientEnd
from protocol.codec import encode_adapter, encode_bank, reference
from protocol.coordinator_end import CoordinatorEnd
from protocol.envelope import COORDINATOR, decode
from protocol.errors import Refused, WireError
from protocol.events import Answered, ClientSeen, Cloned, Finished, Noticed, PlanReady
from protocol.messages import (
    CHUNK_SIZE,
    MIN_CHUNK_SIZE,
    BlobRef,
    ClassBankManifest,
    Manifest,
    Need,
    Notice,
    Offer,
    Receipt,
    Recipe,
    RoundPlan,
    Status,
    TextBank,
    TrainingResult,
    Update,
)
from protocol.topics import Topics
from protocol.transfer.exchange import to_bitmap
from protocol.transfer.parcel import pack
from protocol.trust.signing import Signer, opened, signer_of
from tests.network import addressee

TOPICS = Topics("fed")
SHA = "ab" * 32
BANK = TextBank(1, ("x", "y"), ("a {}",), np.eye(2, 700, dtype=np.float32), 100.0, "clip", "digest")
ADAPTER = {"x.lora_A": np.ones((4, 500), np.float32)}
BANK_BLOB, ADAPTER_BLOB = encode_bank(BANK), encode_adapter(ADAPTER)


def a_plan(number: int = 1, state: str = "open", chunk_size: int = CHUNK_SIZE) -> RoundPlan:
    return RoundPlan(
        run="run-1",
        start=1,
        round=number,
        state=state,
        classes=reference(BANK_BLOB).sha256,
        adapter=reference(ADAPTER_BLOB, chunk_size),
        participants=("a",),
        recipe=Recipe(),
        seed=0,
        deadline_s=60.0,
    )


def an_offer(ref: BlobRef) -> Offer:
    return Offer(round=1, base=SHA, blob=ref, samples=1, loss=0, accuracy=0, train_seconds=0, bytes_received=0)


SIGNERS = {name: Signer() for name in (COORDINATOR, "a", "b")}


@dataclass(frozen=True)
class Said:
    """A manifest on a topic, signed when it is given to an end."""

    topic: str
    manifest: Manifest
    federation: str = "fed"
    sender: str = COORDINATOR

    def delivery(self) -> Delivery:
        return Delivery(
            self.topic, SIGNERS[self.sender].seal(self.federation, self.sender, self.manifest, addressee(self.topic))
        )


def delivered(message: Delivery | Said) -> Delivery:
    return message.delivery() if isinstance(message, Said) else message


def the_bank(chunk_size: int = CHUNK_SIZE) -> Said:
    manifest = ClassBankManifest(version=1, blob=reference(BANK_BLOB, chunk_size))
    return Said(TOPICS.broadcast("classes"), manifest)


def the_round(plan: RoundPlan) -> Said:
    return Said(TOPICS.broadcast("round"), plan)


def chunks(blob: bytes, chunk_size: int = CHUNK_SIZE) -> list[Delivery]:
    ref = reference(blob, chunk_size)
    pieces = (blob[index * chunk_size : (index + 1) * chunk_size] for index in range(ref.chunks))
    return [Delivery(TOPICS.blob(ref.sha256, index), data) for index, data in enumerate(pieces)]


def new_client(offering: bool = False) -> ClientEnd:
    end = ClientEnd("fed", "a", random.Random(0))
    end.handle(Connected(None), 0.0)
    if offering:
        end.offer(pack(a_result()))
    return end


def new_coordinator() -> CoordinatorEnd:
    end = CoordinatorEnd("fed", random.Random(0))
    end.handle(Connected(None), 0.0)
    return end


def a_result(loss: float = 0.5) -> TrainingResult:
    none = np.zeros(0, np.int32)
    empty = np.zeros((0, 4), np.float32)
    return TrainingResult(1, SHA, Update(ADAPTER, empty, none, none, none, empty, none), 1, loss, 0.5, 1.0)


def give(end, *deliveries: Delivery | Said, now: float = 1.0) -> list:
    return [event for delivery in deliveries for event in end.handle(delivered(delivery), now)[1]]


def test_the_control_sequence_that_the_strangers_imitate_is_accepted():
    end = new_client()
    assert len(give(end, the_bank(), the_round(a_plan()), *chunks(BANK_BLOB), *chunks(ADAPTER_BLOB))) == 1


FINISHED = a_plan(state="finished")


@pytest.mark.parametrize(
    "delivery",
    [
        Said(TOPICS.broadcast("round"), FINISHED, federation="other"),
        Said(Topics("other").broadcast("round"), FINISHED, federation="other"),
        Said(TOPICS.broadcast("round"), FINISHED, sender="b"),
        Said(TOPICS.broadcast("round"), FINISHED, sender="a"),
        Said(TOPICS.broadcast("classes"), FINISHED),
        Said(TOPICS.to("a", "receipt"), FINISHED),
        Said(TOPICS.from_("a", "round"), FINISHED),
        Delivery(TOPICS.broadcast("round"), b""),
        Delivery(TOPICS.broadcast("round"), b"\xff" * 100),
        Delivery(TOPICS.broadcast("round"), bytes(20_000)),
        Delivery("something/else", b"{}"),
        Delivery(TOPICS.blob(SHA, 0), b"data"),
        Delivery(TOPICS.to("a", "notice"), b"{}"),
    ],
)
def test_a_client_ignores_what_is_not_its_coordinators(delivery):
    assert give(new_client(), the_round(FINISHED)) == [Finished(FINISHED)]
    end = new_client()
    assert end.handle(delivered(delivery), 1.0) == ([], [])
    assert end.tick(2.0, 8) == []


@pytest.mark.parametrize(
    "delivery",
    [
        Said(TOPICS.from_("a", "status"), Status(state="online"), sender="b"),
        Said(TOPICS.from_("a", "status"), Status(state="online"), sender=COORDINATOR),
        Said(TOPICS.from_("a", "status"), Status(state="online"), sender="a", federation="other"),
        Said(Topics("other").from_("a", "status"), Status(state="online"), sender="a", federation="other"),
        Said(TOPICS.to("a", "status"), Status(state="online"), sender="a"),
        Said(TOPICS.from_("a", "offer"), Status(state="online"), sender="a"),
        Said(TOPICS.from_("a", "receipt"), Status(state="online"), sender="a"),
        Delivery(TOPICS.from_("a", "offer"), b"\xff"),
        Delivery(TOPICS.upload("a", SHA, 0), b"data"),
        Delivery("something/else", b"{}"),
    ],
)
def test_a_coordinator_ignores_what_is_not_that_clients(delivery):
    end = new_coordinator()
    assert len(give(end, Said(TOPICS.from_("a", "status"), Status(state="online"), sender="a"))) == 1
    assert end.handle(delivered(delivery), 1.0) == ([], [])
    assert [action for action in end.tick(2.0, 8) if action.topic != TOPICS.to("a", "notice")] == []


@given(
    st.sampled_from([TOPICS.broadcast("round"), TOPICS.to("a", "need"), TOPICS.from_("a", "offer")]), st.binary(max_size=99)
)
@settings(deadline=None, max_examples=60)
def test_no_bytes_shake_an_end(topic, payload):
    for end in (new_client(offering=True), new_coordinator()):
        assert end.handle(Delivery(topic, payload), 1.0)[1] == []


def test_a_receipt_for_another_update_leaves_the_offer_standing():
    end = new_client(offering=True)
    other = Receipt(round=1, sha256=SHA, accepted=True, reason="accepted")
    assert give(end, Said(TOPICS.to("a", "receipt"), other)) == []
    assert [action.topic for action in end.tick(2.0, 8)] == [TOPICS.from_("a", "offer")]


def test_a_receipt_on_another_clients_topic_is_ignored():
    end = new_client(offering=True)
    offer = end._upload.offer
    receipt = Receipt(round=1, sha256=offer.blob.sha256, accepted=True, reason="accepted")
    assert give(end, Said(TOPICS.to("b", "receipt"), receipt)) == []


def test_two_devices_of_one_key_are_found_out_and_both_told_until_they_are_judged_anew(new_network):
    """Each end is a process of its own with the same key, as after a state folder was copied; all hear what is for "a"."""
    network = new_network("a")
    copy = ClientEnd("fed", "a", random.Random(9))
    copy._signer = Signer(network.ends["a"]._signer._key)
    network.ends["copy"], network.events["copy"], network._filters["copy"] = copy, [], set()
    network.connect("copy")
    for name in ("a", "copy") * 2:
        assert not network.seen("coordinator", Cloned)
        network.do(name, network.ends[name].announce(Status(state="online")))
        network.pass_time(1.0)
    network.run(lambda: network.seen("a", Noticed) and network.seen("copy", Noticed))
    assert network.seen("coordinator", Cloned) == [Cloned("a")]
    assert network.seen("a", Noticed)[0].notice.reason == "cloned"
    seen = len(network.seen("coordinator", ClientSeen))
    network.do("copy", network.ends["copy"].announce(Status(state="online")))
    network.pass_time(1.0)
    assert len(network.seen("coordinator", ClientSeen)) == seen
    network.ends["coordinator"].cut_off("a")  # as when the device was added again
    network.do("copy", network.ends["copy"].announce(Status(state="online")))
    network.run(lambda: len(network.seen("coordinator", ClientSeen)) > seen)


def test_a_client_that_is_not_let_in_is_told_why(new_network):
    class Closed:
        def check(self, sender, key):
            raise Refused("unknown-device", f"{sender} is not registered")

    network = new_network("a", trust=Closed())
    network.run(lambda: network.seen("a", Noticed))
    assert network.seen("a", Noticed) == [Noticed(Notice(reason="unknown-device", detail="a is not registered"))]


def test_a_damaged_blob_is_asked_for_again():
    end = new_client()
    give(end, the_bank(), the_round(a_plan()))
    end.tick(1.0, 8)
    damaged = chunks(BANK_BLOB)[0]
    assert give(end, Delivery(damaged.topic, bytes(len(damaged.payload)))) == []
    assert [action.topic for action in end.tick(1.0, 8)] == [TOPICS.from_("a", "need")]
    assert len(give(end, *chunks(BANK_BLOB), *chunks(ADAPTER_BLOB))) == 1


def test_a_stale_plan_that_comes_again_is_not_ready_again():
    end = new_client()
    stale = the_round(a_plan(1)).delivery()
    first = give(end, stale, the_bank(), *chunks(BANK_BLOB), *chunks(ADAPTER_BLOB))
    second = give(end, the_round(a_plan(2)))
    assert [event.plan.round for event in first + second] == [1, 2]
    assert give(end, stale) == []


def test_blobs_cut_anew_by_a_restarted_coordinator_still_arrive():
    end = new_client()
    give(end, the_bank(), the_round(a_plan()))
    give(end, the_bank(MIN_CHUNK_SIZE), the_round(a_plan(chunk_size=MIN_CHUNK_SIZE)))
    events = give(end, *chunks(BANK_BLOB, MIN_CHUNK_SIZE), *chunks(ADAPTER_BLOB, MIN_CHUNK_SIZE))
    assert [type(event) for event in events] == [PlanReady]


def served(end: CoordinatorEnd, ref: BlobRef) -> list[Publish]:
    need = Need(sha256=ref.sha256, missing=to_bitmap(set(range(ref.chunks)), ref.chunks))
    give(end, Said(TOPICS.from_("a", "need"), need, sender="a"))
    return end.tick(2.0, 999)


def test_chunks_fit_the_brokers_packets_when_connected_first():
    end = CoordinatorEnd("fed", random.Random(0))
    end.handle(Connected(2000), 0.0)
    sent = served(end, end.publish_bank(BANK)[0])
    assert len(sent) > 1
    assert max(len(action.payload) + len(action.topic) for action in sent) <= 2000


def test_chunks_fit_the_brokers_packets_when_the_bank_was_published_before():
    end = CoordinatorEnd("fed", random.Random(0))
    end.publish_bank(BANK)
    actions, _ = end.handle(Connected(2000), 0.0)
    (announced,) = [
        decode(opened(action.payload, signer_of(action.payload))).manifest
        for action in actions
        if isinstance(action, Publish)
    ]
    assert max(len(action.payload) + len(action.topic) for action in served(end, announced.blob)) <= 2000


def test_an_upload_fits_the_packets_of_the_next_broker():
    end = new_client(offering=True)
    end.handle(Connected(2000), 1.0)
    assert end._upload.offer.blob.chunk_size < 2000


def test_an_offer_of_absurdly_many_chunks_is_refused_before_it_is_an_offer():
    end = new_coordinator()
    good = Said(TOPICS.from_("a", "offer"), an_offer(BlobRef(sha256=SHA, size=60 * 1024 * 1024)), sender="a")
    absurd = BlobRef.model_construct(sha256=SHA, size=60 * 1024 * 1024, chunk_size=MIN_CHUNK_SIZE)
    assert give(end, replace(good, manifest=good.manifest.model_copy(update={"blob": absurd}))) == []
    assert end.gate.counts == {"malformed": 1}
    assert end.tick(2.0, 8) == []
    (made,) = give(end, good)
    end.fetch(made.client, made.offer)
    assert len(end.tick(2.0, 8)) == 1


def test_a_result_whose_loss_is_not_finite_is_refused():
    with pytest.raises(WireError):
        pack(a_result(loss=float("nan")))


def test_a_blob_that_cannot_be_read_is_not_waited_for_in_silence():
    end = new_client()
    unreadable = ADAPTER_BLOB
    manifest = ClassBankManifest(version=1, blob=reference(unreadable))
    give(end, Said(TOPICS.broadcast("classes"), manifest))
    end.tick(1.0, 8)
    events = give(end, *chunks(unreadable))
    assert events or end.tick(100.0, 8)


def test_bytes_are_counted_until_the_next_offer():
    end = new_client()
    delivery = delivered(the_bank())
    give(end, delivery, delivery)
    received = end.bytes_received
    assert received == 2 * len(delivery.payload)
    end.offer(pack(a_result()))
    assert (end._upload.offer.bytes_received, end.bytes_received) == (received, 0)


def test_answered_means_the_receipt_of_this_very_offer():
    end = new_client(offering=True)
    offer = end._upload.offer
    receipt = Receipt(round=1, sha256=offer.blob.sha256, accepted=False, reason="late")
    assert give(end, Said(TOPICS.to("a", "receipt"), receipt)) == [Answered(receipt)]
    assert give(end, Said(TOPICS.to("a", "receipt"), receipt)) == []
    assert end.tick(99.0, 8) == []
