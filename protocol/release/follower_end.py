"""A device's end of the wire for releases, sans-I/O: bus events and the time go in; actions and events come out.

It hears of releases, fetches the blobs that it is told to, into files, and says how it goes. It speaks with the device's
key, over a connection of its own, on numbers of its own: the process that trains, if there is one, speaks of other things.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from protocol.bus import Action, Connected, Delivery, Disconnected, Event, Publish, Subscribe, Unsubscribe
from protocol.envelope import expect
from protocol.errors import Refused, WireError
from protocol.events import LinkChanged
from protocol.messages import BlobRef, Successor
from protocol.release.manifests import Release, Report, Want
from protocol.storage.large import LargePartial
from protocol.topics import Address, Topics, parse
from protocol.transfer.exchange import CHUNK_EXPIRY_S, LASTING_CAP_S, NEED_S, PRESENCE_S, Fetch, Repeat
from protocol.trust.gate import Anchor, FirstUse, Gate
from protocol.trust.signing import FileSequence, Signer, private_key

FOLDER = "answers"
"""In the device's state: what is this process's own."""

BLOBS, PARTIAL = "blobs", "partial"


WINDOW = 64  # chunks that are asked for at a time


@dataclass(frozen=True)
class Announced:
    """The coordinator announces a release, or says it again."""

    release: Release


@dataclass(frozen=True)
class Arrived:
    """A blob is in its file, and its hash is right."""

    sha256: str


@dataclass(frozen=True)
class Damaged:
    """A blob arrived whole and its hash is another, or the disk does not take it; it is asked for no more."""

    sha256: str
    reason: Literal["wrong-hash", "no-space"]
    problem: str


FollowerEvent = Announced | Arrived | Damaged | LinkChanged


@dataclass
class _Under:
    """A blob on its way."""

    fetch: Fetch
    partial: LargePartial
    wrong: int = 0


def partial_path(folder: Path, digest: str) -> Path:
    """Return where a blob lies in this process's folder while it is on its way."""
    return folder / PARTIAL / f"{digest}.part"


