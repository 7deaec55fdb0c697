"""What an operator may order: make a release, pause it, let it go on, abort it, go back to an earlier one.

Orders are rows of the journal; the desk, in whatever process it works, carries them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from coordinator.errors import FederationError
from coordinator.releases.blobs import ReleaseBlobs
from coordinator.releases.book import Book, Entry
from protocol.codec import encode_bank
from protocol.envelope import COORDINATOR, Envelope, encode
from protocol.errors import WireError
from protocol.messages import BlobRef, LargeBlobRef, Text, TextBank
from protocol.release.manifests import Health, Release, Smoke
from protocol.release.rings import MOST_NAMED, Ring, Rollout, resumed, stopped
from protocol.settings import SettingsError, explain_problem

KEPT_VERSIONS = 5
LONGEST_NAME = "x" * 64
MOST_SEQUENCE = 2**53

USUAL = Health()
COMPLETE = "complete"

TryOut = Callable[[Path, Path | None, TextBank | None], Smoke]
"""Runs an artefact, with an adapter and other classes if given, and says what it has to answer everywhere."""


@dataclass(frozen=True)
class Draft:
    """What a release is to be. `version` None is the next one."""

    artefact: Path
    rings: tuple[Ring, ...]
    adapter: Path | None = None
    bank: TextBank | None = None
    profiles: tuple[str, ...] = ()
    health: Health = USUAL
    timeout_s: float = 3600.0
    max_failure_share: float = 0.2
    note: Text = ""
    version: int | None = None


class Orders:
    """An operator's orders. All raise FederationError if the journal cannot be used, or does not allow it now."""

    def __init__(self, federation: str, book: Book, blobs: ReleaseBlobs) -> None:
        self._federation = federation
        self._book = book
        self._blobs = blobs

    def make(self, draft: Draft, try_out: TryOut) -> Entry:
        """Announce a release from the next moment on; nothing is, if its model cannot be tried out.

        Raises SettingsError for what the draft cannot have, and whatever `try_out` raises.
        """
        with self._blobs.alone():
            entries = self._book.entries()
            _check_free(entries)
            version = _version(entries, draft.version)
            try:
                release = self._release(draft, version, try_out)
                rollout = Rollout.begin(release, draft.rings, draft.timeout_s, draft.max_failure_share)
                entry = self._book.add(rollout, entries[0] if entries else None)
                entries = [entry, *entries]
            finally:
                self._blobs.sweep(_wanted(entries))
        return entry

    def pause(self) -> Entry:
        """Let no further device switch."""
        return self._change("pause", ("open",), lambda rollout: stopped(rollout, "paused", "operator"))

    def resume(self) -> Entry:
        """Let a paused release go on; who has failed so far counts no more."""
        reports = {name: heard.report for name, heard in self._book.reports().items()}
        return self._change("resume", ("paused",), lambda rollout: resumed(rollout, reports))

    def abort(self) -> Entry:
        """End a release: who has not committed yet goes back."""
        return self._change("abort", ("open", "paused"), lambda rollout: stopped(rollout, "aborted", "operator"))

    def rollback(self, version: int | None = None) -> Entry:
        """Announce an earlier release to all; what is under way ends.

        By default it is the newest that was complete of lower versions than the one that is announced.
        """
        with self._blobs.alone():
            entries = self._book.entries()
            if not entries:
                raise FederationError("there is no release to go back from: `clipcast release create` makes one")
            release = self._earlier(entries, version).rollout.release
            back = release.model_copy(update={"rollback": True})
            return self._book.add(Rollout.begin(back, (), 1.0, 1.0), entries[0])

    def _release(self, draft: Draft, version: int, try_out: TryOut) -> Release:
        artefact = self._put(draft.artefact, LargeBlobRef)
        adapter = None if draft.adapter is None else self._put(draft.adapter, BlobRef)
        classes = None
        if draft.bank is not None:
            digest, size = self._blobs.put_bytes(encode_bank(draft.bank))
            classes = BlobRef(sha256=digest, size=size)
        # What is tried out are the very bytes that go out.
        where = None if adapter is None else self._blobs.path(adapter.sha256)
        smoke = try_out(self._blobs.path(artefact.sha256), where, draft.bank)
        try:
            release = Release(
                version=version,
                artefact=artefact,
                adapter=adapter,
                classes=classes,
                profiles=draft.profiles,
                smoke=smoke,
                health=draft.health,
                note=draft.note,
            )
        except ValidationError as error:
            problems = [explain_problem(found["loc"], found["msg"], found["type"]) for found in error.errors()]
            raise SettingsError("this release cannot be made:\n" + "\n".join(f"  {line}" for line in problems)) from error
        self._check_length(release)
        return release

    def _put(self, path: Path, schema: type[BlobRef]) -> BlobRef:
        try:
            size = path.stat().st_size
            schema(sha256="0" * 64, size=size)  # before it is copied
            digest, size = self._blobs.put(path)
            return schema(sha256=digest, size=size)
        except OSError as error:
            raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            raise SettingsError(
                f"{path} cannot be released: its size is {size} bytes, {error.errors()[0]['msg']}"
            ) from error

    def _check_length(self, release: Release) -> None:
        """Raise SettingsError if the manifest is too long, or may become so when devices are named in it."""
        fullest = release.model_copy(update={"devices": (LONGEST_NAME,) * MOST_NAMED, "percent": 1 / 3})
        try:
            encode(Envelope(self._federation, COORDINATOR, fullest, MOST_SEQUENCE))
        except WireError as error:
            raise SettingsError(f"{error}. A shorter note, fewer profiles, or a simpler picture") from error

    def _earlier(self, entries: list[Entry], version: int | None) -> Entry:
        current = entries[0]
        others = [one for one in entries if one.version != current.version]
        if version == current.version:
            raise FederationError(
                f"release {version} is the one that is announced: `clipcast release status --devices` says who has it. A "
                f"device that ended it does not try it again: create a release of the same file"
            )
        found = [one for one in others if one.version == version or (version is None and _is_before(one, current))]
        if not found:
            which = f"release {version}" if version else "complete release before this one"
            ends = {one.version: how_it_ended(one) for one in reversed(others) if not one.rollout.release.rollback}
            known = ", ".join(f"{number} ({end})" for number, end in sorted(ends.items())) or "none"
            raise FederationError(f"the journal holds no {which}. Name another with --to; others there are: {known}")
        if not all(map(self._blobs.has, found[0].rollout.release.blobs)):
            raise FederationError(
                f"the blobs of release {found[0].version} are not kept any more (of {KEPT_VERSIONS} versions they are): "
                f"create a new release from the same file"
            )
        return found[0]

    def _change(self, word: str, states: Iterable[str], order: Callable[[Rollout], Rollout]) -> Entry:
        """Change the newest release, whatever the desk does to it at the same time."""
        while True:
            entry = self._book.newest()
            if entry is None:
                raise FederationError(f"there is no release to {word}: `clipcast release create` makes one")
            if entry.rollout.release.state not in states:
                state = entry.rollout.release.state
                raise FederationError(f"release {entry.version} is {state}: there is nothing to {word}")
            changed = self._book.change(entry, order(entry.rollout))
            if changed is not None:
                return changed


