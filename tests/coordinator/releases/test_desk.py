"""The desk at work: a real Mosquitto, a real journal, and devices that end a release as they are told to."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coordinator.config import CoordinatorConfig
from coordinator.errors import FederationError, NotKeptError
from coordinator.releases import desk as desk_module
from coordinator.releases.book import Book
from coordinator.releases.desk import desk, take_desk, work
from coordinator.releases.summary import Summary, summary
from protocol.bus import Delivery, Publish, Subscribe
from protocol.link import Link
from protocol.messages import CHUNK_SIZE
from protocol.mqtt import MqttBus
from protocol.release import desk_end as desk_end_module
from protocol.release.manifests import Release, Report
from protocol.release.rings import place
from protocol.settings import BrokerSettings
from protocol.topics import Topics, parse
from protocol.trust.gate import Pinned
from protocol.trust.signing import Signer, public_key_of
from tests.conftest import wait_until
from tests.coordinator.releases.conftest import Lab
from tests.follower import Follower, Outcome, badly, mute, well

TOPICS = Topics("lab")
NAMES = [f"jetson-{number}" for number in range(12)]


class Fleet:
    """Devices, the desk, and somebody who counts what the broker carries."""

    def __init__(self, folder: Path, url: str, admission: str = "open") -> None:
        self.lab = Lab(folder)
        self.url = url
        broker = BrokerSettings(url=url)
        self.config = CoordinatorConfig(
            federation="lab", classes=("x", "y"), state=self.lab.state, broker=broker, admission=admission
        )
        self.followers: dict[str, Follower] = {}
        self.links: dict[str, Link[object]] = {}
        self.tap = MqttBus.open(broker, "tap")
        self.tap.do(Subscribe("clipcast/1/lab/blob/+/+"))
        self.tap.do(Subscribe("clipcast/1/lab/release"))
        self.chunks: Counter[str] = Counter()
        self.percents: list[float] = []
        self._desk: tuple[threading.Thread, threading.Event] | None = None
        self._problems: list[BaseException] = []

    def join(self, *names: str, outcome: Outcome = well, profile: str | None = None) -> None:
        for name in names:
            bus = MqttBus.open(BrokerSettings(url=self.url), f"lab:{name}:answers")
            self.followers[name] = Follower("lab", name, outcome, profile)
            self.followers[name].gate._trust = Pinned(self.lab.folder / name, public_key_of(self.lab.state))
            self.links[name] = Link(bus, self.followers[name])

    def start(self) -> None:
        stop = threading.Event()
        thread = threading.Thread(target=self._work, args=(stop,), daemon=True)
        thread.start()
        self._desk = thread, stop

    def _work(self, stop: threading.Event) -> None:
        try:
            work(self.config, stop)
        except BaseException as error:
            self._problems.append(error)
            raise

    def stop(self) -> None:
        if self._desk is not None:
            thread, stop = self._desk
            stop.set()
            thread.join(30)
            assert not thread.is_alive()
            self._desk = None

    def poll(self) -> None:
        for link in self.links.values():
            link.poll(0.0)
        while (event := self.tap.receive(0.0)) is not None:
            if isinstance(event, Delivery) and parse(event.topic).kind == "blob":
                self.chunks[event.topic] += 1
        assert not self._problems

    def until(self, condition: Callable[[Summary], object], what: str, deadline_s: float = 60.0) -> Summary:
        def polled() -> bool:
            self.poll()
            found = summary(self.lab.book, self.lab.store.registry)
            return found is not None and bool(condition(found))

        wait_until(polled, deadline_s, what)
        return self.summary

    @property
    def summary(self) -> Summary:
        found = summary(self.lab.book, self.lab.store.registry)
        assert found is not None
        return found

    def known(self, number: int) -> None:
        """Wait until so many devices have reported."""

        def polled() -> bool:
            self.poll()
            return len(self.lab.book.reports()) >= number

        wait_until(polled, 60, f"{number} devices to report")

    def close(self) -> None:
        self.stop()
        with ThreadPoolExecutor(16) as pool:  # each takes up to a second
            list(pool.map(lambda bus: bus.close(), [self.tap, *(link.bus for link in self.links.values())]))
        self.lab.close()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A desk that looks more often, so that nobody waits for it."""
    for name, seconds in {"LOOK_S": 0.1, "POLL_S": 0.1, "AGE_S": 0.5, "AGAIN_S": 0.2}.items():
        monkeypatch.setattr(desk_module, name, seconds)
    monkeypatch.setattr(desk_end_module, "GATHER_S", 0.2)
    monkeypatch.setattr(desk_end_module, "REST_S", 0.5)


