"""An operator's orders, in a journal that a desk changes at the same time; and the blobs that releases need."""

from __future__ import annotations

import hashlib
import multiprocessing
from pathlib import Path

import pytest

from coordinator.errors import FederationError, NotKeptError
from coordinator.releases.book import Heard
from coordinator.releases.orders import KEPT_VERSIONS
from coordinator.releases.summary import summary
from coordinator.state.store import Store
from protocol.messages import MAX_LARGE_BLOB_SIZE, BlobRef
from protocol.release.manifests import Report
from protocol.release.rings import Ring
from protocol.settings import SettingsError
from protocol.storage.at_rest import KeptBlob
from protocol.storage.blobs import BlobError
from tests.coordinator.releases.conftest import SMOKE, Lab


def heard(phase: str, release: int | None = 1, sequence: int = 1) -> Heard:
    report = Report(running=0, release=release if phase != "idle" else None, phase=phase)
    return Heard(report, "0" * 16, sequence, 0.0, 1_800_000_000)


def test_nothing_was_ever_released(lab: Lab) -> None:
    assert lab.book.newest() is None
    assert lab.book.reports() == {}
    assert summary(lab.book, lab.store.registry) is None
    for order in (lab.orders.pause, lab.orders.resume, lab.orders.abort, lab.orders.rollback):
        with pytest.raises(FederationError, match="release create"):
            order()


def test_a_release_is_in_the_journal_with_its_blobs(lab: Lab) -> None:
    made = lab.make(adapter=lab.draft("fox.onnx_adapter", 700).artefact, profiles=("nano",), note="first")
    again = Store(lab.state, lab.journal)
    assert again.releases.newest() == made
    again.close()
    release = made.rollout.release
    assert (made.version, made.rollout.rings, release.percent) == (1, (Ring(), Ring(percent=10), Ring(percent=100)), 0.0)
    assert (release.profiles, release.note, release.smoke) == (("nano",), "first", SMOKE)
    for ref, name in ((release.artefact, "model.onnx"), (release.adapter, "fox.onnx_adapter")):
        assert ref is not None
        blob = lab.blobs.open(ref)
        assert blob[:] == (lab.folder / name).read_bytes()
        assert blob == KeptBlob(lab.blobs.folder / ref.sha256, ref.size)
    assert lab.kept() == {ref.sha256 for ref in release.blobs}


def test_what_is_tried_out_is_what_goes_out(lab: Lab) -> None:
    tried: list[bytes] = []
    draft = lab.draft()

    def try_out(artefact: Path, *_: object):
        draft.artefact.write_bytes(b"another file by now")
        tried.append(artefact.read_bytes())
        return SMOKE

    entry = lab.orders.make(draft, try_out)
    assert hashlib.sha256(tried[0]).hexdigest() == entry.rollout.release.artefact.sha256


def test_a_model_that_cannot_be_tried_out_leaves_nothing(lab: Lab) -> None:
    def refuse(*_: object):
        raise ValueError("no model at all")

    with pytest.raises(ValueError, match="no model"):
        lab.orders.make(lab.draft(), refuse)
    assert lab.book.newest() is None
    assert lab.kept() == set()


def test_one_release_at_a_time(lab: Lab) -> None:
    lab.make()
    with pytest.raises(FederationError, match=r"release 1 is under way: wait .* abort"):
        lab.make("other.onnx")
    lab.complete()
    assert lab.make("other.onnx").version == 2
    lab.orders.abort()
    assert lab.make("third.onnx").version == 3
    assert [entry.number for entry in lab.book.entries()] == [3, 2, 1]


def test_versions_only_rise_also_by_hand(lab: Lab) -> None:
    lab.make(version=7)
    lab.complete()
    with pytest.raises(SettingsError, match="the journal knows 7 already"):
        lab.make("other.onnx", version=7)
    assert lab.make("other.onnx").version == 8


def test_pause_resume_and_abort(lab: Lab) -> None:
    lab.make()
    assert lab.orders.pause().rollout.reason == "operator"
    with pytest.raises(FederationError, match="is paused: there is nothing to pause"):
        lab.orders.pause()
    lab.book.keep({"bad": heard("rolled-back"), "good": heard("committed")}, 1, 5.0)
    resumed = lab.orders.resume()
    assert (resumed.rollout.release.state, resumed.rollout.excused, resumed.rollout.since) == ("open", ("bad",), None)
    with pytest.raises(FederationError, match="is open: there is nothing to resume"):
        lab.orders.resume()
    assert lab.orders.abort().rollout.release.state == "aborted"
    for order in (lab.orders.pause, lab.orders.resume, lab.orders.abort):
        with pytest.raises(FederationError, match="is aborted"):
            order()
    assert lab.book.newest() == lab.book.entries()[0]


