"""The loop of a device: real models of tiny-clip, the desk's own end, and a broker in memory."""

from __future__ import annotations

import logging
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipcast.smoke import smoke_of
from edge_client.errors import InferenceError, NoModelError
from edge_client.inference.answering import Answering
from edge_client.inference.model import Model
from edge_client.inference.pictures import Pixels
from edge_client.inference.providers import Runtime
from edge_client.releases.follower import Follower
from edge_client.releases.live import Live, Shelf
from edge_client.releases.slots import Slots, State
from export.flavours import Flavour
from export.lora import adapter_file
from protocol.bus import Delivery, MemoryBroker, Publish, Subscribe
from protocol.codec import encode_bank
from protocol.link import Link
from protocol.messages import BlobRef, LargeBlobRef, TextBank
from protocol.release.desk_end import DeskEnd, Reported
from protocol.release.follower_end import FOLDER, FollowerEnd
from protocol.release.manifests import Health, Release, Report
from protocol.storage.at_rest import KeptBlob
from protocol.storage.large import LargePartial, file_sha256
from protocol.topics import Topics
from protocol.trust.gate import Pinned
from protocol.trust.signing import Signer
from tests.conftest import wait_until
from tests.edge_client.inference.exported import CLASSES
from tests.export.making import bank_of, trained_adapter

AT_ONCE = Health(window_s=0.01, min_answers=0)
TOPICS = Topics("lab")


class Lab:
    """A desk that announces what it is told, and one device that follows."""

    def __init__(self, folder: Path, models: dict[Flavour, Path], picture: Path) -> None:
        self.folder = folder
        self.models = models
        self.picture = picture
        self.broker = MemoryBroker()
        self.desk = DeskEnd("lab", random.Random(0))
        self.desk_link = Link(self.broker.connect(), self.desk)
        self.reports: list[Report] = []
        self.answering: Answering | None = None
        self._stops: list[Callable[[], None]] = []
        self._tamper: dict[str, Path] = {}

    def device(self, base: Path | None = None) -> Answering:
        """Start the device, or start it again."""
        slots = Slots(self.folder / "one" / FOLDER)
        live = Live(Follower("one", "generic-cpu", slots.load()), slots, Shelf(slots, base, None, Runtime()))
        self.live, self.answering = live, live.begin()
        trust = Pinned(self.folder / "one" / "coordinator.key", self.desk._signer.public)
        self.end = FollowerEnd("lab", "one", random.Random(1), self.folder / "one", trust)
        stop = threading.Event()
        thread = threading.Thread(target=live.run, args=(Link(self.broker.connect(), self.end), self.end, stop))
        thread.start()

        def end() -> None:
            stop.set()
            thread.join()

        self._stops.append(end)
        return self.answering

    def stop(self) -> None:
        while self._stops:
            self._stops.pop()()

    def ref(self, path: Path, kind: type[BlobRef] = BlobRef) -> BlobRef:
        return kind(sha256=file_sha256(path), size=path.stat().st_size)

    def release(
        self, version: int, artefact: Path, adapter: Path | None = None, bank: TextBank | None = None, **fields: object
    ) -> Release:
        refs: dict[str, BlobRef] = {"artefact": self.ref(artefact, LargeBlobRef)}
        paths = {refs["artefact"].sha256: artefact}
        if adapter is not None:
            refs["adapter"] = self.ref(adapter)
            paths[refs["adapter"].sha256] = adapter
        if bank is not None:
            path = self.folder / "classes"
            path.write_bytes(encode_bank(bank))
            refs["classes"] = self.ref(path)
            paths[refs["classes"].sha256] = path
        smoke = smoke_of(artefact, adapter, bank, self.picture, CLASSES)
        made = Release(version=version, **{"smoke": smoke, "health": AT_ONCE, **refs, **fields})  # type: ignore[arg-type]
        self.paths = {**paths, **self._tamper}
        return made

    def announce(self, release: Release) -> None:
        blobs = {digest: KeptBlob(path, path.stat().st_size) for digest, path in self.paths.items()}
        self.desk_link.do(self.desk.announce(release, blobs))

    def until(self, version: int, *phases: str) -> Report:
        """Move messages until the device says this of a version."""
        found: list[Report] = []

        def said() -> bool:
            for event in self.desk_link.poll(0.02):
                if isinstance(event, Reported):
                    self.reports.append(event.report)
                    if event.report.release == version and event.report.phase in phases:
                        found.append(event.report)
            return bool(found)

        wait_until(said, 60, f"{phases} of {version}, last {self.reports[-1:]}")
        return found[0]


