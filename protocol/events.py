"""What the two ends tell their actors: the wire's happenings as frozen records, without topics or bytes."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.messages import Adapter, Notice, Offer, Receipt, RoundPlan, Status, TextBank, Update


@dataclass(frozen=True)
class PlanReady:
    """A round plan has arrived whole: with its class bank and the adapter to start from, whose hash is `base`."""

    plan: RoundPlan
    bank: TextBank
    adapter: Adapter
    base: str


@dataclass(frozen=True)
class NotDrawn:
    """A round without this client; nothing is fetched for it but the class bank."""

    plan: RoundPlan


@dataclass(frozen=True)
class Finished:
    """The federation is over; its last adapter need not be fetched."""

    plan: RoundPlan


@dataclass(frozen=True)
class Unreadable:
    """A class bank or adapter arrived whole but is not what this version can read. `round` is the plan's that needs it."""

    problem: str
    round: int | None = None


@dataclass(frozen=True)
class Answered:
    """The coordinator's verdict on our update."""

    receipt: Receipt


@dataclass(frozen=True)
class Noticed:
    """The coordinator tells us something."""

    notice: Notice


@dataclass(frozen=True)
class LinkChanged:
    """The link to the broker came up or went down."""

    up: bool
    reason: str = ""


ClientEvent = PlanReady | NotDrawn | Finished | Unreadable | Answered | Noticed | LinkChanged


@dataclass(frozen=True)
class ClientSeen:
    """A client announced itself, or its last will did."""

    client: str
    status: Status


@dataclass(frozen=True)
class OfferMade:
    """A client offers an update: it travels once `CoordinatorEnd.fetch` asks for it. Offers are repeated until answered."""

    client: str
    offer: Offer


@dataclass(frozen=True)
class UpdateArrived:
    """An upload is complete and its hash is right; `blob` is the update as it was sealed, or sent if it was not."""

    client: str
    offer: Offer
    update: Update
    blob: bytes = b""


@dataclass(frozen=True)
class UpdateUnreadable:
    """An upload is complete but cannot be read; `reason` is the verdict (docs/operations.md)."""

    client: str
    offer: Offer
    problem: str
    reason: str = "unreadable"


@dataclass(frozen=True)
class OfferTooLarge:
    """A client offered more bytes than an update may have; nothing was fetched."""

    client: str
    offer: Offer
    problem: str


@dataclass(frozen=True)
class Cloned:
    """Two devices speak under one name with one key: nothing of either is taken in."""

    client: str


@dataclass(frozen=True)
class BrokerLink:
    """The link to the broker came up or went down."""

    up: bool
    reason: str = ""


CoordinatorEvent = ClientSeen | OfferMade | UpdateArrived | UpdateUnreadable | OfferTooLarge | Cloned | BrokerLink