def test_an_order_and_the_desk_at_the_same_moment_both_count(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.make()
    stale = lab.book.newest()
    assert stale is not None
    change, raced = lab.book.change, []

    def slower(entry, rollout):
        if not raced:  # the desk opens the next ring between the order's look and its word
            raced.append(change(stale, stale.rollout.model_copy(update={"ring": 1})))
        return change(entry, rollout)

    monkeypatch.setattr(lab.book, "change", slower)
    paused = lab.orders.pause()
    assert (paused.rollout.ring, paused.rollout.release.state, paused.revision) == (1, "paused", 2)
    assert change(stale, stale.rollout) is None  # and a desk that has not seen it yet changes nothing
    newest = lab.book.newest()
    assert newest == paused


def test_a_rollback_announces_the_last_complete_one_to_all(lab: Lab) -> None:
    first = lab.make("first.onnx", profiles=("nano",))
    with pytest.raises(FederationError, match="no complete release before this one"):
        lab.orders.rollback()
    lab.complete()
    lab.make("second.onnx")
    lab.orders.abort()
    lab.make("third.onnx")
    back = lab.orders.rollback()
    release = back.rollout.release
    assert release.model_copy(update={"rollback": False}) == first.rollout.release.model_copy(update={"percent": 100.0})
    assert (release.rollback, release.percent, release.state, back.number) == (True, 100.0, "open", 4)
    third = lab.book.entries()[1].rollout
    assert (third.release.state, third.reason) == ("aborted", "superseded")
    with pytest.raises(FederationError, match="release 1 is the one that is announced"):
        lab.orders.rollback(1)
    assert lab.orders.rollback(3).version == 3
    assert lab.make("fourth.onnx").version == 4  # above all that there was


def test_one_rollback_after_another_goes_further_back_and_never_forward(lab: Lab) -> None:
    for name in ("first.onnx", "second.onnx"):
        lab.make(name)
        lab.complete()
    lab.make("third.onnx")
    lab.orders.abort()
    lab.make("bad.onnx")
    lab.complete()
    assert [lab.orders.rollback().version for _ in range(2)] == [2, 1]
    with pytest.raises(
        FederationError, match=r"no complete release before.*: 2 \(complete\), 3 \(operator\), 4 \(complete\)"
    ):
        lab.orders.rollback()
    assert lab.orders.rollback(3).version == 3  # by name, whatever it was


def test_a_rollback_needs_blobs_that_are_kept(lab: Lab) -> None:
    for number in range(KEPT_VERSIONS + 2):
        lab.make(f"{number}.onnx")
        lab.complete()
    assert len(lab.kept()) == KEPT_VERSIONS
    with pytest.raises(FederationError, match="release 1 are not kept any more"):
        lab.orders.rollback(1)
    with pytest.raises(
        FederationError, match=r"holds no release 99\. Name another with --to; others there are: 1 .complete., 2"
    ):
        lab.orders.rollback(99)
    back = lab.orders.rollback(3)
    assert all(map(lab.blobs.has, back.rollout.release.blobs))


def test_blobs_that_two_releases_share_are_kept_once_and_as_long_as_one_needs_them(lab: Lab) -> None:
    for number in range(KEPT_VERSIONS + 2):
        lab.make("same.onnx", adapter=lab.draft(f"{number}.onnx_adapter", 100).artefact)
        lab.complete()
    assert len(lab.kept()) == KEPT_VERSIONS + 1


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"note": "x" * 501}, "note: .* at most 500"),
        ({"profiles": ("no/profile",)}, "profiles.0"),
        ({"profiles": tuple(f"{'p' * 60}{number}" for number in range(32)), "note": "ä" * 500}, "exceeds 12288"),
        ({"version": 2**40 + 1}, "version"),
    ],
)
def test_what_a_release_cannot_have_is_named_and_leaves_nothing(lab: Lab, fields: dict, problem: str) -> None:
    draft = lab.draft(**fields)
    smoke = SMOKE.model_copy(update={"picture": "A" * 5000})
    with pytest.raises(SettingsError, match=problem):
        lab.orders.make(draft, lambda *_: smoke)
    assert lab.book.newest() is None
    assert lab.kept() == set()


def test_a_file_that_is_missing_empty_or_too_large_is_named(lab: Lab) -> None:
    draft = lab.draft()
    draft.artefact.unlink()
    with pytest.raises(SettingsError, match=r"model.onnx cannot be read: No such file"):
        lab.orders.make(draft, lambda *_: SMOKE)
    draft.artefact.write_bytes(b"")
    with pytest.raises(SettingsError, match=r"model.onnx cannot be released: its size is 0 bytes"):
        lab.orders.make(draft, lambda *_: SMOKE)
    with draft.artefact.open("wb") as file:
        file.truncate(MAX_LARGE_BLOB_SIZE + 1)  # sparse: it is refused unread
    with pytest.raises(SettingsError, match="cannot be released: its size is 2147483649 bytes"):
        lab.orders.make(draft, lambda *_: SMOKE)
    assert lab.kept() == set()


