"""Client and coordinator against each other, without a broker, in virtual time."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.bus import Connected, Delivery, Publish
from protocol.client_end import ClientEnd
from protocol.codec import decode_update, encode_adapter, encode_bank, encode_update, reference
from protocol.coordinator_end import GATHER_S, CoordinatorEnd
from protocol.envelope import COORDINATOR, decode
from protocol.events import (
    Answered,
    ClientSeen,
    Finished,
    NotDrawn,
    OfferTooLarge,
    PlanReady,
    UpdateArrived,
    UpdateUnreadable,
)
from protocol.messages import (
    MIN_CHUNK_SIZE,
    ClassBankManifest,
    Manifest,
    Need,
    Receipt,
    Recipe,
    RoundPlan,
    Status,
    TextBank,
    TrainingResult,
    Update,
    Verdict,
)
from protocol.topics import Topics, parse
from protocol.transfer.exchange import cut_for, to_bitmap
from protocol.transfer.parcel import Parcel, pack
from protocol.trust.sealing import SEALING_BYTES, Unsealer
from protocol.trust.signing import Signer, opened, signer_of
from tests.network import addressee

TOPICS = Topics("fed")
SMALL_PACKETS = 1600  # chunks of 1088 bytes: a few dozen a blob
fates = st.lists(st.sampled_from(["deliver", "lose", "twice", "late"]), max_size=150)


def a_bank(version: int = 1) -> TextBank:
    rows = np.random.default_rng(version).normal(size=(20, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return TextBank(version, tuple(f"c{i}" for i in range(20)), ("a {}",), rows, 100.0, "clip", "digest")


def an_adapter(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {"x.lora_A": rng.normal(size=(4, 500)).astype(np.float16).astype(np.float32)}


def a_result(number: int = 1, seed: int = 1) -> TrainingResult:
    rows = np.random.default_rng(seed).normal(size=(6, 64)).astype(np.float32)
    indices = np.arange(6, dtype=np.int32)
    update = Update(an_adapter(seed), rows, indices, indices, indices, rows, indices)
    return TrainingResult(number, "ab" * 32, update, 6, 0.5, 0.5, 1.0)


def a_plan(adapter_ref, bank_ref, number: int = 1, state: str = "open") -> RoundPlan:
    return RoundPlan(
        run="run-1",
        start=1,
        round=number,
        state=state,
        classes=bank_ref.sha256,
        adapter=adapter_ref,
        participants=("a", "b", "c", "late"),
        recipe=Recipe(),
        seed=0,
        deadline_s=60.0,
    )


def open_round(network, number: int = 1, bank: TextBank | None = None, seed: int = 0) -> RoundPlan:
    coordinator = network.ends["coordinator"]
    bank_ref, actions = coordinator.publish_bank(bank or a_bank())
    network.do("coordinator", actions)
    plan = a_plan(coordinator.serve_adapter(an_adapter(seed)), bank_ref, number)
    network.do("coordinator", coordinator.publish_plan(plan))
    return plan


SIGNERS = {name: Signer() for name in (COORDINATOR, "a", "b", "c")}


def said(message: Publish) -> tuple[str, Manifest]:
    """What a message says, without its sequence number."""
    return message.topic, decode(opened(message.payload, signer_of(message.payload))).manifest


def manifest_on(topic: str, manifest, federation: str = "fed", sender: str = COORDINATOR) -> Delivery:
    return Delivery(topic, SIGNERS[sender].seal(federation, sender, manifest, addressee(topic)))


@given(fates, st.integers(1, 3), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_round_goes_all_the_way_whatever_the_network_loses(new_network, schedule, clients, reconnect):
    names = tuple("abc"[:clients])
    network = new_network(*names, fates=schedule, max_packet=SMALL_PACKETS)
    plan = open_round(network)
    if reconnect:
        network.pass_time(0.5)
        network.connect()
    network.run(lambda: all(network.seen(name, PlanReady) for name in names))
    for seed, name in enumerate(names):
        network.do(name, network.ends[name].offer(pack(a_result(seed=seed))))
    coordinator = network.ends["coordinator"]
    network.run(lambda: {event.client for event in network.seen("coordinator", UpdateArrived)} == set(names))
    for event in network.seen("coordinator", UpdateArrived):
        network.do("coordinator", coordinator.answer(event.client, event.offer, Verdict(accepted=True)))
    network.run(lambda: all(network.seen(name, Answered) for name in names))
    network.pass_time(65.0)

    assert len(network.seen("coordinator", UpdateArrived)) == clients
    for seed, name in enumerate(names):
        (ready,) = network.seen(name, PlanReady)
        assert ready.plan == plan
        assert encode_bank(ready.bank) == encode_bank(a_bank())
        assert encode_adapter(ready.adapter) == encode_adapter(an_adapter())
        (arrived,) = [event for event in network.seen("coordinator", UpdateArrived) if event.client == name]
        sent = decode_update(encode_update(a_result(seed=seed).update))
        np.testing.assert_array_equal(arrived.update.features, sent.features)
        np.testing.assert_array_equal(arrived.update.adapter["x.lora_A"], sent.adapter["x.lora_A"])
        (answered,) = network.seen(name, Answered)
        assert (answered.receipt.sha256, answered.receipt.accepted) == (arrived.offer.blob.sha256, True)


def test_each_new_plan_is_ready_once_and_a_late_joiner_gets_the_newest(new_network):
    network = new_network("a", "late")
    network.connect("a")
    for number in (1, 2, 3):
        open_round(network, number, bank=a_bank(number // 2), seed=number // 3)
        network.run(lambda number=number: len(network.seen("a", PlanReady)) == number)
    network.restart("late", ClientEnd("fed", "late", random.Random(9)))
    network.events["late"].clear()
    network.connect("late")
    network.run(lambda: network.seen("late", PlanReady))
    assert [event.plan.round for event in network.seen("a", PlanReady)] == [1, 2, 3]
    assert [event.plan.round for event in network.seen("late", PlanReady)] == [3]


@pytest.mark.parametrize("order", list(itertools.permutations(["classes", "round", "receipt", "need"])))
def test_manifests_may_come_in_any_order(order):
    end = ClientEnd("fed", "a", random.Random(0))
    end.handle(Connected(SMALL_PACKETS), 0.0)
    end.offer(pack(a_result()))
    blobs = {"classes": encode_bank(a_bank()), "round": encode_adapter(an_adapter())}
    upload = reference(encode_update(a_result().update), SMALL_PACKETS - 512)
    bank_ref, adapter_ref = (reference(blob, MIN_CHUNK_SIZE) for blob in blobs.values())
    deliveries = {
        "classes": manifest_on(TOPICS.broadcast("classes"), ClassBankManifest(version=1, blob=bank_ref)),
        "round": manifest_on(TOPICS.broadcast("round"), a_plan(adapter_ref, bank_ref)),
        "receipt": manifest_on(
            TOPICS.to("a", "receipt"), Receipt(round=1, sha256=upload.sha256, accepted=True, reason="accepted")
        ),
        "need": manifest_on(TOPICS.to("a", "need"), Need(sha256=upload.sha256, missing="80")),
    }
    events, chunks = [], []
    for kind in order:
        events += end.handle(deliveries[kind], 1.0)[1]
        chunks += [action for action in end.tick(1.0, 8) if "/from/a/blob/" in getattr(action, "topic", "")]
    for blob, ref in zip(blobs.values(), (bank_ref, adapter_ref), strict=True):
        for index in range(ref.chunks):
            data = blob[index * MIN_CHUNK_SIZE : (index + 1) * MIN_CHUNK_SIZE]
            events += end.handle(Delivery(TOPICS.blob(ref.sha256, index), data), 2.0)[1]
    assert sorted(type(event).__name__ for event in events) == ["Answered", "PlanReady"]
    assert len(chunks) == (1 if order.index("need") < order.index("receipt") else 0)


def test_a_coordinator_that_was_set_back_to_an_earlier_round_is_followed():
    end = ClientEnd("fed", "a", random.Random(0))
    end.handle(Connected(SMALL_PACKETS), 0.0)
    ready = []
    for number in (7, 6):
        bank, adapter = encode_bank(a_bank()), encode_adapter(an_adapter(number))
        bank_ref, adapter_ref = reference(bank, MIN_CHUNK_SIZE), reference(adapter, MIN_CHUNK_SIZE)
        end.handle(manifest_on(TOPICS.broadcast("classes"), ClassBankManifest(version=1, blob=bank_ref)), 1.0)
        end.handle(manifest_on(TOPICS.broadcast("round"), a_plan(adapter_ref, bank_ref, number)), 1.0)
        for blob, ref in ((bank, bank_ref), (adapter, adapter_ref)):
            for index in range(ref.chunks):
                data = blob[index * MIN_CHUNK_SIZE : (index + 1) * MIN_CHUNK_SIZE]
                ready += end.handle(Delivery(TOPICS.blob(ref.sha256, index), data), 2.0)[1]
    assert [event.plan.round for event in ready if isinstance(event, PlanReady)] == [7, 6]


def test_a_finished_federation_is_told_without_its_last_adapter(new_network):
    network = new_network("a")
    coordinator = network.ends["coordinator"]
    bank_ref, actions = coordinator.publish_bank(a_bank())
    network.do("coordinator", actions)
    plan = a_plan(coordinator.serve_adapter(an_adapter()), bank_ref, state="finished")
    network.do("coordinator", coordinator.publish_plan(plan))
    network.run(lambda: network.seen("a", Finished))
    assert network.seen("a", Finished) == [Finished(plan)]
    assert network.seen("a", PlanReady) == []


def test_a_bank_that_stays_is_not_announced_again_and_its_chunks_are_still_on_their_way(new_network):
    network = new_network(max_packet=SMALL_PACKETS)
    end = network.ends["coordinator"]
    ref, first = end.publish_bank(a_bank())
    end.handle(manifest_on(TOPICS.from_("a", "need"), Need(sha256=ref.sha256, missing="80"), sender="a"), 1.0)
    assert end.publish_bank(a_bank()) == (ref, [])
    assert [parse(action.topic).kind for action in end.tick(1.0 + GATHER_S, 99)] == ["blob"]
    assert len(first) == len(end.publish_bank(a_bank(2))[1]) == 1


def test_what_is_retained_is_said_again_and_heard_once(new_network):
    network = new_network("a", "stranger")
    plan = open_round(network)
    network.run(lambda: network.seen("a", PlanReady) and network.seen("stranger", NotDrawn))
    network.do("a", network.ends["a"].announce(Status(state="online", phase="training")))
    network.pass_time(100.0)
    topics = Counter(message.topic for message in network.published)
    assert 3 <= topics[TOPICS.broadcast("round")] <= 6  # after pauses of 5 to 10 s, then of 10 to 20 and so on
    assert 3 <= topics[TOPICS.from_("a", "status")] <= 5  # of 15 to 30 s, and so on
    assert [event.plan for event in network.seen("a", PlanReady)] == [plan]
    assert len(network.seen("stranger", NotDrawn)) == 1
    assert network.seen("coordinator", ClientSeen)[-1].client in ("a", "stranger")


def test_a_broadcast_chunk_is_published_once_for_all_who_ask_within_the_gather_time(new_network):
    network = new_network(max_packet=SMALL_PACKETS)
    end = network.ends["coordinator"]
    ref, _ = end.publish_bank(a_bank())
    for moment, (client, asked) in enumerate({"a": {0, 1}, "b": {1, 2}, "c": {0, 2, 3}}.items()):
        need = Need(sha256=ref.sha256, missing=to_bitmap(asked, ref.chunks))
        now = 1.0 + moment * GATHER_S / 4
        end.handle(manifest_on(TOPICS.from_(client, "need"), need, sender=client), now)
        assert end.tick(now, 99) == []
    assert [parse(action.topic).index for action in end.tick(1.0 + GATHER_S, 99)] == [0, 1, 2, 3]
    assert end.tick(3.0, 99) == []


def test_retained_manifests_are_published_again_after_a_reconnection(new_network):
    network = new_network("a")
    open_round(network)
    retained = [message for message in network.published if message.topic.startswith("clipcast/1/fed/") and message.retain]
    network.published.clear()
    network.connect("coordinator")
    again = [message for message in network.published if message.retain]
    assert [said(m) for m in again] == [said(message) for message in retained if "/from/" not in message.topic]
    assert [parse(message.topic).kind for message in again] == ["classes", "round"]


def test_a_status_and_its_last_will_reach_the_coordinator_as_that_clients(new_network):
    network = new_network("a")
    end = network.ends["a"]
    network.do("a", end.announce(Status(state="online", phase="training", round=4)))
    network.do("a", [end.will()])
    network.pass_time(1.0)
    seen = [(event.client, event.status.state, event.status.phase) for event in network.seen("coordinator", ClientSeen)]
    assert seen == [("a", "online", "waiting"), ("a", "online", "training"), ("a", "offline", "stopped")]


def offers(network) -> list[Publish]:
    return [message for message in network.published if message.topic == TOPICS.from_("a", "offer")]


def test_an_oversized_offer_is_reported_and_not_fetched(new_network):
    network = new_network("a", max_update_bytes=1000)
    network.do("a", network.ends["a"].offer(pack(a_result())))
    network.run(lambda: network.seen("coordinator", OfferTooLarge))
    network.pass_time(5.0)
    assert "exceed the 1000" in network.seen("coordinator", OfferTooLarge)[0].problem
    assert network.seen("coordinator", UpdateArrived) == []
    assert [message for message in network.published if parse(message.topic).kind in ("need", "blob")] == []


def test_an_upload_that_cannot_be_read_is_reported_once(new_network):
    network = new_network("a")
    end = network.ends["a"]
    end.offer(pack(a_result()))
    blob = encode_update(a_result().update)[:-3]
    end.offer(Parcel(end._upload.offer.model_copy(update={"blob": reference(blob)}), blob))
    network.run(lambda: network.seen("coordinator", UpdateUnreadable))
    (event,) = network.seen("coordinator", UpdateUnreadable)
    verdict = Verdict(accepted=False, reason="unreadable")
    network.do("coordinator", network.ends["coordinator"].answer("a", event.offer, verdict))
    network.pass_time(20.0)
    (event,) = network.seen("coordinator", UpdateUnreadable)
    assert (event.client, event.offer.blob.sha256) == ("a", reference(blob).sha256)


def sealed_round(network, client: str):
    """Open a round whose plan asks for sealed updates; return that client's plan."""
    coordinator = network.ends["coordinator"]
    bank_ref, actions = coordinator.publish_bank(a_bank())
    network.do("coordinator", actions)
    plan = a_plan(coordinator.serve_adapter(an_adapter()), bank_ref).model_copy(update={"seal_to": coordinator.seal_to})
    network.do("coordinator", coordinator.publish_plan(plan))
    network.run(lambda: network.seen(client, PlanReady))
    return network.seen(client, PlanReady)[0].plan


