"""What a rogue broker can make of what it has seen: forged, altered, misplaced and repeated messages.

It knows every message and every public key, and has keys of its own; it has no device's and not the coordinator's private
key, but for messages that those signed for another federation, kind or receiver (a device may take part in two).
"""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protocol.bus import Delivery
from protocol.envelope import decode
from protocol.messages import Manifest
from protocol.topics import parse
from protocol.trust.signing import Signer, opened, signer_of

HIGH = 10**9
Make = Callable[["Rogue", Delivery], Delivery | None]


class Ahead:
    """Numbers far above all that was said."""

    def __init__(self) -> None:
        self._last = HIGH

    def next(self) -> int:
        """Return the next number."""
        self._last += 1
        return self._last


@dataclass
class Rogue:
    """A broker with a memory, chance, and what it could get signed elsewhere."""

    rng: random.Random
    seen: list[Delivery]
    signers: dict[str, Signer]  # the true ones, for messages that are true elsewhere
    own: Signer
    federation: str
    clients: Sequence[str]

    def other(self, name: str | None) -> str:
        """Return another client, or a stranger."""
        return self.rng.choice([client for client in (*self.clients, "eve") if client != name])

    def token(self) -> Delivery | None:
        """Return any signed message that was seen."""
        tokens = [delivery for delivery in self.seen if is_token(delivery)]
        return self.rng.choice(tokens) if tokens else None


def is_token(delivery: Delivery) -> bool:
    """Tell whether a message is a signed manifest."""
    return parse(delivery.topic).kind != "blob"


def parts_of(delivery: Delivery) -> tuple[bytes, bytes, bytes]:
    """Return header, payload and signature, each in base64url."""
    header, payload, signature = delivery.payload.split(b".")
    return header, payload, signature


def b64(data: bytes) -> bytes:
    """Return base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def payload_of(delivery: Delivery) -> bytes:
    """Return the bytes that were signed."""
    return opened(delivery.payload, signer_of(delivery.payload))


def manifest_of(delivery: Delivery) -> Manifest:
    """Return the manifest."""
    return decode(payload_of(delivery)).manifest


def said(delivery: Delivery, payload: bytes) -> Delivery:
    """Return other bytes on the same topic."""
    return Delivery(delivery.topic, payload)
