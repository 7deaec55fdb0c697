"""The desk's end of the wire, sans-I/O: it announces a release to all devices, serves its blobs, and takes their reports.

The desk speaks with the coordinator's key, over a connection of its own, on numbers of its own: what it says, `release`, the
coordinator's other end never says. Of what devices say it hears `want` and `report` alone, which come from the process that
answers there; the one that trains would seem to be a second device of that name.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from protocol.bus import Action, Connected, Delivery, Disconnected, Event, Publish, Subscribe
from protocol.envelope import COORDINATOR, expect
from protocol.errors import BusError, Refused, WireError
from protocol.events import BrokerLink, Cloned
from protocol.messages import BlobRef, Successor
from protocol.release.manifests import Release, Report, Want
from protocol.storage.at_rest import KeptBlob
from protocol.topics import Address, Topics, parse
from protocol.transfer.exchange import BROADCAST_S, CHUNK_EXPIRY_S, LASTING_CAP_S, Repeat, Serve, chunk_size
from protocol.trust import succession
from protocol.trust.gate import FirstUse, Gate, Trust
from protocol.trust.notices import CLONED
from protocol.trust.signing import FileSequence, Signer, private_key

log = logging.getLogger(__name__)

FOLDER = "releases"
"""In the coordinator's state: what is the desk's own."""

GATHER_S = 1.0
REST_S = 4.0
"""So long a chunk is not said again: who asks for it meanwhile most likely has it on its way."""

Ref = TypeVar("Ref", bound=BlobRef)


@dataclass(frozen=True)
class Reported:
    """A device's report. `instance` and `sequence` are its message's: a broker gives the newest out again and again."""

    client: str
    report: Report
    instance: str
    sequence: int


DeskEvent = Reported | Cloned | BrokerLink


class DeskEnd:
    """The desk's side of the protocol. All methods return the actions that the bus should carry out."""

    def __init__(self, federation: str, rng: random.Random, state: Path | None = None, trust: Trust | None = None) -> None:
        """Sign with the key in the coordinator's folder `state`; raises KeyFileError."""
        self.topics = Topics(federation)
        self._signer = Signer() if state is None else desk_signer(state)
        self._keys = b"" if state is None else succession.load(state, federation, self._signer.public)
        self.gate = Gate(federation, trust or FirstUse())
        self._chunk_size = chunk_size(None)
        self._release: Release | None = None
        self._serves: dict[str, Serve] = {}
        self._lasting = Repeat(rng, BROADCAST_S, LASTING_CAP_S)

    def announce(self, release: Release, blobs: Mapping[str, KeptBlob]) -> list[Action]:
        """Announce a release, retained, and serve its blobs, by hash, from their files; it replaces the one before.

        Raises WireError if a blob cannot travel in chunks as small as the broker's.
        """
        cut = _cut(release, self._chunk_size)
        served: dict[str, Serve] = {}
        for ref in sorted(cut.blobs, key=lambda ref: ref.size):  # the small ones are not behind the large one for long
            known = self._serves.get(ref.sha256)  # somebody may be about to get it
            served[ref.sha256] = known if known and known.ref == ref else Serve(blobs[ref.sha256], ref, GATHER_S, REST_S)
        self._serves, self._release = served, cut
        self._lasting.said()
        return self._say_lasting()

    def handle(self, event: Event, now: float) -> tuple[list[Action], list[DeskEvent]]:
        """Take in a bus event. What the protocol does not allow is logged and changes nothing."""
        match event:
            case Connected(max_packet=limit):
                return self._connected(limit), [BrokerLink(up=True)]
            case Disconnected(reason=reason):
                return [], [BrokerLink(up=False, reason=reason)]
            case Delivery(topic=topic, payload=payload):
                client = None
                try:
                    address = parse(topic)
                    client = address.client
                    return [], self._delivered(address, payload, now)
                except WireError as error:
                    refused = self.gate.refuse(topic, error)
                    return [], [Cloned(client)] if client is not None and refused.verdict == CLONED else []

    def tick(self, now: float, room: int, drained: bool = True) -> list[Action]:
        """Say what is due: the release again, and at most `room` chunks; `drained`: all before have landed."""
        actions: list[Action] = self._say_lasting() if self._lasting.due(now) else []
        for serve in self._serves.values():
            if drained:
                serve.landed()
            for index, data in serve.take(room, now):
                room -= 1
                actions.append(Publish(self.topics.blob(serve.ref.sha256, index), data, expiry_s=CHUNK_EXPIRY_S))
        return actions

    def _connected(self, max_packet: int | None) -> list[Action]:
        self._chunk_size = chunk_size(max_packet)
        actions: list[Action] = [Subscribe(name) for name in self.topics.desk_filters()]
        if self._release is None:
            return [*actions, *self._say_lasting()]
        try:
            blobs = {digest: serve.blob for digest, serve in self._serves.items() if isinstance(serve.blob, KeptBlob)}
            return [*actions, *self.announce(self._release, blobs)]
        except WireError as error:
            raise BusError(
                f"the broker takes packets of {max_packet} bytes only: {error}. Raise its max_packet_size"
            ) from error

    def _say_lasting(self) -> list[Action]:
        """Say what is retained; the keys first, by which all else is signed, as no coordinator may be there to do so."""
        keys = [Publish(self.topics.broadcast(Successor.kind), self._keys, retain=True)] if self._keys else []
        if self._release is None:
            return [*keys]
        data = self._signer.seal(self.topics.federation, COORDINATOR, self._release)
        return [*keys, Publish(self.topics.broadcast(Release.kind), data, retain=True)]

    def _delivered(self, address: Address, payload: bytes, now: float) -> list[DeskEvent]:
        client = address.client
        if address.federation != self.topics.federation or address.direction != "from" or client is None:
            raise Refused("wrong-topic", "this is not said to the desk")
        if address.kind not in (Want.kind, Report.kind):
            return []
        envelope = self.gate.open(address, payload)
        if address.kind == Report.kind:
            return [Reported(client, expect(envelope, Report), envelope.instance, envelope.sequence)]
        want = expect(envelope, Want)
        serve = self._serves.get(want.sha256)
        if serve is None:
            log.debug("%s wants blob %s, which is no longer served", client, want.sha256[:12])
        else:
            serve.need(want.missing, now)
        return []


def desk_signer(state: Path) -> Signer:
    """Return the coordinator's key with the desk's own numbers, of which one desk at a time may take any.

    Raises KeyFileError.
    """
    sequence = FileSequence(state / FOLDER / "sequence")
    sequence.reserve()
    return Signer(private_key(state / "key.pem"), sequence)


def _cut(release: Release, size: int) -> Release:
    """Return a release whose blobs are cut into chunks of `size` bytes; raises WireError."""
    adapter, classes = release.adapter, release.classes
    cut = {
        "artefact": _cut_blob(release.artefact, size),
        "adapter": adapter and _cut_blob(adapter, size),
        "classes": classes and _cut_blob(classes, size),
    }
    return release.model_copy(update=cut)


def _cut_blob(ref: Ref, size: int) -> Ref:
    try:
        return type(ref)(sha256=ref.sha256, size=ref.size, chunk_size=size)
    except ValidationError as error:
        problem = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise WireError(f"a blob of {ref.size} bytes cannot travel in chunks of {size}: {problem}") from error