@pytest.fixture
def new_fleet(tmp_path: Path, mosquitto: Callable[..., str]) -> Iterator[Callable[..., Fleet]]:
    made: list[Fleet] = []

    def make(admission: str = "open") -> Fleet:
        made.append(Fleet(tmp_path, mosquitto(), admission))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()


def complete(found: Summary) -> bool:
    return found.state == "complete"


def test_twelve_devices_take_a_release_ring_after_ring(new_fleet) -> None:
    fleet = new_fleet()
    fleet.start()
    fleet.join(*NAMES)
    fleet.known(12)
    entry = fleet.lab.make(size=300_000)
    first = min(NAMES, key=lambda name: place(1, name))
    found = fleet.until(lambda found: found.entry.rollout.ring > 0, "the first ring")
    assert found.entry.rollout.release.devices == (first,)
    found = fleet.until(complete, "all rings")
    fleet.until(lambda found: len(found.census.committed) == 12, "all")
    assert found.phases == {"committed": 12}
    assert all(follower.report.running == 1 for follower in fleet.followers.values())
    model = (fleet.lab.folder / "model.onnx").read_bytes()
    assert all(follower.blobs == {entry.rollout.release.artefact.sha256: model} for follower in fleet.followers.values())


def test_a_model_that_does_badly_reaches_one_device_and_no_more(new_fleet) -> None:
    fleet = new_fleet()
    fleet.start()
    fleet.join(*NAMES, outcome=badly)
    fleet.known(12)
    fleet.lab.make()
    found = fleet.until(lambda found: found.state == "paused", "it to stop")
    assert (found.entry.rollout.reason, found.entry.rollout.ring, len(found.census.failed)) == ("ring-failed", 0, 1)
    (line,) = [line for line in found.devices if line.part == "failed"]
    assert line.report.reason == "slow"
    assert (
        sum(follower.release is not None and follower.report.phase != "idle" for follower in fleet.followers.values()) == 1
    )
    # An operator who goes on all the same takes the next device, where it stops again.
    fleet.lab.orders.resume()
    found = fleet.until(lambda found: found.state == "paused", "it to stop again")
    assert (len(found.census.failed), len(found.census.excused), found.entry.rollout.ring) == (1, 1, 0)


def test_a_later_ring_stops_above_the_share(new_fleet) -> None:
    fleet = new_fleet()
    fleet.start()
    order = sorted(NAMES, key=lambda name: place(1, name))
    fleet.join(*order[:6])
    fleet.join(*order[6:], outcome=badly)
    fleet.known(12)
    fleet.lab.make(rings="2,100%")
    found = fleet.until(lambda found: found.state == "paused", "it to stop")
    assert (found.entry.rollout.reason, found.entry.rollout.ring) == ("ring-failed", 1)
    assert found.census.failure_share > 0.2


def test_paused_resumed_and_aborted(new_fleet) -> None:
    fleet = new_fleet()
    fleet.start()
    fleet.join(*NAMES[:4])
    fleet.known(4)
    fleet.stop()  # a desk that looks between the two orders would let them all switch
    fleet.lab.make(rings="100%", size=200_000)
    fleet.lab.orders.pause()
    fleet.start()
    fleet.until(lambda found: len(found.census.waiting) == 4 and found.phases == {"staged": 4}, "all to stage it and wait")
    assert all(follower.report.running == 0 for follower in fleet.followers.values())
    fleet.lab.orders.abort()
    fleet.until(lambda found: found.phases == {"rolled-back": 4}, "all to go back")
    assert {follower.report.reason for follower in fleet.followers.values()} == {"aborted"}
    fleet.lab.make("second.onnx")
    fleet.lab.orders.pause()
    fleet.lab.orders.resume()
    fleet.until(complete, "the next one")
    third = fleet.lab.make("third.onnx")
    fleet.until(lambda found: found.entry.number == third.number and complete(found), "the one after")
    fleet.lab.orders.rollback()
    fleet.until(lambda found: found.entry.rollout.release.rollback and len(found.census.committed) == 4, "all to go back")
    assert all(follower.report.running == 2 for follower in fleet.followers.values())


