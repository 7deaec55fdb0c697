"""The desk's end against devices' ends, over a broker in virtual time that loses, doubles and delays what it likes."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.bus import Connected, Delivery, MemoryBroker, Publish
from protocol.coordinator_end import CoordinatorEnd
from protocol.envelope import COORDINATOR, decode
from protocol.errors import BusError, WireError
from protocol.events import Cloned
from protocol.link import Link
from protocol.messages import CHUNK_SIZE, BlobRef, LargeBlobRef, Need, Status
from protocol.release.desk_end import DeskEnd, Reported
from protocol.release.manifests import Release, Report, Smoke, Want
from protocol.storage.at_rest import KeptBlob
from protocol.topics import Topics, parse
from protocol.transfer.exchange import to_bitmap
from protocol.trust import succession
from protocol.trust.gate import FirstUse
from protocol.trust.signing import Signer, opened, public_key_of, signer_of
from tests.follower import Follower
from tests.network import Network

TOPICS = Topics("fed")
SMALL_PACKETS = 1600  # chunks of 1088 bytes
fates = st.lists(st.sampled_from(["deliver", "lose", "twice", "late"]), max_size=150)


class Shelf:
    """A release's blobs in files, random bytes of these sizes."""

    def __init__(self, folder: Path, artefact: int, classes: int = 0) -> None:
        rng = random.Random(artefact)
        self.blobs: dict[str, KeptBlob] = {}
        refs = []
        for size in filter(None, (artefact, classes)):
            data = rng.randbytes(size)
            digest = hashlib.sha256(data).hexdigest()
            (folder / digest).write_bytes(data)
            self.blobs[digest] = KeptBlob(folder / digest, size)
            refs.append((digest, size))
        (digest, size), *others = refs
        self.release = Release(
            version=3,
            artefact=LargeBlobRef(sha256=digest, size=size),
            classes=BlobRef(sha256=others[0][0], size=others[0][1]) if others else None,
            smoke=Smoke(picture="AAAA", label="fox", embedding="AAAA"),
        )

    def bytes_of(self, digest: str) -> bytes:
        return self.blobs[digest].path.read_bytes()


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("blobs"), 30_000, 3_000)


def a_network(*devices: str, schedule=(), max_packet: int | None = SMALL_PACKETS) -> Network:
    ends = {"desk": DeskEnd("fed", random.Random(0)), **{name: Follower("fed", name) for name in devices}}
    network = Network(ends, schedule, max_packet)
    network.connect()
    return network


def announce(network: Network, shelf: Shelf, **changed: object) -> None:
    release = shelf.release.model_copy(update=changed)
    network.do("desk", network.ends["desk"].announce(release, shelf.blobs))


def reports(network: Network, device: str) -> list[Report]:
    return [event.report for event in network.seen("desk", Reported) if event.client == device]


def chunks(network: Network) -> Counter[str]:
    return Counter(message.topic for message in network.published if parse(message.topic).kind == "blob")


def on(topic: str, manifest, signer: Signer, sender: str) -> Delivery:
    return Delivery(topic, signer.seal("fed", sender, manifest))


@given(fates, st.integers(1, 3), st.booleans())
@settings(deadline=None, max_examples=40)
def test_a_release_comes_whole_whatever_the_network_loses(shelf: Shelf, schedule, devices, reconnect) -> None:
    names = "abc"[:devices]
    network = a_network(*names, schedule=schedule)
    announce(network, shelf)
    if reconnect:
        network.pass_time(2.0)
        network.connect()
    network.run(lambda: all(Report(running=3, release=3, phase="committed") in reports(network, name) for name in names))
    for name in names:
        follower = network.ends[name]
        assert {digest: follower.blobs[digest] for digest in shelf.blobs} == {
            digest: shelf.bytes_of(digest) for digest in shelf.blobs
        }
        assert follower.release.model_copy(
            update={"artefact": shelf.release.artefact, "classes": shelf.release.classes}
        ) == (shelf.release)