def _check_free(entries: list[Entry]) -> None:
    if entries and entries[0].rollout.under_way:
        raise FederationError(
            f"release {entries[0].version} is under way: wait until it is complete (`clipcast release status`), or "
            f"`clipcast release abort`"
        )


def _version(entries: list[Entry], wanted: int | None) -> int:
    newest = max((entry.version for entry in entries), default=0)
    if wanted is not None and wanted <= newest:
        raise SettingsError(f"versions only rise: the journal knows {newest} already, --version has to be above it")
    return newest + 1 if wanted is None else wanted


def _is_before(entry: Entry, current: Entry) -> bool:
    """Whether a release was complete, and is not the one that was left when `current` was gone back to."""
    return entry.version < current.version and how_it_ended(entry) == COMPLETE and not entry.rollout.release.rollback


def how_it_ended(entry: Entry) -> str:
    """Return one word for a release's end."""
    rollout = entry.rollout
    return COMPLETE if rollout.succeeded else rollout.reason or rollout.release.state


def _wanted(entries: list[Entry]) -> set[str]:
    """Return the hashes of the blobs of the newest versions."""
    versions = list(dict.fromkeys(entry.version for entry in entries))[:KEPT_VERSIONS]
    return {ref.sha256 for entry in entries if entry.version in versions for ref in entry.rollout.release.blobs}