def test_a_sealed_update_is_read_by_the_coordinator_alone(new_network):
    network = new_network("a", max_packet=SMALL_PACKETS, seal_updates=True)
    result, end = a_long_result(), network.ends["a"]
    plan = sealed_round(network, "a")
    assert plan.seal_to == network.ends["coordinator"].seal_to is not None
    network.do("a", end.offer(end.pack(result, plan)))
    network.run(lambda: network.seen("coordinator", UpdateArrived))
    (arrived,) = network.seen("coordinator", UpdateArrived)
    assert arrived.blob == encode_update(result.update) == encode_update(arrived.update)
    assert arrived.offer.blob.size == len(arrived.blob) + SEALING_BYTES
    travelled = b"".join(m.payload for m in network.published if parse(m.topic).direction == "from")
    assert arrived.blob[:64] not in travelled
    assert arrived.blob[-64:] not in travelled


@pytest.mark.parametrize("forged", ["open", "another round", "another key"])
def test_what_is_not_sealed_to_the_plan_s_key_is_reported(new_network, forged):
    network = new_network("a", seal_updates=True)
    end, plan = network.ends["a"], sealed_round(network, "a")
    wrong = {
        "open": plan.model_copy(update={"seal_to": None}),
        "another round": plan,
        "another key": plan.model_copy(update={"seal_to": Unsealer().public}),
    }[forged]
    parcel = end.pack(a_result(2 if forged == "another round" else 1), wrong)
    network.do("a", end.offer(Parcel(parcel.offer.model_copy(update={"round": 1}), parcel.blob)))
    network.run(lambda: network.seen("coordinator", UpdateUnreadable))
    (unreadable,) = network.seen("coordinator", UpdateUnreadable)
    assert unreadable.reason == "not-sealed"


