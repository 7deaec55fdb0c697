"""The coordinator's end of the wire, sans-I/O: bus events and the time go in; actions and events come out.

It broadcasts manifests and the blobs they point to (needs of many clients are merged, each chunk is published once),
takes uploads from offer to whole update, and sends receipts. Whether an update is any good is not its business.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from protocol.bus import Action, Connected, Delivery, Disconnected, Event, Publish, Subscribe
from protocol.codec import decode_update, encode_adapter, encode_bank, reference
from protocol.envelope import COORDINATOR, expect
from protocol.errors import BusError, Refused, WireError
from protocol.events import (
    BrokerLink,
    ClientSeen,
    Cloned,
    CoordinatorEvent,
    OfferMade,
    OfferTooLarge,
    UpdateArrived,
    UpdateUnreadable,
)
from protocol.messages import (
    Adapter,
    BlobRef,
    ClassBankManifest,
    ClientAdapter,
    Manifest,
    Need,
    Notice,
    Offer,
    Receipt,
    RoundPlan,
    Status,
    Successor,
    TextBank,
    Verdict,
)
from protocol.release.manifests import Report, Want
from protocol.storage.at_rest import KeptBlob, kept
from protocol.storage.partial import FilePartials, MemoryPartials, Partials
from protocol.topics import Address, Topics, parse
from protocol.transfer.exchange import BROADCAST_S, CHUNK_EXPIRY_S, LASTING_CAP_S, NEED_S, Fetch, Repeat, Serve, chunk_size
from protocol.transfer.turns import Turns
from protocol.trust import succession
from protocol.trust.gate import FirstUse, Gate, Trust
from protocol.trust.notices import CLONED, Notices
from protocol.trust.sealing import Unsealer, purpose
from protocol.trust.signing import Signer

log = logging.getLogger(__name__)

GATHER_S = 0.05
UPLOAD_WINDOW = 8
UPLOADS_AT_ONCE = 8
BROADCASTS = (ClassBankManifest.kind, RoundPlan.kind)
RELEASES = (Want.kind, Report.kind)


@dataclass
class _Client:
    """What is under way with one client: at most one upload, and the last receipt."""

    offer: Offer | None = None
    fetch: Fetch | None = None
    receipt: Receipt | None = None


class CoordinatorEnd:
    """The coordinator's side of the protocol. All methods return the actions that the bus should carry out.

    Of at most `uploads_at_once` clients it takes an upload at a time; the others wait, with their updates on their disks.
    With a folder `state`, what has arrived of an upload survives a restart. With `seal_updates` it takes only updates that
    were sealed to its key, which the plan has to name.
    """

    def __init__(
        self,
        federation: str,
        rng: random.Random,
        max_update_bytes: int = 64 * 1024 * 1024,
        *,
        uploads_at_once: int = UPLOADS_AT_ONCE,
        state: Path | None = None,
        trust: Trust | None = None,
        seal_updates: bool = False,
    ) -> None:
        self.topics = Topics(federation)
        self.bytes_up: Counter[str] = Counter()
        self._rng = rng
        self._signer = Signer() if state is None else Signer.open(state)
        self._keys = b"" if state is None else succession.load(state, federation, self._signer.public)
        self.gate = Gate(federation, trust or FirstUse())
        self._unsealer = None
        if seal_updates:
            self._unsealer = Unsealer() if state is None else Unsealer.open(state)
        self._max_update = max_update_bytes
        self._chunk_size = chunk_size(None)
        self._retained: dict[str, Manifest] = {}
        self._own: dict[str, ClientAdapter] = {}
        self._lasting = Repeat(rng, BROADCAST_S, LASTING_CAP_S)
        self._serves: dict[str, Serve] = {}
        self._clients: dict[str, _Client] = {}
        self._notices = Notices()
        self._turns = Turns(uploads_at_once)
        self._partials: Partials = MemoryPartials() if state is None else FilePartials(state / "partial")

    @property
    def seal_to(self) -> str | None:
        """The public key that updates must be sealed to, None if they travel open."""
        return None if self._unsealer is None else self._unsealer.public

    def take_bytes_up(self) -> dict[str, int]:
        """Return the payload bytes that came from each client since the last time."""
        taken, self.bytes_up = dict(self.bytes_up), Counter()
        return taken

    def publish_bank(self, bank: TextBank) -> tuple[BlobRef, list[Action]]:
        """Announce a class bank, retained, and serve its blob from now on."""
        ref = self._serve("classes", encode_bank(bank))
        manifest = ClassBankManifest(version=bank.version, blob=ref)
        is_news = self._retained.get(manifest.kind) != manifest
        return ref, self._retain(manifest) if is_news else []

    def serve_adapter(self, adapter: Adapter) -> BlobRef:
        """Serve the global adapter of the next plan; it replaces the last one."""
        return self._serve("round", encode_adapter(adapter))

    def serve_client_adapters(self, run: str, number: int, adapters: Mapping[str, Adapter]) -> dict[str, ClientAdapter]:
        """Serve the adapters that clients start round `number` from; they replace the last round's. Equal ones once.

        What lies in a file of its own is served from there.
        """
        self._serves = {slot: serve for slot, serve in self._serves.items() if slot in BROADCASTS}
        own: dict[str, ClientAdapter] = {}
        for client, adapter in adapters.items():
            blob = encode_adapter(adapter)
            ref = reference(blob, self._chunk_size)
            if all(serve.ref.sha256 != ref.sha256 for serve in self._serves.values()):
                self._serve(ref.sha256, kept(adapter, ref.sha256) or blob)
            own[client] = ClientAdapter(run=run, round=number, adapter=ref)
        return own

    def publish_client_adapters(self, own: Mapping[str, ClientAdapter]) -> list[Action]:
        """Announce each client's own adapter, retained, before the plan that asks for it."""
        self._own = dict(sorted(own.items()))
        return [self._announce_own(client) for client in self._own]

    def publish_plan(self, plan: RoundPlan) -> list[Action]:
        """Announce a round plan, retained. Its adapter must be served already. Uploads of other rounds are given up."""
        for state in self._clients.values():
            offer = state.offer
            if offer is not None and offer.round != plan.round and not plan.takes_late(offer.run, offer.round):
                state.offer = state.fetch = None
        under_way = {client for client, state in self._clients.items() if state.fetch is not None}
        self._partials.retain({*plan.participants, *under_way})
        return self._retain(plan)

    def fetch(self, client: str, offer: Offer) -> None:
        """Ask for the update that a client offers; it replaces one that is under way from this client."""
        state = self._clients.setdefault(client, _Client())
        known = state.fetch
        same = known is not None and known.ref.sha256 == offer.blob.sha256  # perhaps cut anew
        partial = known.partial if known is not None and same else self._partials.open(client, offer.blob)
        state.offer, state.fetch = offer, Fetch(offer.blob, Repeat(self._rng, NEED_S), UPLOAD_WINDOW, partial)
        self._turns.ask(client)

    def cut_off(self, client: str) -> None:
        """Give up what is under way with a client, and remember nothing of it."""
        self.give_up(client)
        self.gate.forget(client)

    def give_up(self, client: str) -> None:
        """Give up what is under way with a client."""
        state = self._clients.pop(client, None)
        if state is not None and state.fetch is not None:
            state.fetch.partial.clear()
        self._turns.end(client)

    def answer(self, client: str, offer: Offer, verdict: Verdict) -> list[Action]:
        """Send the receipt for an update, and keep it to answer repeated offers."""
        receipt = Receipt(
            round=offer.round,
            sha256=offer.blob.sha256,
            accepted=verdict.accepted,
            reason=verdict.reason,
            detail=verdict.detail[:500],
        )
        state = self._clients.setdefault(client, _Client())
        state.receipt, state.offer, state.fetch = receipt, None, None
        return [self._to(client, receipt)]

    def handle(self, event: Event, now: float) -> tuple[list[Action], list[CoordinatorEvent]]:
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
                    return self._delivered(address, payload, now)
                except WireError as error:
                    return [], self._turned_away(client, self.gate.refuse(topic, error))

    def tick(self, now: float, room: int, drained: bool = True) -> list[Action]:
        """Say what is due: needs of uploads, and at most `room` chunks of broadcasts; `drained`: all before have landed."""
        actions: list[Action] = [self._to(client, notice) for client, notice in self._notices.due(now)]
        actions += self._say_lasting() if self._lasting.due(now) else []
        for client in self._turns.now(now):
            state = self._clients.get(client)
            fetch = state.fetch if state is not None else None
            if fetch is None:
                self._turns.end(client)
            elif missing := fetch.need(now):
                actions.append(self._to(client, Need(sha256=fetch.ref.sha256, missing=missing)))
        for serve in self._serves.values():
            if drained:
                serve.landed()
            for index, data in serve.take(room, now):
                room -= 1
                actions.append(Publish(self.topics.blob(serve.ref.sha256, index), data, expiry_s=CHUNK_EXPIRY_S))
        return actions

    def _serve(self, slot: str, blob: bytes | KeptBlob) -> BlobRef:
        ref = reference(blob[:], self._chunk_size)
        known = self._serves.get(slot)
        if known is None or known.ref != ref:  # else somebody may be about to get it
            self._serves[slot] = Serve(blob, ref, GATHER_S)
        return ref

    def _retain(self, manifest: Manifest) -> list[Action]:
        self._retained[manifest.kind] = manifest
        self._lasting.said()
        return [self._broadcast(manifest)]

    def _connected(self, max_packet: int | None) -> list[Action]:
        try:
            self._cut_anew(chunk_size(max_packet))
        except WireError as error:
            raise BusError(
                f"the broker takes packets of {max_packet} bytes only: {error}. Raise its max_packet_size"
            ) from error
        actions: list[Action] = [Subscribe(name) for name in self.topics.coordinator_filters()]
        for state in self._clients.values():
            if state.fetch is not None:
                state.fetch.repeat.again()
        self._lasting.said()
        return [*actions, *self._say_lasting()]

    def _say_lasting(self) -> list[Action]:
        """Say what is retained: to a broker that has just taken us in, and again, because one may lose a message unseen."""
        # The keys first: all else is signed with the newest.
        keys = [Publish(self.topics.broadcast(Successor.kind), self._keys, retain=True)] if self._keys else []
        own = [self._announce_own(client) for client in self._own]
        return [*keys, *own, *(self._broadcast(manifest) for manifest in self._retained.values())]

    def _cut_anew(self, size: int) -> None:
        """Cut what is served for a broker that takes packets of another size, and say so in the retained manifests."""
        if size == self._chunk_size:
            return
        self._chunk_size = size
        for slot, serve in list(self._serves.items()):
            ref = self._serve(slot, serve.blob)
            match self._retained.get(slot):
                case ClassBankManifest() as manifest:
                    self._retained[slot] = manifest.model_copy(update={"blob": ref})
                case RoundPlan() as plan if plan.adapter.sha256 == ref.sha256:
                    self._retained[slot] = plan.model_copy(update={"adapter": ref})
            for client, own in self._own.items():
                if own.adapter.sha256 == ref.sha256:
                    self._own[client] = own.model_copy(update={"adapter": ref})

    def _delivered(self, address: Address, payload: bytes, now: float) -> tuple[list[Action], list[CoordinatorEvent]]:
        client = address.client
        if address.federation != self.topics.federation or address.direction != "from" or client is None:
            raise Refused("wrong-topic", "this is not said to the coordinator")
        if address.kind == "blob":
            assert address.sha256 is not None
            assert address.index is not None
            return [], self._chunk(client, address.sha256, address.index, payload, now)
        if address.kind in RELEASES:
            return [], []  # the desk's (release/desk_end.py); here the device's two processes would seem to be two devices
        envelope = self.gate.open(address, payload)
        self.bytes_up[client] += len(payload)
        match address.kind:
            case "status":
                return [], [ClientSeen(client, expect(envelope, Status))]
            case "need":
                self._needed(expect(envelope, Need), now)
                return [], []
            case "offer":
                return self._offered(client, expect(envelope, Offer), now)
            case _:
                raise Refused("wrong-topic", f"clients have no business with {address.kind!r}")

    def _turned_away(self, client: str | None, refused: Refused) -> list[CoordinatorEvent]:
        """See to it that a client hears why it is not heard."""
        if client is None:
            return []
        self._notices.note(client, refused)
        return [Cloned(client)] if refused.verdict == CLONED else []

    def notify(self, client: str, reason: str, detail: str) -> list[Action]:
        """Tell a client something."""
        return [self._to(client, Notice(reason=reason, detail=detail[:500]))]

    def _needed(self, need: Need, now: float) -> None:
        for serve in self._serves.values():
            if serve.ref.sha256 == need.sha256:
                serve.need(need.missing, now)
                return
        log.debug("a client asks for blob %s, which is no longer served", need.sha256[:12])

    def _offered(self, client: str, offer: Offer, now: float) -> tuple[list[Action], list[CoordinatorEvent]]:
        state = self._clients.setdefault(client, _Client())
        answered = state.receipt
        if answered is not None and (answered.round, answered.sha256) == (offer.round, offer.blob.sha256):
            return [self._to(client, answered)], []
        if offer.blob.size > self._max_update:
            problem = f"{offer.blob.size} bytes exceed the {self._max_update} that an update may have"
            return [], [OfferTooLarge(client, offer, problem)]
        if state.fetch is None or state.offer is None or (state.offer.round, state.offer.blob) != (offer.round, offer.blob):
            return [], [OfferMade(client, offer)]
        state.fetch.nudge(now)
        state.offer = offer
        return [], []

    def _chunk(self, client: str, digest: str, index: int, data: bytes, now: float) -> list[CoordinatorEvent]:
        state = self._clients.get(client)
        if state is None or state.fetch is None or state.offer is None or state.fetch.ref.sha256 != digest:
            self.gate.unwanted()
            return []
        self.bytes_up[client] += len(data)
        state.fetch.chunk(index, data, now)
        self._turns.progress(client, now)
        blob = state.fetch.blob()
        if blob is None:
            return []
        state.fetch.partial.clear()
        state.fetch = None
        return [self._opened(client, state.offer, blob)]

    def _opened(self, client: str, offer: Offer, blob: bytes) -> CoordinatorEvent:
        if self._unsealer is not None:
            try:
                blob = self._unsealer.unseal(blob, purpose(self.topics.federation, client, offer.run, offer.round))
            except WireError as error:
                return UpdateUnreadable(client, offer, str(error), "not-sealed")
        try:
            return UpdateArrived(client, offer, decode_update(blob), blob)
        except WireError as error:
            return UpdateUnreadable(client, offer, str(error))

    def _to(self, client: str, manifest: Manifest) -> Publish:
        return Publish(self.topics.to(client, manifest.kind), self._sealed(manifest, client), expiry_s=CHUNK_EXPIRY_S)

    def _announce_own(self, client: str) -> Publish:
        return Publish(self.topics.to(client, ClientAdapter.kind), self._sealed(self._own[client], client), retain=True)

    def _broadcast(self, manifest: Manifest) -> Publish:
        return Publish(self.topics.broadcast(manifest.kind), self._sealed(manifest), retain=True)

    def _sealed(self, manifest: Manifest, to: str | None = None) -> bytes:
        return self._signer.seal(self.topics.federation, COORDINATOR, manifest, to)