class FollowerEnd:
    """A device's side of releases. All methods return the actions that the bus should carry out."""

    def __init__(self, federation: str, device: str, rng: random.Random, state: Path, trust: Anchor | None = None) -> None:
        """Sign with the key in the device's folder `state`; raises KeyFileError."""
        self.topics = Topics(federation)
        self._device = device
        self._rng = rng
        self._folder = state / FOLDER
        sequence = FileSequence(self._folder / "sequence")
        sequence.reserve()
        self._signer = Signer(private_key(state / "key.pem"), sequence)
        self._trust = trust or FirstUse()
        self.gate = Gate(federation, self._trust, self._folder / "marks.json")
        self._under: dict[str, _Under] = {}
        self._over: list[str] = []  # blobs whose chunks are still subscribed to
        self._report: Report | None = None
        self._lasting = Repeat(rng, PRESENCE_S, LASTING_CAP_S)

    def blob(self, digest: str) -> Path:
        """Return where a blob lies, or will."""
        return self._folder / BLOBS / digest

    def fetch(self, refs: Sequence[BlobRef]) -> list[Action]:
        """Fetch these blobs and no others, each from where it was cut off."""
        wanted = {ref.sha256: ref for ref in refs}
        for digest in [digest for digest in self._under if digest not in wanted]:
            self._let_go(digest)
        actions = self._unsubscribed()
        for digest, ref in wanted.items():
            known = self._under.get(digest)
            if known is not None and known.fetch.ref == ref:
                continue
            partial = LargePartial(partial_path(self._folder, digest), ref.size)
            self._under[digest] = _Under(Fetch(ref, Repeat(self._rng, NEED_S), WINDOW, partial), partial)
            actions.append(Subscribe(self.topics.blob_filter(digest)))
        return actions

    def report(self, report: Report) -> list[Action]:
        """Say how it goes, retained; the same again is said now and then by itself."""
        if report == self._report:
            return []
        self._report = report
        self._lasting.said()
        return [self._said(report)]

    def handle(self, event: Event, now: float) -> tuple[list[Action], list[FollowerEvent]]:
        """Take in a bus event. What the protocol does not allow is logged and changes nothing."""
        match event:
            case Connected():
                return self._connected(), [LinkChanged(up=True)]
            case Disconnected(reason=reason):
                return [], [LinkChanged(up=False, reason=reason)]
            case Delivery(topic=topic, payload=payload):
                try:
                    return self._delivered(parse(topic), payload, now)
                except WireError as error:
                    self.gate.refuse(topic, error)
                    return [], []

    def tick(self, now: float, room: int, drained: bool = True) -> list[Action]:
        """Say what is due."""
        del room, drained  # nothing large goes up
        actions = self._unsubscribed()
        if self._report is not None and self._lasting.due(now):
            actions.append(self._said(self._report))
        for digest, under in self._under.items():
            if missing := under.fetch.need(now):
                data = self._signer.seal(self.topics.federation, self._device, Want(sha256=digest, missing=missing))
                actions.append(Publish(self.topics.from_(self._device, Want.kind), data, expiry_s=CHUNK_EXPIRY_S))
        return actions

    def settle(self) -> list[FollowerEvent]:
        """Return what has arrived whole: call it after each tick. What was whole before this process began counts too."""
        events: list[FollowerEvent] = []
        for digest, under in list(self._under.items()):
            if not under.partial.has(0, under.fetch.ref.size):
                continue
            try:
                good = under.partial.finish(digest, self.blob(digest))
            except OSError as error:
                events.append(Damaged(digest, "no-space", f"it cannot be kept: {error}"))
                self._let_go(digest)
                continue
            if good:
                events.append(Arrived(digest))
                self._let_go(digest)
            elif under.wrong:
                events.append(Damaged(digest, "wrong-hash", "what the coordinator sends has another hash"))
                self._let_go(digest)
            else:  # a bit may have been lost on the way or on the disk: once more
                under.wrong += 1
                under.fetch.repeat.again()
        return events

    def _let_go(self, digest: str) -> None:
        """Fetch a blob no more: its chunks are still said to others, and are not to come here."""
        del self._under[digest]
        self._over.append(digest)

    def _unsubscribed(self) -> list[Action]:
        over, self._over = self._over, []
        return [Unsubscribe(self.topics.blob_filter(digest)) for digest in over if digest not in self._under]

    def _connected(self) -> list[Action]:
        names = (self.topics.broadcast(Successor.kind), self.topics.broadcast(Release.kind))
        for under in self._under.values():
            under.fetch.repeat.again()
        blobs = [Subscribe(self.topics.blob_filter(digest)) for digest in self._under]
        said = [] if self._report is None else [self._said(self._report)]
        self._lasting.said()
        return [*(Subscribe(name) for name in names), *blobs, *said]

    def _delivered(self, address: Address, payload: bytes, now: float) -> tuple[list[Action], list[FollowerEvent]]:
        if address.federation != self.topics.federation or address.direction != "all":
            raise Refused("wrong-topic", "this is not said to a device that follows releases")
        if address.kind == "blob":
            assert address.sha256 is not None
            assert address.index is not None
            under = self._under.get(address.sha256)
            if under is None:
                self.gate.unwanted()
            else:
                under.fetch.chunk(address.index, payload, now)
            return [], []
        if address.kind == Successor.kind:
            changed = self._trust.follow(payload, self.topics.federation)
            return ([Subscribe(self.topics.broadcast(Release.kind))] if changed else []), []
        return [], [Announced(expect(self.gate.open(address, payload), Release))]

    def _said(self, report: Report) -> Publish:
        data = self._signer.seal(self.topics.federation, self._device, report)
        return Publish(self.topics.from_(self._device, Report.kind), data, retain=True)