def test_a_repeated_offer_gets_the_same_receipt_again_and_is_not_fetched_twice(new_network):
    network = new_network("a")
    network.do("a", network.ends["a"].offer(pack(a_result())))
    network.run(lambda: network.seen("coordinator", UpdateArrived))
    (event,) = network.seen("coordinator", UpdateArrived)
    verdict = Verdict(accepted=False, reason="late", detail="x" * 900)
    (receipt,) = network.ends["coordinator"].answer("a", event.offer, verdict)
    topic, offer = said(offers(network)[0])
    for _ in range(3):
        actions, events = network.ends["coordinator"].handle(network.signed("a", topic, offer), network.now)
        assert [said(action) for action in actions] == [said(receipt)]
        assert events == []
    assert [action for action in network.ends["coordinator"].tick(1e6, 8) if parse(action.topic).kind == "need"] == []


def test_an_identical_update_of_the_next_round_gets_its_own_verdict(new_network):
    network = new_network("a")
    for number, accepted in ((1, False), (2, True)):
        network.do("a", network.ends["a"].offer(pack(a_result(number))))
        network.run(lambda number=number: len(network.seen("coordinator", UpdateArrived)) == number)
        event = network.seen("coordinator", UpdateArrived)[-1]
        network.do("coordinator", network.ends["coordinator"].answer("a", event.offer, Verdict(accepted=accepted)))
        network.run(lambda number=number: len(network.seen("a", Answered)) == number)
    assert [(e.receipt.round, e.receipt.accepted) for e in network.seen("a", Answered)] == [(1, False), (2, True)]