@pytest.fixture
def lab(tmp_path: Path, models: dict[Flavour, Path], photograph: Pixels, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setattr("protocol.release.desk_end.GATHER_S", 0.05)  # nobody else asks
    monkeypatch.setattr("protocol.release.desk_end.REST_S", 0.05)

    picture = tmp_path / "picture.png"
    Image.fromarray(photograph[::8, ::8]).save(picture)
    made = Lab(tmp_path, models, picture)
    yield made
    made.stop()


def test_a_device_without_a_model_gets_its_first_by_a_release(lab: Lab, photograph: Pixels) -> None:
    answering = lab.device()
    with pytest.raises(NoModelError, match="there is no model yet"):
        answering.classify(photograph)
    lab.announce(lab.release(1, lab.models["int8"]))
    report = lab.until(1, "committed")
    assert (report.running, report.profile) == (1, "generic-cpu")
    assert answering.classify(photograph).version == 1
    # What is said to others on their way to it does not come here any more.
    wait_until(lambda: not any("/blob/" in wanted for bus in lab.broker._buses for wanted in bus.filters))
    assert next(r.phase for r in lab.reports if r.release == 1) in ("fetching", "staged", "trying")
    lab.stop()
    assert lab.device().classify(photograph).version == 1  # another process, without being told


def test_another_adapter_travels_alone_and_the_session_stays(lab: Lab, photograph: Pixels, tmp_path: Path) -> None:
    base, first = lab.models["adapter"], lab.models["adapter"].with_suffix(".onnx_adapter")
    answering = lab.device(base)
    lab.announce(lab.release(1, base, first))
    lab.until(1, "committed")
    one = answering.current()[0]
    assert one is not None
    bytes_before = sum(len(m) for m in lab.broker._retained.values())
    second = tmp_path / "second.onnx_adapter"
    digest = one.facts.model_digest
    second.write_bytes(adapter_file(trained_adapter("tiny-clip", seed=9, spread=0.05), 2.0, digest, 9))
    counted = lab.broker.connect()

    counted.do(Subscribe("clipcast/1/lab/blob/+/+"))
    lab.announce(lab.release(2, base, second))
    lab.until(2, "committed")
    travelled = 0
    while (event := counted.receive(0.01)) is not None:
        travelled += len(event.payload) if isinstance(event, Delivery) else 0
    assert travelled == second.stat().st_size < 200_000 < base.stat().st_size
    two = answering.current()[0]
    assert two is not None
    assert two._session is one._session
    wanted = Model.open(base, adapter=second).run(photograph[None]).probabilities
    np.testing.assert_allclose(two.run(photograph[None]).probabilities, wanted, atol=1e-5)
    assert bytes_before > 0


def test_other_classes_travel_alone(lab: Lab, photograph: Pixels) -> None:
    answering = lab.device(lab.models["int8"])
    bank = bank_of("tiny-clip", ("cat", "ship", "tree", "house", "bird"))
    lab.announce(lab.release(1, lab.models["int8"], None, bank))
    lab.until(1, "committed")
    assert set(answering.classify(photograph, 9).labels) == set(bank.classes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": "submarine"}, "smoke-differs"),
        ({"embedding": "fwAA" * 85 + "fw=="}, "smoke-differs"),
    ],
)
def test_a_model_that_says_something_else_here_never_answers(
    lab: Lab, photograph: Pixels, change: dict[str, str], reason: str
) -> None:
    answering = lab.device(lab.models["int8"])
    release = lab.release(1, lab.models["fp32"])
    lab.announce(release.model_copy(update={"smoke": release.smoke.model_copy(update=change)}))
    report = lab.until(1, "refused")
    assert (report.reason, report.running) == (reason, 0)
    assert answering.classify(photograph).version == 0
    lab.announce(lab.release(2, lab.models["fp32"]))
    assert lab.until(2, "committed").running == 2


def test_other_bytes_than_the_manifest_names_are_refused(lab: Lab, photograph: Pixels, tmp_path: Path) -> None:
    answering = lab.device(lab.models["int8"])
    release = lab.release(1, lab.models["fp32"])
    wrong = tmp_path / "wrong"
    wrong.write_bytes(lab.models["fp32"].read_bytes()[:-1] + b"?")
    lab.paths[release.artefact.sha256] = wrong
    lab.announce(release)
    report = lab.until(1, "refused")
    assert (report.reason, report.running) == ("wrong-hash", 0)
    assert answering.classify(photograph).version == 0
    assert list((tmp_path / "one" / FOLDER / "partial").iterdir()) == []