def test_each_chunk_is_published_once_for_devices_that_ask_a_little_apart(shelf: Shelf) -> None:
    network = a_network("a", "b", "c")
    network.cut("c")
    announce(network, shelf)
    network.pass_time(0.5)
    network.connect("c")
    network.run(
        lambda: all(reports(network, name)[-1:] == [Report(running=3, release=3, phase="committed")] for name in "abc")
    )
    assert set(chunks(network).values()) == {1}
    assert len(chunks(network)) == sum(-(-blob.size // 1088) for blob in shelf.blobs.values())


def test_one_that_asks_in_the_middle_brings_no_chunk_twice_but_those_it_missed(shelf: Shelf) -> None:
    network = a_network("a", "late")
    network.cut("late")
    announce(network, shelf)
    network.run(lambda: sum(chunks(network).values()) >= 20)
    before = dict(chunks(network))
    network.connect("late")
    network.run(lambda: reports(network, "late")[-1:] == [Report(running=3, release=3, phase="committed")])
    twice = {topic for topic, times in chunks(network).items() if times > 1}
    assert twice <= before.keys()
    assert set(chunks(network).values()) <= {1, 2}


def test_thirty_megabytes_travel_once_to_three_devices_over_a_bus(tmp_path: Path) -> None:
    shelf, broker = Shelf(tmp_path, 30_000_000), MemoryBroker()
    counted: Counter[str] = Counter()
    route = broker.route
    broker.route = lambda message: (counted.update([message.topic]), route(message))[1]  # type: ignore[method-assign]
    now = [0.0]

    def clock() -> float:
        return now[0]

    followers = [Follower("fed", name) for name in "abc"]
    ends = [DeskEnd("fed", random.Random(0)), *followers]
    links = [Link(broker.connect(), end, clock) for end in ends]
    for link in links:
        link.poll(0.0)
    links[0].do(ends[0].announce(shelf.release, shelf.blobs))
    for _ in range(10_000):
        now[0] += 0.05
        for link in links:
            while not link.bus.idle():
                link.poll(0.0)
            link.poll(0.0)
        if all(follower.report.phase == "committed" for follower in followers):
            break
    (digest,) = shelf.blobs
    said = {topic: times for topic, times in counted.items() if parse(topic).kind == "blob"}
    assert all(follower.blobs[digest] == shelf.bytes_of(digest) for follower in followers)
    assert len(said) == -(-30_000_000 // CHUNK_SIZE) == 458
    assert set(said.values()) == {1}


def test_blobs_are_cut_for_the_broker_and_the_manifest_says_so(shelf: Shelf) -> None:
    end = DeskEnd("fed", random.Random(0))
    end.announce(shelf.release, shelf.blobs)
    for limit, size in ((SMALL_PACKETS, 1088), (None, CHUNK_SIZE), (SMALL_PACKETS, 1088)):
        actions, _ = end.handle(Connected(limit), 1.0)
        (said,) = [action for action in actions if isinstance(action, Publish)]
        release = decode(opened(said.payload, signer_of(said.payload))).manifest
        assert isinstance(release, Release)
        assert {ref.chunk_size for ref in release.blobs} == {size}
        assert release.version == 3
        assert said.retain


def test_a_blob_that_no_broker_of_such_small_packets_can_carry_is_said(tmp_path: Path) -> None:
    digest = "ab" * 32
    release = Release(
        version=1,
        artefact=LargeBlobRef(sha256=digest, size=1 << 30),
        smoke=Smoke(picture="AAAA", label="fox", embedding="AAAA"),
    )
    end = DeskEnd("fed", random.Random(0))
    blobs = {digest: KeptBlob(tmp_path / "large", 1 << 30)}
    end.announce(release, blobs)
    with pytest.raises(BusError, match=r"packets of 1600 bytes only: a blob of 1073741824 bytes .* max_packet_size"):
        end.handle(Connected(SMALL_PACKETS), 1.0)
    with pytest.raises(WireError, match="cannot travel in chunks of 1088"):
        end.announce(release, blobs)


def test_it_is_said_again_after_a_reconnection_and_now_and_then(shelf: Shelf) -> None:
    network = a_network("a")
    announce(network, shelf)
    network.lose_retained()
    network.connect("desk", "a")
    network.run(lambda: reports(network, "a")[-1:] == [Report(running=3, release=3, phase="committed")])
    network.pass_time(100.0)
    topics = Counter(message.topic for message in network.published)
    assert 4 <= topics[TOPICS.broadcast("release")] <= 8


def test_another_release_takes_its_place_and_the_old_blobs_are_no_longer_served(shelf: Shelf, tmp_path: Path) -> None:
    network, other = a_network("a"), Shelf(tmp_path, 5_000)
    announce(network, shelf)
    network.run(lambda: reports(network, "a")[-1:] == [Report(running=3, release=3, phase="committed")])
    network.do("desk", network.ends["desk"].announce(other.release.model_copy(update={"version": 4}), other.blobs))
    network.run(lambda: reports(network, "a")[-1:] == [Report(running=4, release=4, phase="committed")])
    before = sum(chunks(network).values())
    want = Want(sha256=shelf.release.artefact.sha256, missing=to_bitmap({0}, 28))
    network.do("a", [network.ends["a"]._say(want)])
    network.pass_time(20.0)
    assert sum(chunks(network).values()) == before


def test_a_chunk_whose_file_is_gone_is_not_served_and_harms_nobody(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 5_000)
    network = a_network("a")
    announce(network, shelf)
    data = shelf.bytes_of(shelf.release.artefact.sha256)
    path = shelf.blobs[shelf.release.artefact.sha256].path
    path.unlink()
    network.pass_time(30.0)
    assert not chunks(network)
    path.write_bytes(data)
    network.run(lambda: reports(network, "a")[-1:] == [Report(running=3, release=3, phase="committed")])


def test_the_desk_hears_wants_and_reports_alone_and_the_coordinator_all_else() -> None:
    """A device's two processes are two instances: each end hears one of them, and quarantines nobody."""
    key = Signer()
    trainer, follower = (Signer(key._key) for _ in range(2))
    desk, coordinator = DeskEnd("fed", random.Random(0)), CoordinatorEnd("fed", random.Random(0))
    for number in range(8):
        said = [
            on(TOPICS.from_("a", "status"), Status(state="online"), trainer, "a"),
            on(TOPICS.from_("a", "report"), Report(running=number), follower, "a"),
            on(TOPICS.from_("a", "need"), Need(sha256="ab" * 32, missing="80"), trainer, "a"),
            on(TOPICS.from_("a", "want"), Want(sha256="ab" * 32, missing="80"), follower, "a"),
        ]
        heard = [[event for one in said for event in end.handle(one, float(number))[1]] for end in (desk, coordinator)]
        assert [type(event).__name__ for event in heard[0]] == ["Reported"]
        assert [type(event).__name__ for event in heard[1]] == ["ClientSeen"]
    assert not desk.gate.counts
    assert not coordinator.gate.counts


def test_two_devices_of_one_name_are_told_of() -> None:
    key, desk = Signer(), DeskEnd("fed", random.Random(0))
    events = []
    for number in range(6):
        copy = Signer(key._key, type("From", (), {"next": lambda _, number=number: number + 1})())
        copy._instance = f"{number % 2:016x}"
        events += desk.handle(on(TOPICS.from_("a", "report"), Report(running=1), copy, "a"), 1.0)[1]
    assert Cloned("a") in events


@pytest.mark.parametrize(
    ("topic", "sender", "verdict"),
    [
        (TOPICS.from_("a", "report"), "b", "wrong-topic"),
        (TOPICS.from_("a", "want"), "a", "wrong-topic"),  # a report where a want belongs
        (TOPICS.to("a", "report"), COORDINATOR, "wrong-topic"),
        (TOPICS.from_(COORDINATOR, "report"), COORDINATOR, "wrong-topic"),
        (Topics("other").from_("a", "report"), "a", "wrong-topic"),
        (TOPICS.from_("known", "report"), "known", "wrong-key"),
    ],
)
def test_what_is_not_a_devices_own_report_is_refused(topic: str, sender: str, verdict: str) -> None:
    desk = DeskEnd("fed", random.Random(0), trust=FirstUse({"known": Signer().public}))
    assert desk.handle(on(topic, Report(running=1), Signer(), sender), 1.0) == ([], [])
    assert desk.gate.counts == {verdict: 1}


def test_a_want_of_another_size_than_the_blob_changes_nothing(shelf: Shelf) -> None:
    desk = DeskEnd("fed", random.Random(0))
    desk.handle(Connected(SMALL_PACKETS), 0.0)
    desk.announce(shelf.release, shelf.blobs)
    want = Want(sha256=shelf.release.artefact.sha256, missing="ff")
    desk.handle(on(TOPICS.from_("a", "want"), want, Signer(), "a"), 1.0)
    assert desk.gate.counts == {"malformed": 1}
    assert not [action for action in desk.tick(9.0, 99) if parse(action.topic).kind == "blob"]


def test_a_desk_that_is_restarted_counts_on_and_leads_devices_to_a_new_key(tmp_path: Path, shelf: Shelf) -> None:
    first = public_key_of(tmp_path)
    network = a_network("a")
    network.ends["a"].gate._trust = FirstUse({COORDINATOR: first})
    network.restart("desk", DeskEnd("fed", random.Random(0), tmp_path))
    network.ends["desk"] = DeskEnd("fed", random.Random(0), tmp_path)
    network.connect()
    announce(network, shelf)
    network.run(lambda: network.ends["a"].release is not None)
    network.ends["desk"] = DeskEnd("fed", random.Random(0), tmp_path)
    network.connect("desk")
    announce(network, shelf, note="again")
    network.run(lambda: network.ends["a"].release.note == "again")
    assert not network.ends["a"].gate.counts

    new = succession.rotate(tmp_path, "fed")
    end = DeskEnd("fed", random.Random(0), tmp_path)
    actions, _ = end.handle(Connected(None), 1.0)
    (chain,) = [action.payload for action in actions if isinstance(action, Publish)]
    assert succession.newest(chain, "fed", first) == new == end._signer.public
    assert (tmp_path / "sequence").exists() is False  # the coordinator's numbers are its own