def test_a_coordinator_that_lost_its_memory_takes_the_upload_anew(new_network):
    network = new_network("a", max_packet=SMALL_PACKETS)
    network.do("a", network.ends["a"].offer(pack(a_result())))
    network.run(lambda: any("/blob/" in message.topic for message in network.published))
    network.restart("coordinator", CoordinatorEnd("fed", random.Random(1)))
    network.connect("coordinator")
    network.run(lambda: network.seen("coordinator", UpdateArrived))


def test_a_withdrawn_offer_falls_silent(new_network):
    network = new_network("a")
    network.ends["a"].offer(pack(a_result()))
    network.step()
    assert len(offers(network)) == 1
    network.ends["a"].withdraw()
    network.pass_time(70.0)
    assert len(offers(network)) == 1


def sent(network, start: int, kind: str) -> list[int]:
    """Indices of the chunks published since message `start` in one direction."""
    addresses = [parse(message.topic) for message in network.published[start:]]
    return [int(a.index) for a in addresses if a.kind == "blob" and a.direction == kind and a.index is not None]


def test_a_restarted_client_fetches_only_what_it_lacks_and_what_it_has_not_at_all(new_network, tmp_path):
    network = new_network("a", max_packet=SMALL_PACKETS)
    network.restart("a", ClientEnd("fed", "a", random.Random(0), tmp_path))
    network.connect()
    plan = open_round(network)
    network.run(lambda: len(sent(network, 0, "all")) > 9)  # killed while the adapter is under way: the bank is here
    network.restart("a", ClientEnd("fed", "a", random.Random(1), tmp_path))
    network.connect("a")
    start = len(network.published)
    network.run(lambda: network.seen("a", PlanReady))
    again = sent(network, start, "all")
    assert 0 < len(again) < plan.adapter.chunks
    network.restart("a", ClientEnd("fed", "a", random.Random(2), tmp_path))
    network.events["a"].clear()
    start = len(network.published)
    network.connect("a")
    network.run(lambda: network.seen("a", PlanReady))
    assert sent(network, start, "all") == []
    (ready,) = network.seen("a", PlanReady)
    assert encode_adapter(ready.adapter) == encode_adapter(an_adapter())
    assert not list((tmp_path / "partial").iterdir())


