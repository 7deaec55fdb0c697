"""Rounds in which every participant starts from an adapter of its own, in virtual time and whatever the network does."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.bus import Connected, Delivery, Publish, Subscribe
from protocol.client_end import ClientEnd
from protocol.codec import encode_adapter, encode_bank, reference
from protocol.coordinator_end import CoordinatorEnd
from protocol.envelope import COORDINATOR, decode
from protocol.events import NotDrawn, PlanReady
from protocol.messages import (
    MIN_CHUNK_SIZE,
    BlobRef,
    ClassBankManifest,
    ClientAdapter,
    Manifest,
    Need,
    Recipe,
    RoundPlan,
    TextBank,
)
from protocol.storage.at_rest import KeptBlob, StoredAdapter
from protocol.storage.blobs import Blobs
from protocol.topics import Topics, parse
from protocol.transfer.exchange import PACKET_MARGIN, to_bitmap
from protocol.trust.signing import Signer, opened, signer_of
from tests.network import addressee

TOPICS = Topics("fed")
SMALL_PACKETS = 1600  # chunks of 1088 bytes: a handful an adapter
COMMON, BANK = 0, 100  # seeds
fates = st.lists(st.sampled_from(["deliver", "lose", "twice", "late"]), max_size=150)


def a_bank() -> TextBank:
    rows = np.random.default_rng(BANK).normal(size=(20, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return TextBank(1, tuple(f"c{i}" for i in range(20)), ("a {}",), rows, 100.0, "clip", "digest")


def an_adapter(seed: int) -> dict:
    """An adapter of a few chunks, of a rank that depends on the seed."""
    rng = np.random.default_rng(seed)
    return {"x.lora_A": rng.normal(size=(3 + seed % 3, 600)).astype(np.float16).astype(np.float32)}


def digest(seed: int) -> str:
    return reference(encode_adapter(an_adapter(seed))).sha256


def a_plan(common: BlobRef, bank: BlobRef, number: int, participants: tuple[str, ...], **fields: object) -> RoundPlan:
    plan = RoundPlan(
        run="run-1",
        start=1,
        round=number,
        state="open",
        classes=bank.sha256,
        adapter=common,
        individual=True,
        participants=participants,
        recipe=Recipe(),
        seed=0,
        deadline_s=60.0,
    )
    return plan.model_copy(update=fields)


def open_round(network, own: dict[str, int], number: int = 1, common: int = COMMON, **fields: object) -> RoundPlan:
    """Open a round for the clients named, each with the adapter of its seed."""
    coordinator = network.ends["coordinator"]
    bank, actions = coordinator.publish_bank(a_bank())
    network.do("coordinator", actions)
    shared = coordinator.serve_adapter(an_adapter(common))
    plan = a_plan(shared, bank, number, tuple(own), **fields)
    manifests = coordinator.serve_client_adapters(plan.run, number, {name: an_adapter(seed) for name, seed in own.items()})
    network.do("coordinator", coordinator.publish_client_adapters(manifests))
    network.do("coordinator", coordinator.publish_plan(plan))
    return plan


def manifest_of(message: Publish) -> Manifest:
    return decode(opened(message.payload, signer_of(message.payload))).manifest


def sent_chunks(network) -> list[tuple[str, int]]:
    """Hash and index of every broadcast chunk, in order."""
    addresses = [parse(message.topic) for message in network.published]
    return [(a.sha256, a.index) for a in addresses if (a.direction, a.kind) == ("all", "blob")]


def asked_for(network, name: str) -> set[str]:
    """Hashes of the blobs that a client asked for."""
    topic = TOPICS.from_(name, "need")
    needs = [manifest_of(message) for message in network.published if message.topic == topic]
    return {need.sha256 for need in needs if isinstance(need, Need)}


def check_ready(event: PlanReady, plan: RoundPlan, seed: int) -> None:
    assert event.plan.model_copy(update={"adapter": plan.adapter}) == plan  # the global adapter may have been cut anew
    assert event.base == digest(seed)
    assert encode_adapter(event.adapter) == encode_adapter(an_adapter(seed))
    assert encode_bank(event.bank) == encode_bank(a_bank())


@given(fates, st.integers(1, 3), st.sampled_from([(), ("coordinator",), ("a",), ("coordinator", "a", "b", "c")]))
@settings(deadline=None, max_examples=60)
def test_every_participant_starts_from_its_own_adapter_whatever_the_network_loses(
    new_network, schedule, clients, reconnecting
):
    names = tuple("abc"[:clients])
    network = new_network("a", "b", "c", fates=schedule, max_packet=SMALL_PACKETS)
    own = {name: seed for seed, name in enumerate(names, start=1)}
    plan = open_round(network, own)
    if reconnecting:
        network.pass_time(0.1)
        network.connect(*reconnecting)
    network.run(lambda: all(network.seen(name, PlanReady) for name in names))
    network.run(lambda: all(network.seen(name, NotDrawn) for name in set("abc") - set(names)))
    network.pass_time(65.0)
    for name, seed in own.items():
        (ready,) = network.seen(name, PlanReady)
        check_ready(ready, plan, seed)
        assert asked_for(network, name) <= {digest(seed), plan.classes}
    for name in set("abc") - set(names):
        assert {event.plan.round for event in network.seen(name, NotDrawn)} == {1}
        assert network.seen(name, PlanReady) == []
        assert asked_for(network, name) <= {plan.classes}
    assert {sha256 for sha256, _ in sent_chunks(network)} == {plan.classes, *map(digest, own.values())}


@given(fates, st.floats(0.0, 6.0))
@settings(deadline=None, max_examples=80)
def test_the_newest_rounds_own_adapter_is_the_start_however_late_the_last_rounds_comes(new_network, schedule, pause):
    network = new_network("a", "b", fates=schedule, max_packet=SMALL_PACKETS)
    open_round(network, {"a": 1, "b": 2})
    network.pass_time(pause)
    plan = open_round(network, {"a": 3, "b": 1}, number=2)
    network.run(lambda: all({e.plan.round for e in network.seen(name, PlanReady)} >= {2} for name in "ab"))
    network.pass_time(65.0)
    for name, seed in {"a": 3, "b": 1}.items():
        *earlier, last = network.seen(name, PlanReady)
        check_ready(last, plan, seed)
        assert [event.plan.round for event in earlier] in ([], [1])


@given(fates, st.floats(0.0, 4.0))
@settings(deadline=None, max_examples=40)
def test_who_joins_in_the_middle_of_a_round_gets_its_own(new_network, schedule, pause):
    network = new_network("a", "late", fates=schedule, max_packet=SMALL_PACKETS)
    network.restart("late", ClientEnd("fed", "late", random.Random(9)))
    plan = open_round(network, {"a": 1, "late": 2})
    network.pass_time(pause)
    network.restart("late", ClientEnd("fed", "late", random.Random(10)))
    network.events["late"].clear()
    network.connect("late")
    network.run(lambda: all(network.seen(name, PlanReady) for name in ("a", "late")))
    network.pass_time(65.0)
    for name, seed in {"a": 1, "late": 2}.items():
        (ready,) = network.seen(name, PlanReady)
        check_ready(ready, plan, seed)
    assert COMMON not in (1, 2)
    assert digest(COMMON) not in {sha256 for sha256, _ in sent_chunks(network)}


@given(
    fates,
    st.integers(0, 60),
    st.sampled_from([(None, SMALL_PACKETS), (SMALL_PACKETS, 2700), (2700, None)]),
    st.permutations(["coordinator", *"abcd"]),
)
@settings(deadline=None, max_examples=60)
def test_a_broker_of_another_limit_gets_own_adapters_cut_anew(new_network, schedule, steps, limits, order):
    """Also one that equals another client's, and one that equals the global adapter."""
    before, after = limits
    network = new_network("a", "b", "c", "d", fates=schedule, max_packet=before)
    own = {"a": 1, "b": 2, "c": 1, "d": COMMON}
    plan = open_round(network, own)
    for _ in range(steps):
        network.step()
    network.published.clear()
    network.replace_broker(after, *order)
    network.run(lambda: all(network.seen(name, PlanReady) for name in own))
    network.pass_time(65.0)
    for name, seed in own.items():
        (ready,) = network.seen(name, PlanReady)
        check_ready(ready, plan, seed)
    if after is not None:
        assert max(len(message.payload) + len(message.topic) for message in network.published) <= after
    expected = (after or 1 << 30) - PACKET_MARGIN
    for name, seed in own.items():
        ref = own_manifests(network)[name].adapter
        assert ref == reference(encode_adapter(an_adapter(seed)), min(expected, 64 * 1024))


