"""S2 without the broker's help: no access rules at all, on a real Mosquitto. The application has to let nothing through.

Everything that a stranger, or a device with a key of its own, can say goes to every topic of the federation: each kind of
manifest, in everybody's name, recorded messages of others, statements about keys, chunks and nonsense. Whatever does not
come from who it is from must have no effect: no event, no message sent in answer, nothing remembered.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from protocol.bus import Action, Bus, Delivery, Event, Publish, Subscribe
from protocol.client_end import ClientEnd
from protocol.codec import encode_adapter, encode_bank, reference
from protocol.coordinator_end import CoordinatorEnd
from protocol.envelope import COORDINATOR, KINDS
from protocol.events import BrokerLink, ClientSeen, LinkChanged, NotDrawn, Noticed, OfferMade, PlanReady
from protocol.link import Link
from protocol.messages import (
    ClassBankManifest,
    ClientAdapter,
    LargeBlobRef,
    Manifest,
    Need,
    Notice,
    Offer,
    Receipt,
    Recipe,
    RoundPlan,
    Status,
    Successor,
    TextBank,
)
from protocol.mqtt import MqttBus
from protocol.release.desk_end import DeskEnd
from protocol.release.manifests import Release, Report, Smoke, Want
from protocol.settings import BrokerSettings
from protocol.storage.at_rest import KeptBlob
from protocol.topics import Topics, parse
from protocol.transfer.parcel import Parcel
from protocol.trust.gate import FirstUse
from protocol.trust.signing import Signer
from tests.conftest import wait_until
from tests.faults.rights import DEVICES, LAB, SHA
from tests.network import addressee

VICTIM, OTHER = DEVICES
BANK = TextBank(1, ("x", "y"), ("a {}",), np.eye(2, 8, dtype=np.float32), 100.0, "clip", "digest")
ADAPTER = {"x.lora_A": np.ones((4, 50), np.float32)}
RELEASE = Release(
    version=1, artefact=LargeBlobRef(sha256=SHA, size=5), smoke=Smoke(picture="AAAA", label="x", embedding="AAAA")
)
DESK = "desk"
UPDATE = b"an update that nobody has asked for"
KINDS_OF_TOPICS = ("offer", "need", "status", "receipt", "adapter", "notice", "check", "want", "report")
TOPICS = [
    *(LAB.broadcast(kind) for kind in ("classes", "round", "release", "key")),
    *(LAB.to(client, kind) for client in (VICTIM, COORDINATOR) for kind in KINDS_OF_TOPICS),
    *(LAB.from_(client, kind) for client in (VICTIM, COORDINATOR) for kind in KINDS_OF_TOPICS),
]


def a_plan(number: int, participants: tuple[str, ...] = (VICTIM,), state: str = "open") -> RoundPlan:
    return RoundPlan(
        run="run-1",
        start=1,
        round=number,
        state=state,
        classes=reference(encode_bank(BANK)).sha256,
        adapter=reference(encode_adapter(ADAPTER)),
        participants=participants,
        recipe=Recipe(),
        seed=0,
        deadline_s=60.0,
    )


def manifests(upload: str, attacker: str) -> dict[str, Manifest]:
    """One of each kind, as harmful as it can be: about the upload that is really under way, or a round to come."""
    blob = reference(UPDATE)
    offer = Offer(
        round=1, base=SHA, blob=blob, samples=1, loss=0, accuracy=0, train_seconds=0, bytes_received=0, run="run-1"
    )
    made: dict[str, Manifest] = {
        "classes": ClassBankManifest(version=9, blob=blob),
        "round": a_plan(99, state="finished"),
        "adapter": ClientAdapter(run="run-1", round=1, adapter=blob),
        "offer": offer,
        "need": Need(sha256=upload, missing="80"),
        "receipt": Receipt(round=1, sha256=upload, accepted=True, reason="accepted"),
        "notice": Notice(reason="quarantined", detail="leave"),
        "status": Status(state="online", phase="failed", round=1),
        "key": Successor(next=attacker),
        "release": RELEASE.model_copy(update={"version": 9, "state": "aborted"}),
        "want": Want(sha256=SHA, missing="80"),
        "report": Report(running=9, release=1, phase="committed"),
    }
    assert made.keys() == KINDS.keys()
    return made


@dataclass
class Recorded:
    """A bus that remembers what was sent."""

    bus: Bus

    def __post_init__(self) -> None:
        self.sent: list[str] = []

    def do(self, action: Action) -> None:
        if isinstance(action, Publish):
            self.sent.append(action.topic)
        self.bus.do(action)

    def receive(self, timeout: float) -> Event | None:
        return self.bus.receive(timeout)

    def room(self) -> int:
        return self.bus.room()

    def drained(self) -> bool:
        return self.bus.drained()

    def wake(self) -> None:
        self.bus.wake()

    def close(self, last: Publish | None = None) -> None:
        self.bus.close(last)


class Federation:
    """A coordinator and a client in the middle of a round, and a desk with a release, on a broker without rules."""

    def __init__(self, url: str) -> None:
        self._settings = BrokerSettings(url=url)
        self.coordinator = CoordinatorEnd("lab", random.Random(0), trust=FirstUse())
        self.client = ClientEnd("lab", VICTIM, random.Random(1))
        self.other = ClientEnd("lab", OTHER, random.Random(2))
        self.desk = DeskEnd("lab", random.Random(3), trust=FirstUse({VICTIM: self.client._signer.public}))
        self.tap = self.open("tap")
        self.tap.do(Subscribe("#"))
        self.recorded: list[Delivery] = []
        self.buses = {name: Recorded(self.open(name)) for name in (COORDINATOR, VICTIM, OTHER, DESK)}
        ends = {COORDINATOR: self.coordinator, VICTIM: self.client, OTHER: self.other, DESK: self.desk}
        self.links = {name: Link(bus, ends[name]) for name, bus in self.buses.items()}
        self.events: dict[str, list[object]] = {name: [] for name in self.links}

    def open(self, name: str) -> MqttBus:
        return MqttBus.open(self._settings, name)

    def poll(self) -> None:
        for name, link in self.links.items():
            self.events[name] += link.poll(0.0)
        while isinstance(event := self.tap.receive(0.0), Delivery):
            self.recorded.append(event)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        def polled() -> bool:
            self.poll()
            return condition()

        wait_until(polled, 60, what)

    def say(self, coordinator: list[Action]) -> None:
        self.links[COORDINATOR].do(coordinator)

    def begin(self) -> str:
        """Let everybody come in, and the client offer an update that is never asked for; return the update's hash."""
        for name, end in ((VICTIM, self.client), (OTHER, self.other)):
            self.until(lambda name=name: any(isinstance(e, LinkChanged) for e in self.events[name]), "a link")
            self.links[name].do(end.announce(Status(state="online")))
        self.links[DESK].do(self.desk.announce(RELEASE, {SHA: KeptBlob(Path("none"), 5)}))
        ref, actions = self.coordinator.publish_bank(BANK)
        plan = a_plan(1).model_copy(update={"adapter": self.coordinator.serve_adapter(ADAPTER), "classes": ref.sha256})
        self.say([*actions, *self.coordinator.publish_plan(plan)])
        self.until(lambda: any(isinstance(event, PlanReady) for event in self.events[VICTIM]), "the plan")
        offer = Offer(
            round=1, base=SHA, blob=reference(b"mine"), samples=1, loss=0, accuracy=0, train_seconds=0, bytes_received=0
        )
        self.links[VICTIM].do(self.client.offer(Parcel(offer, b"mine")))
        seen = {VICTIM, OTHER}
        self.until(lambda: {e.client for e in self.events[COORDINATOR] if isinstance(e, ClientSeen)} >= seen, "both")
        return offer.blob.sha256

    def mark(self, number: int) -> None:
        """Let a round pass without the client, and the client say so: what came before has been judged then."""
        self.say(self.coordinator.publish_plan(a_plan(number, participants=("nobody",))))
        self.until(lambda: self._passed(number), "the round that marks the end")
        self.links[VICTIM].do(self.client.announce(Status(state="online", detail=f"mark {number}")))
        self.until(lambda: self._marked(number), "the status that marks the end")

    def _passed(self, number: int) -> bool:
        return any(isinstance(event, NotDrawn) and event.plan.round == number for event in self.events[VICTIM])

    def _marked(self, number: int) -> bool:
        return any(
            isinstance(event, ClientSeen) and event.status.detail == f"mark {number}" for event in self.events[COORDINATOR]
        )

    def close(self) -> None:
        for bus in (*self.buses.values(), self.tap):
            bus.close()