def a_long_result() -> TrainingResult:
    """An update of some ninety small chunks."""
    result = a_result()
    adapter = {"x.lora_A": np.ones((4, 12_000), np.float32)}
    return dataclasses.replace(result, update=dataclasses.replace(result.update, adapter=adapter))


def is_request(message: Publish) -> bool:
    """Whether the coordinator asks a client for chunks."""
    address = parse(message.topic)
    return (address.direction, address.kind) == ("to", "need")


def test_a_restarted_coordinator_asks_only_for_what_it_lacks_of_an_upload(new_network, tmp_path):
    network = new_network("a", max_packet=SMALL_PACKETS, state=tmp_path)
    open_round(network)
    network.do("a", network.ends["a"].offer(pack(a_long_result())))
    chunks = network.ends["a"]._upload.offer.blob.chunks
    network.run(lambda: len(sent(network, 0, "from")) > 3)
    network.step()
    network.restart("coordinator", CoordinatorEnd("fed", random.Random(1), state=tmp_path))
    network.connect("coordinator")
    open_round(network)
    start = len(network.published)
    network.run(lambda: network.seen("coordinator", UpdateArrived))
    again = sent(network, start, "from")
    assert sorted(set(again)) == list(range(min(again), chunks))
    assert min(again) > 3
    (arrived,) = network.seen("coordinator", UpdateArrived)
    assert encode_update(arrived.update) == encode_update(a_long_result().update)
    assert not list((tmp_path / "partial").iterdir())


