"""A device's side of releases, as small as it can be and honest: it fetches what it is to have, and says how that goes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protocol.bus import Action, Connected, Delivery, Event, Publish, Subscribe, Unsubscribe
from protocol.envelope import expect
from protocol.errors import WireError
from protocol.release.manifests import Phase, Release, Report, Want
from protocol.release.rings import is_for
from protocol.topics import Topics, parse
from protocol.transfer.exchange import PRESENCE_S, Fetch, Repeat
from protocol.trust.gate import FirstUse, Gate
from protocol.trust.signing import Signer

FINAL = ("committed", "refused", "rolled-back")
Outcome = Callable[[Release], tuple[Phase, str | None] | None]


def well(_: Release) -> tuple[Phase, str | None]:
    return "committed", None


def badly(_: Release) -> tuple[Phase, str | None]:
    return "rolled-back", "slow"


def mute(_: Release) -> None:
    """It has switched, and is never heard again."""


@dataclass
class Follower:
    """A device that ends each release as `outcome` says. Its own key; the coordinator's by first use."""

    federation: str
    id: str
    outcome: Outcome = well
    profile: str | None = None
    signer: Signer = field(default_factory=Signer)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.topics = Topics(self.federation)
        self.gate = Gate(self.federation, FirstUse())
        self.release: Release | None = None
        self.report = Report(running=0, profile=self.profile)
        self.rng = random.Random(self.id)
        self.said = Repeat(self.rng, PRESENCE_S)
        self.fetches: dict[str, Fetch] = {}
        self.gone = False

    def handle(self, event: Event, now: float) -> tuple[list[Action], Sequence[object]]:
        match event:
            case Connected():
                self.said.again()
                for fetch in self.fetches.values():
                    fetch.repeat.again()
                blobs = [Subscribe(self.topics.blob_filter(digest)) for digest in self.fetches]
                return [Subscribe(self.topics.broadcast("release")), *blobs], []
            case Delivery(topic=topic, payload=payload):
                try:
                    return self._delivered(topic, payload, now), []
                except WireError as error:
                    self.gate.refuse(topic, error)
        return [], []

    def tick(self, now: float, room: int, drained: bool = True) -> list[Action]:
        if self.gone:
            return []
        actions: list[Action] = [self._say(self.report, retain=True)] if self.said.due(now) else []
        for digest, fetch in self.fetches.items():
            if missing := fetch.need(now):
                actions.append(self._say(Want(sha256=digest, missing=missing)))
        return actions

    def _delivered(self, topic: str, payload: bytes, now: float) -> list[Action]:
        address = parse(topic)
        if address.kind == "release":
            self.release = expect(self.gate.open(address, payload), Release)
            return self._follow()
        if address.kind == "blob" and address.sha256 in self.fetches:
            assert address.index is not None
            fetch = self.fetches[address.sha256]
            fetch.chunk(address.index, payload, now)
            whole = fetch.blob()
            if whole is not None:
                self.blobs[address.sha256] = whole
                del self.fetches[address.sha256]
                return [Unsubscribe(self.topics.blob_filter(address.sha256)), *self._follow()]
        return []

    def _follow(self) -> list[Action]:
        release = self.release
        if release is None or not is_for(release, self.id, self.report):
            return []
        mine, over = self.report.release == release.version, self.report.phase in FINAL
        if mine and over and not (release.rollback and self.report.running != release.version):
            return []
        if release.state == "aborted":
            return self._is("rolled-back", "aborted") if mine else []
        actions: list[Action] = []
        for ref in release.blobs:
            if ref.sha256 not in self.blobs and ref.sha256 not in self.fetches:
                self.fetches[ref.sha256] = Fetch(ref, Repeat(self.rng, 6.0))
                actions.append(Subscribe(self.topics.blob_filter(ref.sha256)))
        if self.fetches:
            return [*actions, *self._is("fetching")]
        if release.state == "paused":
            return self._is("staged")
        ended = self.outcome(release)
        if ended is None:
            actions = self._is("trying")
            self.gone = True
            return actions
        return self._is(*ended)

    def _is(self, phase: Phase, reason: str | None = None) -> list[Action]:
        assert self.release is not None
        version = self.release.version
        running = version if phase == "committed" else self.report.running
        report = Report(running=running, release=version, phase=phase, profile=self.profile, reason=reason)
        if self.gone or report == self.report:
            return []
        self.report = report
        self.said.said()
        return [self._say(report, retain=True)]

    def _say(self, manifest: Report | Want, *, retain: bool = False) -> Publish:
        data = self.signer.seal(self.federation, self.id, manifest)
        return Publish(self.topics.from_(self.id, manifest.kind), data, retain=retain)