@pytest.fixture
def federation(mosquitto: Callable[..., str]) -> Iterator[Federation]:
    made = Federation(mosquitto())
    yield made
    made.close()


def attacks(federation: Federation, upload: str, key: Signer) -> Iterator[tuple[str, bytes]]:
    """Every manifest in everybody's name on every topic, chunks and nonsense: (topic, payload)."""
    names = (COORDINATOR, VICTIM, OTHER, "stranger")
    for sender, manifest in itertools.product(names, manifests(upload, key.public).values()):
        for topic in TOPICS:
            yield topic, key.seal("lab", sender, manifest, addressee(topic))
        yield LAB.broadcast(manifest.kind), key.seal("other", sender, manifest)
        for kind in KINDS_OF_TOPICS:  # below its own name in another's, or as of another federation
            where = LAB.from_(OTHER, kind)
            yield where, key.seal("other", sender, manifest)
            if sender != OTHER:
                yield where, key.seal("lab", sender, manifest)
    for topic in TOPICS:
        yield from ((topic, junk) for junk in (b"", b"{}", b"\xff" * 64, b"a.b.c", bytes(20_000)))
    for blob in (SHA, upload, reference(UPDATE).sha256):
        yield LAB.blob(blob, 0), UPDATE
        yield LAB.upload(VICTIM, blob, 0), UPDATE
        yield LAB.upload(COORDINATOR, blob, 0), UPDATE
    yield from ((f"clipcast/1/lab/{odd}", b"x") for odd in ("from", "to/x", "blob/1/2", "unknown", "from/jetson-1/blob/x/y"))
    yield Topics("other").broadcast("round"), key.seal("lab", COORDINATOR, a_plan(99))