def test_what_was_taken_of_an_upload_is_forgotten_when_its_client_is_not_drawn_again(new_network, tmp_path):
    network = new_network("a", max_packet=SMALL_PACKETS, state=tmp_path)
    open_round(network)
    network.do("a", network.ends["a"].offer(pack(a_long_result())))
    network.run(lambda: len(sent(network, 0, "from")) > 3)
    network.step()
    assert list((tmp_path / "partial").iterdir())
    end = network.ends["coordinator"]
    network.do("coordinator", end.publish_plan(a_plan(end.serve_adapter(an_adapter()), reference(b"bank"), 2, "finished")))
    end.publish_plan(a_plan(end.serve_adapter(an_adapter()), reference(b"bank"), 3).model_copy(update={"participants": ()}))
    assert not list((tmp_path / "partial").iterdir())


def test_no_more_clients_than_allowed_upload_at_a_time_and_all_come_through(new_network):
    clients = ("a", "b", "c", "late")
    network = new_network(*clients, max_packet=SMALL_PACKETS, uploads_at_once=2)
    open_round(network)
    for client in clients:
        network.do(client, network.ends[client].offer(pack(a_long_result())))
    uploading: list[int] = []

    def all_arrived() -> bool:
        done = {event.client for event in network.seen("coordinator", UpdateArrived)}
        asked = {parse(message.topic).client for message in network.published if is_request(message)}
        uploading.append(len(asked - done))
        return len(done) == len(clients)

    network.run(all_arrived)
    assert max(uploading) == 2