def own_manifests(network) -> dict[str, ClientAdapter]:
    """The newest own-adapter manifest of each client; all are retained."""
    newest: dict[str, ClientAdapter] = {}
    for message in network.published:
        address = parse(message.topic)
        if (address.direction, address.kind) == ("to", "adapter"):
            assert message.retain
            manifest = manifest_of(message)
            assert isinstance(manifest, ClientAdapter)
            newest[str(address.client)] = manifest
    return newest


def test_own_adapters_are_announced_retained_before_the_plan_and_again_after_a_reconnection(new_network):
    network = new_network("a", "b")
    open_round(network, {"b": 2, "a": 1})
    topics = [message.topic for message in network.published if message.retain and "/from/" not in message.topic]
    own = [TOPICS.to("a", "adapter"), TOPICS.to("b", "adapter")]
    assert topics == [TOPICS.broadcast("classes"), *own, TOPICS.broadcast("round")]
    assert {name: manifest.adapter.sha256 for name, manifest in own_manifests(network).items()} == {
        "a": digest(1),
        "b": digest(2),
    }
    network.published.clear()
    network.connect("coordinator")
    again = [message.topic for message in network.published if message.retain]
    assert again == [*own, TOPICS.broadcast("classes"), TOPICS.broadcast("round")]


def test_equal_adapters_are_served_once_for_all(new_network):
    network = new_network("a", "b", "c", "d", max_packet=SMALL_PACKETS)
    own = {"a": 1, "b": 1, "c": COMMON, "d": 2}
    open_round(network, own)
    blobs = [serve.ref.sha256 for serve in network.ends["coordinator"]._serves.values()]
    assert len(blobs) == len(set(blobs)) == 4
    network.run(lambda: all(network.seen(name, PlanReady) for name in own))
    network.pass_time(10.0)
    assert {network.seen(name, PlanReady)[0].base for name in own} == {digest(1), digest(COMMON), digest(2)}
    times = Counter(sent_chunks(network))
    assert {sha256 for sha256, _ in times} >= {digest(1), digest(COMMON), digest(2)}
    assert set(times.values()) == {1}


