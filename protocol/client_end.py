"""The client's end of the wire, sans-I/O: bus events and the time go in; actions and events for the client come out.

It keeps the client subscribed, fetches the blobs that manifests point to, repeats its offer until a receipt, and answers
needs with chunks. It knows nothing of training.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path

from protocol.bus import Action, Connected, Delivery, Disconnected, Event, Publish, Subscribe, Unsubscribe
from protocol.codec import decode_adapter, decode_bank
from protocol.envelope import expect
from protocol.errors import BusError, Refused, WireError
from protocol.events import Answered, ClientEvent, Finished, LinkChanged, NotDrawn, Noticed, PlanReady, Unreadable
from protocol.messages import (
    Adapter,
    BlobRef,
    ClassBankManifest,
    ClientAdapter,
    Manifest,
    Need,
    Notice,
    Receipt,
    RoundPlan,
    Status,
    Successor,
    TextBank,
    TrainingResult,
)
from protocol.topics import Address, Topics, parse
from protocol.transfer.download import Download, Shelf
from protocol.transfer.exchange import CHUNK_EXPIRY_S, LASTING_CAP_S, PRESENCE_S, Repeat
from protocol.transfer.parcel import Parcel, pack
from protocol.transfer.upload import Upload
from protocol.trust.gate import Anchor, FirstUse, Gate
from protocol.trust.sealing import purpose, seal
from protocol.trust.signing import Signer

log = logging.getLogger(__name__)

AnyDownload = Download[TextBank] | Download[Adapter]


class ClientEnd:
    """One client's side of the protocol. All methods return the actions that the bus should carry out."""

    def __init__(
        self, federation: str, client_id: str, rng: random.Random, state: Path | None = None, trust: Anchor | None = None
    ) -> None:
        self.topics = Topics(federation)
        self.bytes_received = 0
        self._id = client_id
        self._rng = rng
        self._shelf = Shelf(rng, state)
        self._signer = Signer() if state is None else Signer.open(state)
        self._trust = trust or FirstUse()
        self.gate = Gate(federation, self._trust, None if state is None else state / "marks.json")
        self._status = Status(state="online")
        self._presence = Repeat(rng, PRESENCE_S, LASTING_CAP_S)
        self._plan: RoundPlan | None = None
        self._own: dict[str, ClientAdapter] = {}  # by run: the open plan's, and at most one other
        self._announced: tuple[object, ...] | None = None
        self._bank: Download[TextBank] | None = None
        self._adapter: Download[Adapter] | None = None
        self._upload = Upload(rng)

    @property
    def status(self) -> Status:
        """What this client last said of itself."""
        return self._status

    def will(self) -> Publish:
        """Return the last will: the retained status, offline."""
        return self._publish_status(Status(state="offline", phase="stopped", detail="connection lost"))

    def farewell(self) -> Publish:
        """Return what to say when leaving in good order."""
        return self._publish_status(self._status.model_copy(update={"state": "offline", "phase": "stopped"}))

    def announce(self, status: Status) -> list[Action]:
        """Publish what this client is doing, retained."""
        self._status = status
        self._presence.said()
        return [self._publish_status(status)]

    def pack(self, result: TrainingResult, plan: RoundPlan) -> Parcel:
        """Pack what this client trained for a plan, sealed if the plan asks for it; raises WireError."""
        key, info = plan.seal_to, purpose(self.topics.federation, self._id, plan.run, result.round)
        return pack(result, plan.run, None if key is None else lambda blob: seal(blob, key, info))

    def offer(self, parcel: Parcel) -> list[Action]:
        """Offer an update, again and again until its receipt; it replaces an earlier one. Raises WireError if too large."""
        counted = parcel.offer.model_copy(update={"bytes_received": self.bytes_received})
        self._upload.begin(Parcel(counted, parcel.blob))
        self.bytes_received = 0
        return []

    def withdraw(self) -> None:
        """Stop offering: the round is over."""
        self._upload.end()

    def handle(self, event: Event, now: float) -> tuple[list[Action], list[ClientEvent]]:
        """Take in a bus event. What the protocol does not allow is logged and changes nothing."""
        match event:
            case Connected(max_packet=limit):
                return self._connected(limit), [LinkChanged(up=True)]
            case Disconnected(reason=reason):
                return [], [LinkChanged(up=False, reason=reason)]
            case Delivery(topic=topic, payload=payload):
                self.bytes_received += len(payload)
                try:
                    return self._delivered(parse(topic), payload, now)
                except WireError as error:
                    self.gate.refuse(topic, error)
                    return [], []

    def tick(self, now: float, room: int, drained: bool = True) -> list[Action]:
        """Say what is due: needs, the offer, and at most `room` chunks of the upload; `drained`: all before have landed."""
        actions: list[Action] = [self._publish_status(self._status)] if self._presence.due(now) else []
        for wanted in self._downloads():
            if wanted.under_way and (missing := wanted.fetch.need(now)):
                actions.append(self._manifest("need", Need(sha256=wanted.ref.sha256, missing=missing)))
        said, chunks = self._upload.due(now, room, drained)
        offer = self._upload.offer
        if said is not None:
            actions.append(self._manifest("offer", said))
        for index, data in chunks:
            assert offer is not None
            topic = self.topics.upload(self._id, offer.blob.sha256, index)
            actions.append(Publish(topic, data, expiry_s=CHUNK_EXPIRY_S))
        return actions

    def _connected(self, max_packet: int | None) -> list[Action]:
        try:
            self._upload.connected(max_packet)
        except WireError as error:
            raise BusError(
                f"the broker takes packets of {max_packet} bytes only: {error}. Raise its max_packet_size"
            ) from error
        actions: list[Action] = [Subscribe(name) for name in self.topics.client_filters(self._id)]
        for wanted in self._downloads():
            if wanted.under_way:
                wanted.fetch.repeat.again()
                actions.append(Subscribe(self.topics.blob_filter(wanted.ref.sha256)))
        return [*actions, *self.announce(self._status)]

    def _delivered(self, address: Address, payload: bytes, now: float) -> tuple[list[Action], list[ClientEvent]]:
        ours = address.federation == self.topics.federation and address.direction != "from"
        if not ours or address.client not in (None, self._id):
            raise Refused("wrong-topic", "this is not said to this client")
        if address.kind == "blob":
            assert address.sha256 is not None
            assert address.index is not None
            return self._chunk(address.sha256, address.index, payload, now)
        if address.kind == Successor.kind and address.direction == "all":
            return self._followed(payload), []
        return self._manifest_came(address, payload, now)

    def _followed(self, chain: bytes) -> list[Action]:
        """Follow the coordinator to a new key; then ask again for what is retained, which was refused if it came before."""
        if not self._trust.follow(chain, self.topics.federation):
            return []
        return [Subscribe(name) for name in self.topics.client_filters(self._id)]

    def _manifest_came(self, address: Address, payload: bytes, now: float) -> tuple[list[Action], list[ClientEvent]]:
        envelope = self.gate.open(address, payload)
        match address.kind:
            case "classes":
                return self._classes(expect(envelope, ClassBankManifest))
            case "round":
                return self._round(expect(envelope, RoundPlan))
            case "adapter":
                return self._own_adapter(expect(envelope, ClientAdapter))
            case "need":
                self._upload.needed(expect(envelope, Need), now)
                return [], []
            case "receipt":
                receipt = expect(envelope, Receipt)
                return [], [Answered(receipt)] if self._upload.answered(receipt) else []
            case "notice":
                return [], [Noticed(expect(envelope, Notice))]
            case _:
                raise Refused("wrong-topic", f"the coordinator has no business with {address.kind!r}")

    def _classes(self, manifest: ClassBankManifest) -> tuple[list[Action], list[ClientEvent]]:
        if self._bank is not None and self._bank.is_for(manifest.blob):
            return [], []
        actions = self._stop_fetching(self._bank)
        self._bank = self._shelf.begin("classes", manifest.blob, decode_bank)
        return self._fetch(self._bank, actions)

    def _round(self, plan: RoundPlan) -> tuple[list[Action], list[ClientEvent]]:
        # An old one that comes again has an old number. One of an earlier round with a new number is news: the coordinator
        # was set back to a backup.
        if plan == self._plan:
            return [], []  # said again
        self._plan = plan
        if plan.state == "finished":
            return self._give_up_start(), [Finished(plan)]
        if self._id not in plan.participants:
            return self._give_up_start(), [NotDrawn(plan)]
        return self._want_start()

    def _own_adapter(self, manifest: ClientAdapter) -> tuple[list[Action], list[ClientEvent]]:
        known, plan = self._own.get(manifest.run), self._plan
        if known is not None and manifest.round < known.round and (plan is None or plan.round != manifest.round):
            return [], []  # late: a newer round's is here. Of a coordinator that was set back it is said again
        current = {run: own for run, own in self._own.items() if plan is not None and run == plan.run}
        self._own = {**current, manifest.run: manifest}
        return self._want_start()

    def _start(self) -> BlobRef | None:
        """Return the adapter that the open round starts from here, None while that is not known."""
        plan = self._plan
        if plan is None or plan.state != "open" or self._id not in plan.participants:
            return None
        if not plan.individual:
            return plan.adapter
        own = self._own.get(plan.run)
        return own.adapter if own is not None and own.round == plan.round else None

    def _want_start(self) -> tuple[list[Action], list[ClientEvent]]:
        """Fetch what the open round starts from, unless it is here."""
        ref = self._start()
        if ref is None:
            return [], []
        if self._adapter is not None and self._adapter.is_for(ref):
            return [], self._ready()
        actions = self._stop_fetching(self._adapter)
        self._adapter = self._shelf.begin("adapter", ref, decode_adapter)
        return self._fetch(self._adapter, actions)

    def _give_up_start(self) -> list[Action]:
        """Fetch no adapter: this client has no part in the newest plan."""
        actions = self._stop_fetching(self._adapter)
        if actions:
            self._adapter = None
        return actions

    def _downloads(self) -> list[AnyDownload]:
        return [download for download in (self._bank, self._adapter) if download is not None]

    def _stop_fetching(self, wanted: AnyDownload | None) -> list[Action]:
        if wanted is None or not wanted.under_way:
            return []
        return [Unsubscribe(self.topics.blob_filter(wanted.ref.sha256))]

    def _fetch(self, wanted: AnyDownload, actions: list[Action]) -> tuple[list[Action], list[ClientEvent]]:
        """Take a record from the shelf, or listen for its chunks."""
        kept = self._shelf.find(wanted.ref)
        if kept is None:
            return [*actions, Subscribe(self.topics.blob_filter(wanted.ref.sha256))], []
        return actions, self._arrived(wanted, kept)

    def _chunk(self, digest: str, index: int, data: bytes, now: float) -> tuple[list[Action], list[ClientEvent]]:
        for wanted in self._downloads():
            if wanted.under_way and wanted.ref.sha256 == digest:
                wanted.fetch.chunk(index, data, now)
                blob = wanted.fetch.blob()
                if blob is None:
                    return [], []
                self._shelf.keep(blob, {other.ref.sha256 for other in self._downloads()})
                wanted.fetch.partial.clear()
                return [Unsubscribe(self.topics.blob_filter(digest))], self._arrived(wanted, blob)
        self.gate.unwanted()
        return [], []

    def _arrived(self, wanted: AnyDownload, blob: bytes) -> list[ClientEvent]:
        try:
            wanted.record = wanted.read(blob)
        except WireError as error:
            self._forget(wanted)
            return [Unreadable(str(error), None if self._plan is None else self._plan.round)]
        return self._ready()

    def _forget(self, wanted: object) -> None:
        """Give up a blob that has arrived whole but cannot be read: asking again would bring the same bytes."""
        if wanted is self._bank:
            self._bank = None
        else:
            self._adapter = None

    def _ready(self) -> list[ClientEvent]:
        """Report the plan once, when all that it names is here."""
        plan, start, bank, adapter = self._plan, self._start(), self._bank, self._adapter
        if plan is None or start is None or bank is None or adapter is None:
            return []
        if bank.record is None or adapter.record is None:
            return []
        if (bank.ref.sha256, adapter.ref.sha256) != (plan.classes, start.sha256):
            return []
        what = (plan.run, plan.start, plan.round, plan.classes, start.sha256)
        if what == self._announced:
            return []
        self._announced = what
        return [PlanReady(plan, bank.record, adapter.record, start.sha256)]

    def _manifest(self, kind: str, manifest: Manifest) -> Publish:
        data = self._signer.seal(self.topics.federation, self._id, manifest)
        return Publish(self.topics.from_(self._id, kind), data, expiry_s=CHUNK_EXPIRY_S)

    def _publish_status(self, status: Status) -> Publish:
        data = self._signer.seal(self.topics.federation, self._id, status)
        return Publish(self.topics.from_(self._id, "status"), data, retain=True)