def asks(network, index: int = 0, end: int | None = None) -> Delivery:
    """The coordinator asks for the upload's chunks from `index` on, to before `end`."""
    ref = network.ends["a"]._upload.offer.blob
    need = Need(sha256=ref.sha256, missing=to_bitmap(set(range(index, end or ref.chunks)), ref.chunks))
    return network.signed("coordinator", TOPICS.to("a", "need"), need)


def test_on_a_link_that_brings_no_chunk_through_they_are_cut_smaller(new_network):
    network = new_network("a")
    end = network.ends["a"]
    result = a_result()
    adapter = {"x.lora_A": np.ones((4, 20_000), np.float32)}
    end.offer(pack(dataclasses.replace(result, update=dataclasses.replace(result.update, adapter=adapter))))
    sizes = []
    for _ in range(7):
        sizes.append(end._upload.offer.blob.chunk_size)
        end.handle(asks(network), 1.0)
        assert end.tick(1.0, 2)
        end.handle(Connected(None), 2.0)  # the link was lost before a chunk was through
        end.handle(asks(network), 2.0)
        assert "offer" in {parse(action.topic).kind for action in end.tick(2.5, 0)} or sizes[-1] == 4096
        end.handle(Connected(None), 3.0)
    assert sizes == [65536, 32768, 16384, 8192, 4096, 4096, 4096]
    end.handle(Connected(None), 4.0)
    assert end._upload.offer.blob.chunk_size == 4096  # the next connection begins with what was learnt


def test_on_a_slow_link_chunks_are_cut_smaller_and_on_a_better_one_whole_again(new_network):
    network = new_network("a")
    end = network.ends["a"]
    rows = np.ones((4, 200_000), np.float32)
    parcel = pack(dataclasses.replace(a_result(), update=dataclasses.replace(a_result().update, adapter={"x.lora_A": rows})))
    end.offer(parcel)

    def size_after(seconds: float) -> int:
        """Send two chunks that take so long, and see how the upload is cut then; offered anew, if it is cut anew."""
        before = end._upload.offer.blob.chunk_size
        end.handle(asks(network, 0, 2), 10.0)
        assert len([action for action in end.tick(10.0, 8) if "blob" in action.topic]) == 2
        assert not end.tick(10.0 + seconds / 2, 0, drained=False)
        said = end.tick(10.0 + seconds, 1)
        after = end._upload.offer.blob.chunk_size
        assert after == before or "offer" in {parse(action.topic).kind for action in said}
        return after

    assert size_after(7.9) == 65536  # 128 kbit/s are not below it
    assert size_after(8.5) == 32768
    assert size_after(16.5) == 8192
    assert size_after(0.1) == 8192  # an upload is cut smaller only
    end.offer(parcel)
    assert end._upload.offer.blob.chunk_size == 65536
    end.handle(asks(network, 0, 2), 20.0)
    end.tick(20.0, 8)
    end.handle(Connected(None), 99.0)  # what was under way is lost: that says nothing of the pace
    end.handle(asks(network, 1), 99.0)
    end.tick(99.0, 1)
    assert end._upload.offer.blob.chunk_size == 65536


@given(st.floats(1, 1e9))
def test_a_chunk_takes_three_seconds_on_a_slow_link_unless_it_is_the_smallest(rate):
    size = cut_for(rate)
    assert 4096 <= size <= 65536
    assert size & (size - 1) == 0
    assert (size == 65536) if rate >= 16_000 else (size / rate <= 3.0 or size == 4096)


def test_a_connection_that_brought_something_through_changes_no_size(new_network):
    network = new_network("a", max_packet=SMALL_PACKETS)
    end = network.ends["a"]
    end.offer(pack(a_long_result()))
    size = end._upload.offer.blob.chunk_size
    for _ in range(3):
        end.handle(asks(network), 1.0)
        end.tick(1.0, 4)
        end.handle(Connected(SMALL_PACKETS), 2.0)
        end.handle(asks(network, 1), 2.0)  # the first one came
    assert end._upload.offer.blob.chunk_size == size