@pytest.mark.parametrize("attacker", ["stranger", OTHER])
def test_s2_without_access_rules_nothing_has_an_effect(
    federation: Federation, attacker: str, score: Callable[..., None]
) -> None:
    upload = federation.begin()
    federation.mark(2)
    key = Signer() if attacker == "stranger" else federation.other._signer
    before = {name: len(events) for name, events in federation.events.items()}
    sent = {name: len(bus.sent) for name, bus in federation.buses.items()}
    plan, own = federation.client._plan, copy.deepcopy(federation.client._own)
    recorded = {message.payload: message.topic for message in federation.recorded if parse(message.topic).kind != "blob"}
    replayed = [(topic, payload) for payload, said in recorded.items() for topic in (said, *TOPICS)]
    enemy = federation.open("enemy")
    cells = 0
    try:
        for topic, payload in (*attacks(federation, upload, key), *replayed):
            while enemy.room() <= 0:
                federation.poll()
            enemy.do(Publish(topic, payload))
            federation.poll()
            cells += 1
        federation.until(enemy.drained, "all to be said")
        federation.mark(3)
    finally:
        enemy.close()
    effects = [
        event for name, events in federation.events.items() for event in events[before[name] :] if not _expected(event)
    ]
    answers = [
        topic for name, bus in federation.buses.items() for topic in bus.sent[sent[name] :] if not _said_anyway(name, topic)
    ]
    assert federation.client._plan is not None
    assert plan is not None
    assert federation.client._own == own
    assert federation.client._plan.round == 3
    turned_away = sum(federation.coordinator.gate.counts.values()) + sum(federation.client.gate.counts.values())
    assert turned_away > cells / 4  # the others are on topics that neither listens to
    assert sum(federation.desk.gate.counts.values()) > cells / 20
    who = "a stranger" if attacker == "stranger" else "another device"
    score("S2", f"effects of what {who} says, without access rules", len(effects), f"of {cells}", "0", passed=not effects)
    assert not answers, answers[:3]


def _expected(event: object) -> bool:
    """What the rounds that mark the end bring, and what the client says anyway: its status, its offer.

    And that the client is told of somebody who speaks under its name with another key; it logs that and goes on.
    """
    match event:
        case NotDrawn(plan=plan):
            return plan.round in (1, 2, 3)
        case ClientSeen(status=status):
            return status.phase == "waiting" and status.state == "online"
        case OfferMade(client=client, offer=offer):
            return (client, offer.blob.sha256) == (VICTIM, reference(b"mine").sha256)
        case Noticed(notice=notice):
            return notice.reason == "wrong-key"
        case BrokerLink(up=True) | LinkChanged(up=True):
            return True
        case _:
            return False


def _said_anyway(name: str, topic: str) -> bool:
    """The coordinator's plans and its notices to who is not heard; a client's status, offer and needs."""
    address = parse(topic)
    if name == COORDINATOR:
        return address.kind in ("round", "classes", "notice")
    if name == DESK:
        return address.kind == "release"
    return address.client == name and address.kind in ("status", "offer", "need")