def test_a_damaged_blob_is_found_and_made_whole_by_putting_it_again(lab: Lab) -> None:
    entry = lab.make()
    ref = entry.rollout.release.artefact
    path = lab.blobs.path(ref.sha256)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"!")
    with pytest.raises(BlobError, match="is damaged"):
        lab.blobs.open(ref)
    assert lab.blobs.put(lab.folder / "model.onnx") == (ref.sha256, ref.size)
    assert lab.blobs.open(ref)[:] == whole
    path.unlink()
    assert not lab.blobs.has(ref)
    with pytest.raises(BlobError, match="cannot be read"):
        lab.blobs.open(ref)


def test_a_disk_that_is_full_leaves_no_half_blob(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    first = lab.make()
    lab.complete()
    monkeypatch.setattr("coordinator.releases.blobs.os.fsync", full)
    with pytest.raises(NotKeptError, match="make room there; the release was not made"):
        lab.blobs.put(lab.draft("second.onnx").artefact)
    assert lab.kept() == {first.rollout.release.artefact.sha256}
    with pytest.raises(NotKeptError, match="make room there; the release was not made"):
        lab.make("second.onnx")
    monkeypatch.undo()
    assert lab.kept() == {first.rollout.release.artefact.sha256}
    assert lab.make("second.onnx").version == 2


def hold(folder: Path, held, done) -> None:
    lab = Lab(folder)
    with lab.blobs.alone():
        held.set()
        done.wait(30)


def test_two_releases_are_not_made_at_the_same_time(new_lab) -> None:
    lab = new_lab()
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(lab.folder, held, done))
    process.start()
    try:
        assert held.wait(60)
        with pytest.raises(FederationError, match="another release is being made"):
            lab.make()
    finally:
        done.set()
        process.join(30)
    assert lab.make().version == 1


def test_what_a_crash_left_half_written_goes_with_the_next_release(lab: Lab) -> None:
    lab.blobs.folder.mkdir(parents=True)
    (lab.blobs.folder / ".half").write_bytes(b"x")
    (lab.blobs.folder / ("ab" * 32)).write_bytes(b"never announced")
    assert lab.make().version == 1
    assert len(lab.kept()) == 1


def test_reports_are_kept_by_device_and_the_age_with_them(lab: Lab) -> None:
    lab.make()
    lab.book.keep({"a": heard("fetching"), "b": heard("idle")}, 1, 12.5)
    lab.book.keep({"a": heard("committed", sequence=2**50)}, 1, 13.5)
    lab.book.keep({}, None, 99.0)
    assert lab.book.reports() == {"a": heard("committed", sequence=2**50), "b": heard("idle")}
    newest = lab.book.newest()
    assert newest is not None
    assert newest.age == 13.5


def test_a_damaged_row_is_said(lab: Lab) -> None:
    from sqlalchemy import text

    lab.make()
    with lab.store._journal.writing() as connection:
        connection.execute(text("UPDATE releases SET about = '{}'"))
    with pytest.raises(FederationError, match="holds a damaged Rollout"):
        lab.book.newest()


def test_the_summary_counts_who_may_take_part(lab: Lab) -> None:
    entry = lab.make(rings="100%", profiles=("nano",), version=4)
    for name in ("good", "bad", "gone", "shut", "other", "new", "ahead"):
        lab.store.registry.add(name, "1" * 43)
    lab.store.registry.revoke("gone")
    nano = {"profile": "nano", "running": 0}
    said = {
        "good": Report(release=4, phase="committed", **nano),
        "bad": Report(release=4, phase="refused", reason="no-space", **nano),
        "gone": Report(release=4, phase="refused", **nano),
        "new": Report(release=3, phase="committed", **nano),
        "other": Report(running=0, profile="orin"),
        "ahead": Report(running=9, profile="nano"),
        "stranger": Report(release=4, phase="committed", **nano),
    }
    lab.book.keep({name: Heard(report, "0" * 16, 1, 0.0, 5) for name, report in said.items()}, entry.number, 1.0)
    found = summary(lab.book, lab.store.registry)
    assert found is not None
    assert (found.census.committed, found.census.failed, found.census.waiting) == (("good",), ("bad",), ("ahead", "new"))
    assert found.phases == {"committed": 1, "idle": 2, "refused": 1}
    assert found.ahead == {"ahead": 9}
    assert {line.device: line.part for line in found.devices} == {
        "good": "committed",
        "bad": "failed",
        "new": "waiting",
        "other": "none",
        "ahead": "waiting",
    }
    assert found.state == "open"


def test_a_whole_blob_ref_fits_the_file(lab: Lab) -> None:
    digest, size = lab.blobs.put_bytes(b"classes")
    assert lab.blobs.open(BlobRef(sha256=digest, size=size))[:] == b"classes"