def test_the_last_rounds_own_adapters_are_no_longer_served(new_network):
    network = new_network()
    open_round(network, {"a": 1, "b": 2})
    open_round(network, {"a": 3, "b": 1}, number=2)
    coordinator = network.ends["coordinator"]
    for seed, count in ((2, 0), (1, 1), (3, 1), (COMMON, 1)):
        need = Need(sha256=digest(seed), missing=to_bitmap({0}, 1))
        coordinator.handle(Said(TOPICS.from_("a", "need"), need, sender="a").delivery(), network.now)
        assert len(coordinator.tick(network.now + 1.0, 99)) == count


def test_a_round_for_all_from_the_global_adapter_follows_one_with_own_adapters(new_network):
    network = new_network("a")
    open_round(network, {"a": 1})
    network.run(lambda: network.seen("a", PlanReady))
    coordinator = network.ends["coordinator"]
    bank, actions = coordinator.publish_bank(a_bank())
    network.do("coordinator", actions)
    plan = a_plan(coordinator.serve_adapter(an_adapter(COMMON)), bank, 2, ("a",), individual=False)
    network.do("coordinator", coordinator.publish_plan(plan))
    network.run(lambda: len(network.seen("a", PlanReady)) == 2)
    check_ready(network.seen("a", PlanReady)[1], plan, COMMON)


def test_a_restarted_coordinators_plan_is_ready_again_without_a_second_fetch(new_network):
    network = new_network("a", max_packet=SMALL_PACKETS)
    open_round(network, {"a": 1})
    network.run(lambda: network.seen("a", PlanReady))
    network.restart("coordinator", CoordinatorEnd("fed", random.Random(1)))
    network.published.clear()
    network.connect("coordinator")
    plan = open_round(network, {"a": 1}, start=2)
    network.run(lambda: len(network.seen("a", PlanReady)) == 2)
    check_ready(network.seen("a", PlanReady)[1], plan, 1)
    assert sent_chunks(network) == []