def test_a_desk_that_was_stopped_in_the_middle_goes_on_when_it_is_back(new_fleet) -> None:
    fleet = new_fleet()
    fleet.start()
    order = sorted(NAMES[:6], key=lambda name: place(1, name))
    fleet.join(*order)
    fleet.known(6)
    fleet.lab.make(size=2_000_000, rings="1,100%")
    fleet.until(lambda found: found.entry.rollout.ring == 1, "the second ring")
    fleet.stop()
    before = fleet.lab.book.newest()
    assert before is not None
    assert before.rollout.release.percent == 100.0
    fleet.start()
    found = fleet.until(complete, "the rest")
    assert found.entry.rollout.release.devices == (order[0],)
    assert found.entry.age >= before.age > 0


def test_a_silent_device_does_not_keep_the_others_waiting_for_ever(new_fleet) -> None:
    fleet = new_fleet()
    fleet.start()
    order = sorted(NAMES[:5], key=lambda name: place(1, name))
    fleet.join(*order[:4])
    fleet.join(order[4], outcome=mute)
    fleet.known(5)
    fleet.lab.make(rings="1,100%", timeout_s=4.0)
    found = fleet.until(complete, "all rings")
    assert len(found.census.committed) == 4
    assert found.census.silent == (order[4],)


def test_a_device_that_was_revoked_is_not_waited_for(new_fleet) -> None:
    fleet = new_fleet()
    fleet.start()
    order = sorted(NAMES[:3], key=lambda name: place(1, name))
    fleet.join(*order[:2])
    fleet.join(order[2], outcome=mute)
    fleet.known(3)
    fleet.lab.make(rings="1,100%")
    fleet.until(lambda found: found.census.waiting == (order[2],) and len(found.census.committed) == 2, "the others")
    fleet.lab.store.registry.revoke(order[2])
    found = fleet.until(complete, "all rings")
    assert order[2] not in {line.device for line in found.devices}


def test_only_registered_devices_are_heard_where_admission_is_by_hand(new_fleet) -> None:
    fleet = new_fleet("registered")
    fleet.join("known", "stranger")
    fleet.lab.store.registry.add("known", fleet.followers["known"].signer.public)
    fleet.start()
    fleet.known(1)
    fleet.lab.make(rings="100%")
    found = fleet.until(complete, "all rings")
    assert [line.device for line in found.devices] == ["known"]
    assert fleet.lab.book.reports().keys() == {"known"}
    assert fleet.followers["stranger"].release is not None  # it has heard, and wants in vain
    assert fleet.lab.store.registry.devices().keys() == {"known"}


def test_a_report_with_another_key_is_not_believed(new_fleet) -> None:
    fleet = new_fleet()
    fleet.start()
    fleet.join("jetson-1", outcome=mute)
    fleet.known(1)
    fleet.lab.make(rings="100%")
    fleet.until(lambda found: found.phases == {"trying": 1}, "the device to try")
    forged = Report(running=1, release=1, phase="committed")
    enemy = MqttBus.open(BrokerSettings(url=fleet.url), "enemy")
    enemy.do(Publish(TOPICS.from_("jetson-1", "report"), Signer().seal("lab", "jetson-1", forged), retain=True))
    fleet.join("jetson-2")  # whose word comes after the forged one, and is heard
    fleet.until(lambda found: found.census.committed == ("jetson-2",), "the other")
    assert fleet.summary.census.waiting == ("jetson-1",)
    enemy.close()


def test_profiles_that_it_is_not_for_hear_nothing_of_it(new_fleet) -> None:
    fleet = new_fleet()
    fleet.start()
    fleet.join(*NAMES[:2], profile="nano")
    fleet.join(*NAMES[2:4], profile="orin")
    fleet.known(4)
    fleet.lab.make(profiles=("nano",))
    found = fleet.until(complete, "all rings")
    assert found.census.committed == tuple(NAMES[:2])
    assert [fleet.followers[name].report.phase for name in NAMES[2:4]] == ["idle", "idle"]