def test_what_is_no_model_is_refused(lab: Lab, photograph: Pixels, tmp_path: Path) -> None:
    answering = lab.device(lab.models["int8"])
    good = lab.release(1, lab.models["fp32"])
    nothing = tmp_path / "nothing.onnx"
    nothing.write_bytes(b"no model at all")
    ref = LargeBlobRef(sha256=file_sha256(nothing), size=nothing.stat().st_size)
    lab.paths[ref.sha256] = nothing
    lab.announce(good.model_copy(update={"artefact": ref}))
    report = lab.until(1, "refused")
    assert report.reason == "unreadable"
    assert "onnxruntime cannot load it" in report.detail
    assert answering.classify(photograph).version == 0


def test_a_disk_without_room_is_told(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.device(lab.models["int8"])
    monkeypatch.setattr("protocol.storage.large.SPARE_BYTES", 2**60)
    lab.announce(lab.release(1, lab.models["fp32"]))
    report = lab.until(1, "refused")
    assert report.reason == "no-space"


def test_a_stranger_and_an_old_announcement_are_not_heard(lab: Lab, photograph: Pixels) -> None:
    answering = lab.device(lab.models["int8"])
    heard: list[bytes] = []
    tap = lab.broker.connect()

    tap.do(Subscribe(TOPICS.broadcast("release")))
    lab.announce(lab.release(1, lab.models["fp32"]))
    lab.until(1, "committed")
    while (event := tap.receive(0.01)) is not None:
        heard += [event.payload] if isinstance(event, Delivery) else []
    lab.announce(lab.release(2, lab.models["int8"]))
    lab.until(2, "committed")
    refused = lab.end.gate.counts
    forged = Signer().seal("lab", "coordinator", lab.release(3, lab.models["fp32"]))
    tap.do(Publish(TOPICS.broadcast("release"), forged))
    wait_until(lambda: refused["wrong-key"] == 1)
    broken = heard[0][:-4] + b"AAAA"
    tap.do(Publish(TOPICS.broadcast("release"), broken))
    wait_until(lambda: refused["bad-signature"] + refused["not-signed"] >= 1)
    tap.do(Publish(TOPICS.broadcast("release"), heard[0]))
    wait_until(lambda: refused["replayed"] == 1)
    assert answering.classify(photograph).version == 2


def test_an_older_version_is_refused_and_a_way_back_is_taken(lab: Lab, photograph: Pixels) -> None:
    answering = lab.device(lab.models["int8"])
    lab.announce(lab.release(5, lab.models["fp32"]))
    lab.until(5, "committed")
    lab.announce(lab.release(4, lab.models["int8"]))
    assert lab.until(4, "refused").reason == "older-version"
    lab.announce(lab.release(3, lab.models["int8"], rollback=True))
    assert lab.until(3, "committed").running == 3
    assert answering.classify(photograph).version == 3


def test_a_model_that_disagrees_goes_and_the_one_before_answers_again(lab: Lab, photograph: Pixels) -> None:
    answering = lab.device(lab.models["int8"])
    bank = bank_of("tiny-clip", ("cat", "ship", "tree"))  # says other labels, always
    health = Health(window_s=0.5, min_answers=5, min_agreement=0.9, max_latency_ratio=1000)
    lab.announce(lab.release(1, lab.models["int8"], None, bank, health=health))
    lab.until(1, "trying")
    for _ in range(8):
        answering.classify(photograph)
    report = lab.until(1, "rolled-back")
    assert (report.reason, report.running, report.agreement) == ("disagrees", 0, 0.0)
    assert report.answers >= 5
    assert answering.classify(photograph).version == 0


def test_a_model_that_fails_goes_at_once(lab: Lab, photograph: Pixels) -> None:
    answering = lab.device(lab.models["int8"])
    lab.announce(lab.release(1, lab.models["fp32"], health=Health(window_s=3600, min_answers=1000)))
    lab.until(1, "trying")
    for _ in range(6):
        with pytest.raises(InferenceError):
            answering.classify(np.zeros((3, 3), np.uint8))  # stands for pictures that this model cannot take
    assert lab.until(1, "rolled-back").reason == "errors"
    assert answering.classify(photograph).version == 0


def test_a_damaged_model_on_the_disk_gives_way_at_the_next_start(
    lab: Lab, photograph: Pixels, caplog: pytest.LogCaptureFixture
) -> None:
    lab.device(lab.models["int8"])
    release = lab.release(1, lab.models["fp32"])
    lab.announce(release)
    lab.until(1, "committed")
    lab.stop()
    (lab.folder / "one" / FOLDER / "blobs" / release.artefact.sha256).write_bytes(b"damaged")
    with caplog.at_level(logging.ERROR):
        assert lab.device(lab.models["int8"]).classify(photograph).version == 0
    assert "release 1 cannot be loaded" in caplog.text


def test_a_damaged_model_is_fetched_again_when_its_release_is_said_again(lab: Lab, photograph: Pixels) -> None:
    lab.device()
    release = lab.release(1, lab.models["fp32"])
    lab.announce(release)
    lab.until(1, "committed")
    lab.stop()
    (lab.folder / "one" / FOLDER / "blobs" / release.artefact.sha256).write_bytes(b"damaged")
    answering = lab.device()
    assert answering.current() == (None, 0)
    lab.reports.clear()
    lab.announce(release)
    assert lab.until(1, "committed").running == 1
    assert answering.classify(photograph).version == 1


def test_a_way_back_is_taken_whatever_the_model_that_has_to_go_says(lab: Lab, photograph: Pixels) -> None:
    """What answers now is what the operator does not want: it is no measure for what comes back."""
    answering = lab.device(lab.models["int8"])
    bank = bank_of("tiny-clip", ("cat", "ship", "tree"))
    lab.live._watch._latencies.extend([1e-6] * 9)  # nothing is as fast as this
    health = Health(window_s=0.2, min_answers=5, min_agreement=1.0)
    lab.announce(lab.release(1, lab.models["int8"], None, bank, health=health, rollback=True))
    lab.until(1, "trying")
    for _ in range(8):
        answering.classify(photograph)
    report = lab.until(1, "committed", "rolled-back")
    assert (report.phase, report.running) == ("committed", 1)


@pytest.mark.parametrize("stage", ["staged", "trying", "idle"])
def test_a_disk_that_takes_nothing_for_a_while_only_delays_a_release(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Whichever of the steps cannot be written down: it is taken again."""
    monkeypatch.setattr("edge_client.releases.live.AGAIN_S", 0.1)
    failed: list[str] = []
    save = Slots.save

    def fails(self: Slots, state: State) -> None:
        if state.stage == stage and len(failed) < 3:
            failed.append(state.stage)
            raise OSError(28, "No space left on device")
        save(self, state)

    lab.device(lab.models["int8"])
    monkeypatch.setattr(Slots, "save", fails)
    lab.announce(lab.release(1, lab.models["fp32"]))
    assert lab.until(1, "committed").running == 1
    assert len(failed) == 3


def test_a_full_disk_keeps_no_device_from_answering_at_its_start(
    lab: Lab, photograph: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.device(lab.models["int8"])
    lab.announce(lab.release(1, lab.models["fp32"], health=Health(window_s=3600)))
    lab.until(1, "trying")
    lab.stop()

    def fails(self: Slots, state: State) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Slots, "save", fails)
    assert lab.device(lab.models["int8"]).classify(photograph).version == 1


def test_a_file_that_cannot_be_lent_is_fetched(lab: Lab, tmp_path: Path, photograph: Pixels) -> None:
    base = tmp_path / "base.onnx"
    base.write_bytes(lab.models["fp32"].read_bytes())
    answering = lab.device(base)
    release = lab.release(1, lab.models["fp32"])
    base.unlink()
    lab.announce(release)
    assert lab.until(1, "committed").running == 1
    assert answering.classify(photograph).version == 1


def test_what_has_come_already_needs_no_room_any_more(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    release = lab.release(1, lab.models["fp32"])
    size, come = release.artefact.size, 4_000_000
    part = LargePartial(lab.folder / "one" / FOLDER / "partial" / f"{release.artefact.sha256}.part", size)
    part.add(0, lab.models["fp32"].read_bytes()[:come])
    monkeypatch.setattr("protocol.storage.large.SPARE_BYTES", 0)
    usage = shutil.disk_usage(lab.folder)
    monkeypatch.setattr("protocol.storage.large.shutil.disk_usage", lambda _: usage._replace(free=size - come + 10_000))
    lab.device()
    lab.announce(release)
    assert lab.until(1, "committed", "refused").phase == "committed"


def test_following_that_broke_off_goes_on_with_what_is_under_way_now(lab: Lab) -> None:
    """`run` is called again after an exception: what was under way when the process began may long be over."""
    lab.device(lab.models["int8"])
    lab.announce(lab.release(1, lab.models["fp32"]))
    lab.until(1, "committed")
    lab.stop()
    live = lab.live
    assert live.answering is not None
    stop = threading.Event()
    stop.set()
    live.run(Link(lab.broker.connect(), lab.end), lab.end, stop)
    assert lab.end._under == {}


def test_what_is_needed_no_more_is_swept(lab: Lab) -> None:
    lab.device(lab.models["int8"])
    for version, flavour in enumerate(("fp32", "int8", "fp32", "adapter"), start=1):
        lab.announce(lab.release(version, lab.models[flavour]))  # type: ignore[index]
        lab.until(version, "committed")
    assert len(list((lab.folder / "one" / FOLDER / "blobs").iterdir())) <= 3