def test_an_uninvited_client_fetches_no_adapter_not_even_the_last_rounds_own(new_network):
    network = new_network("a", "b")
    open_round(network, {"a": 1, "b": 2})
    network.run(lambda: all(network.seen(name, PlanReady) for name in "ab"))
    network.published.clear()
    plan = open_round(network, {"a": 3}, number=2, common=4)
    network.restart("new", ClientEnd("fed", "new", random.Random(5)))
    network.events["new"] = []
    network._filters["new"] = set()
    network.connect("b", "new")
    network.run(lambda: len(network.seen("a", PlanReady)) == 2)
    network.pass_time(65.0)
    assert {event.plan for event in network.seen("b", NotDrawn)} == {plan} == {e.plan for e in network.seen("new", NotDrawn)}
    assert len(network.seen("b", PlanReady)) == 1
    assert network.seen("new", PlanReady) == []
    assert asked_for(network, "b") == set()
    assert asked_for(network, "new") == {plan.classes}


def test_a_client_that_is_not_drawn_stops_fetching_the_last_rounds_adapter(new_network):
    network = new_network("a", "b")
    open_round(network, {"a": 1, "b": 2})
    network.run(lambda: digest(2) in asked_for(network, "b"))
    open_round(network, {"a": 3}, number=2)
    network.run(lambda: network.seen("b", NotDrawn))
    network.published.clear()
    network.pass_time(200.0)
    assert asked_for(network, "b") == set()


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


def own_adapter(seed: int, number: int = 2, run: str = "run-1") -> Said:
    ref = reference(encode_adapter(an_adapter(seed)), MIN_CHUNK_SIZE)
    return Said(TOPICS.to("a", "adapter"), ClientAdapter(run=run, round=number, adapter=ref))


BANK_BLOB = encode_bank(a_bank())
BANK_REF = reference(BANK_BLOB, MIN_CHUNK_SIZE)
PLAN = a_plan(reference(encode_adapter(an_adapter(COMMON)), MIN_CHUNK_SIZE), BANK_REF, 2, ("a",))
MANIFESTS = {
    "classes": Said(TOPICS.broadcast("classes"), ClassBankManifest(version=1, blob=BANK_REF)),
    "round": Said(TOPICS.broadcast("round"), PLAN),
    "adapter": own_adapter(1),
}


def new_client() -> ClientEnd:
    end = ClientEnd("fed", "a", random.Random(0))
    end.handle(Connected(None), 0.0)
    return end


def give(end: ClientEnd, *deliveries: Delivery | Said) -> list:
    return [event for delivery in deliveries for event in end.handle(delivered(delivery), 1.0)[1]]


def needs(end: ClientEnd) -> set[str]:
    """What the client asks for once all that it waits with has become due."""
    manifests = [manifest_of(action) for action in end.tick(1e6, 8) if isinstance(action, Publish)]
    return {need.sha256 for need in manifests if isinstance(need, Need)}


def chunks(blob: bytes) -> list[Delivery]:
    ref = reference(blob, MIN_CHUNK_SIZE)
    pieces = (blob[index * MIN_CHUNK_SIZE : (index + 1) * MIN_CHUNK_SIZE] for index in range(ref.chunks))
    return [Delivery(TOPICS.blob(ref.sha256, index), data) for index, data in enumerate(pieces)]


OWN_CHUNKS = chunks(encode_adapter(an_adapter(1)))


@pytest.mark.parametrize("order", list(itertools.permutations(MANIFESTS)))
@pytest.mark.parametrize("times", [1, 2])
def test_manifests_may_come_in_any_order_and_twice(order, times):
    end = new_client()
    for kind in order:
        assert give(end, *[MANIFESTS[kind]] * times) == []
    assert needs(end) == {digest(1), BANK_REF.sha256}
    assert give(end, *chunks(BANK_BLOB), *OWN_CHUNKS[:-1]) == []
    (ready,) = give(end, OWN_CHUNKS[-1])
    check_ready(ready, PLAN, 1)
    assert give(end, *(MANIFESTS[kind] for kind in order), *OWN_CHUNKS) == []
    assert needs(end) == set()