def test_thirty_megabytes_to_three_devices_are_published_once(new_fleet) -> None:
    fleet = new_fleet()
    fleet.start()
    fleet.join(*NAMES[:3])
    fleet.known(3)
    fleet.lab.make(rings="100%", size=30_000_000)
    fleet.until(lambda found: len(found.census.committed) == 3, "three devices", 240)
    assert len(fleet.chunks) == -(-30_000_000 // CHUNK_SIZE)
    assert set(fleet.chunks.values()) == {1}


def test_a_second_desk_is_refused_and_a_thread_of_one_stands_by(new_fleet, caplog: pytest.LogCaptureFixture) -> None:
    fleet = new_fleet()
    fleet.lab.make(rings="100%")
    fleet.start()
    fleet.until(lambda found: found.entry.age > 0, "the first desk")
    with pytest.raises(FederationError, match="another desk is at work"):
        work(fleet.config, threading.Event())
    with desk(fleet.config):
        wait_until(lambda: "another desk is at work" in caplog.text, what="the second one to see it")
        fleet.join("jetson-1")
        fleet.until(complete, "the release")
        fleet.stop()
        second = fleet.lab.make("second.onnx", rings="100%")
        fleet.until(lambda found: found.entry.number == second.number and complete(found), "the second desk to take over")
    assert caplog.text.count("another desk is at work") == 1
    lock = take_desk(fleet.lab.state)
    assert lock is not None
    lock.close()


def test_a_journal_that_is_away_for_a_moment_costs_time_and_nothing_else(
    new_fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = new_fleet()
    fleet.start()
    fleet.join(*NAMES[:3])
    fleet.known(3)
    fleet.lab.make(rings="1,100%")
    failed = []

    def away(method: Callable[..., object]) -> Callable[..., object]:
        def tried(*arguments: object) -> object:
            if len(failed) < 4:
                failed.append(1)
                raise NotKeptError("the journal is away")
            return method(*arguments)

        return tried

    monkeypatch.setattr(Book, "change", away(Book.change))
    monkeypatch.setattr(Book, "keep", away(Book.keep))
    fleet.until(complete, "all rings")
    assert len(failed) == 4
    assert "the journal is away" in caplog.text


def test_a_blob_that_is_damaged_is_not_announced_until_it_is_whole(
    new_fleet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(desk_module, "BLOBS_AGAIN_S", 0.5)
    fleet = new_fleet()
    entry = fleet.lab.make(rings="100%")
    path = fleet.lab.blobs.path(entry.rollout.release.artefact.sha256)
    whole = path.read_bytes()
    path.write_bytes(b"?" * len(whole))
    fleet.join("jetson-1")
    fleet.start()
    wait_until(lambda: fleet.poll() or "is damaged" in caplog.text, what="the desk to say it")
    fleet.known(1)
    assert fleet.followers["jetson-1"].release is None
    path.write_bytes(whole)
    fleet.until(complete, "the release")


def test_a_report_that_the_broker_repeats_makes_no_device_recent(new_fleet) -> None:
    """After a restart of the desk the broker gives out what it has kept, of devices that are long gone too."""
    fleet = new_fleet()
    fleet.start()
    fleet.join("gone", "here")
    fleet.known(2)
    fleet.stop()
    fleet.links.pop("gone").bus.close()
    fleet.start()
    fleet.followers["here"].said.again()
    fleet.lab.make(rings="2,100%")
    fleet.until(lambda found: found.entry.rollout.release.devices, "a device to be named")
    found = fleet.until(lambda found: found.census.committed, "the device that is here")
    assert found.entry.rollout.release.devices == ("here",)


def test_the_manifest_of_an_open_release_is_retained_for_who_comes_later(new_fleet) -> None:
    fleet = new_fleet()
    fleet.start()
    fleet.join("early")
    fleet.known(1)
    fleet.lab.make(rings="100%")
    fleet.until(complete, "the release")
    fleet.join("late")
    found = fleet.until(lambda found: len(found.census.committed) == 2, "the one that came later")
    assert isinstance(fleet.followers["late"].release, Release)
    assert found.entry.rollout.complete