STRANGE = {
    "of-an-older-round": own_adapter(2, number=1),
    "of-another-run": own_adapter(2, run="run-0"),
    "for-another-client": Said(
        TOPICS.to("b", "adapter"),
        ClientAdapter(run="run-1", round=2, adapter=reference(encode_adapter(an_adapter(2)))),
    ),
    "by-another-sender": Said(
        TOPICS.to("a", "adapter"),
        ClientAdapter(run="run-1", round=2, adapter=reference(encode_adapter(an_adapter(2)))),
        sender="b",
    ),
    "of-another-federation": Said(
        TOPICS.to("a", "adapter"),
        ClientAdapter(run="run-1", round=2, adapter=reference(encode_adapter(an_adapter(2)))),
        federation="other",
    ),
    "said-by-the-client-itself": Said(
        TOPICS.from_("a", "adapter"),
        ClientAdapter(run="run-1", round=2, adapter=reference(encode_adapter(an_adapter(2)))),
        sender="a",
    ),
    "that-is-a-plan": Said(TOPICS.to("a", "adapter"), PLAN.model_copy(update={"round": 3})),
    "that-is-noise": Delivery(TOPICS.to("a", "adapter"), b"\xff" * 40),
}


@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
def test_an_own_adapter_that_is_not_this_rounds_for_this_client_is_not_followed(strange, moment):
    """Before everything, before the right one, after it, and after half of it has arrived."""
    end = new_client()
    events = []
    steps = [
        [MANIFESTS["classes"], *chunks(BANK_BLOB), MANIFESTS["round"]],
        [MANIFESTS["adapter"]],
        OWN_CHUNKS[:2],
        OWN_CHUNKS[2:],
    ]
    for number, step in enumerate(steps):
        if number == moment:
            events += give(end, strange)
            assert digest(2) not in needs(end)
        events += give(end, *step)
    assert len(events) == 1
    check_ready(events[0], PLAN, 1)
    assert give(end, strange) == []
    assert needs(end) == set()


@pytest.mark.parametrize("individual", [True, False])
@pytest.mark.parametrize("number", [1, 2])
def test_an_own_adapter_that_comes_after_a_plan_without_this_client_is_not_fetched(individual, number):
    others = PLAN.model_copy(update={"participants": ("b",), "individual": individual})
    end = new_client()
    events = give(end, MANIFESTS["classes"], *chunks(BANK_BLOB), Said(TOPICS.broadcast("round"), others))
    assert events == [NotDrawn(others)]
    assert give(end, own_adapter(1, number), *OWN_CHUNKS, *chunks(encode_adapter(an_adapter(COMMON)))) == []
    assert needs(end) == set()


def test_without_its_own_adapter_a_participant_asks_for_none():
    end = new_client()
    give(end, MANIFESTS["classes"], *chunks(BANK_BLOB), MANIFESTS["round"], STRANGE["of-an-older-round"])
    assert needs(end) == set()
    assert give(end, *chunks(encode_adapter(an_adapter(COMMON)))) == []


def test_a_client_listens_to_its_own_manifests_only():
    actions, _ = ClientEnd("fed", "a", random.Random(0)).handle(Connected(None), 0.0)
    wanted = [action.filter for action in actions if isinstance(action, Subscribe)]
    assert [name for name in wanted if "/to/" in name] == [TOPICS.to("a", "+")]


def test_adapters_that_lie_in_files_are_served_from_there_chunk_by_chunk(tmp_path):
    end, blobs = CoordinatorEnd("fed", random.Random(0)), Blobs(tmp_path)
    end.handle(Connected(SMALL_PACKETS), 0.0)
    in_memory, blob = an_adapter(5), encode_adapter(an_adapter(4))
    on_disk = StoredAdapter(blobs.path(blobs.put(blob)), blob)
    own = end.serve_client_adapters("run-1", 1, {"ann": on_disk, "bob": in_memory})
    assert own["ann"].adapter == reference(blob, own["ann"].adapter.chunk_size)
    held = {type(serve.blob) for serve in end._serves.values()}
    assert held == {KeptBlob, bytes}
    end.handle(Connected(2 * SMALL_PACKETS), 0.0)  # another broker: cut anew
    serve = end._serves[own["ann"].adapter.sha256]
    assert serve.ref.chunks < own["ann"].adapter.chunks
    serve.need(to_bitmap(set(range(serve.ref.chunks)), serve.ref.chunks), 0.0)
    chunks = serve.take(1000, 1.0)
    assert b"".join(data for _, data in chunks) == blob
    blobs.remove(own["ann"].adapter.sha256)  # its round is long over
    serve.need(to_bitmap({0}, serve.ref.chunks), 100.0)
    serve.landed()
    assert serve.take(1000, 200.0) == []
