"""What a rogue broker can make of what it has seen: forged, altered, misplaced and repeated messages.

It knows every message and every public key, and has keys of its own; it has no device's and not the coordinator's private
key, but for messages that those signed for another federation, kind or receiver (a device may take part in two).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protocol.bus import Delivery
from protocol.envelope import decode
from protocol.errors import WireError
from protocol.messages import Manifest
from protocol.signing import MAX_TOKEN, Signer, opened, signer_of
from protocol.topics import Topics, parse

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


# Bytes that are not what was signed.


def flipped(rogue: Rogue, delivery: Delivery) -> Delivery:
    data = bytearray(delivery.payload)
    data[rogue.rng.randrange(len(data))] ^= 1 << rogue.rng.randrange(8)
    return said(delivery, bytes(data))


def truncated(rogue: Rogue, delivery: Delivery) -> Delivery:
    return said(delivery, delivery.payload[: rogue.rng.randrange(len(delivery.payload))])


def extended(rogue: Rogue, delivery: Delivery) -> Delivery:
    more = rogue.rng.choice([b".", b"=", b"==", b"\n", b" ", b"A", b".e30", rogue.rng.randbytes(9)])
    return said(delivery, rogue.rng.choice([delivery.payload + more, more + delivery.payload]))


def other_text(rogue: Rogue, delivery: Delivery) -> Delivery | None:
    """The same bytes in another spelling of base64: unused bits set, or the other alphabet."""
    parts = list(parts_of(delivery))
    which = rogue.rng.randrange(3)
    part = parts[which]
    spare = {2: 15, 3: 3}.get(len(part) % 4, 0)
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    if not spare or rogue.rng.random() < 0.2:
        changed = part.replace(b"-", b"+").replace(b"_", b"/")
    else:
        changed = part[:-1] + alphabet[(value := alphabet.index(part[-1:]) ^ rogue.rng.randint(1, spare)) : value + 1]
    parts[which] = changed
    return said(delivery, b".".join(parts)) if changed != part else None


def spliced(rogue: Rogue, delivery: Delivery) -> Delivery | None:
    other = rogue.token()
    if other is None or other.payload == delivery.payload:
        return None
    pairs = list(zip(parts_of(delivery), parts_of(other), strict=True))
    chosen = [pair[rogue.rng.randrange(2)] for pair in pairs]
    payload = b".".join(chosen)
    return None if payload in (delivery.payload, other.payload) else said(delivery, payload)


def rewritten(rogue: Rogue, delivery: Delivery) -> Delivery:
    """Another value somewhere in the manifest, under the old signature."""
    header, _, signature = parts_of(delivery)
    frame = json.loads(payload_of(delivery))
    place = rogue.rng.choice([frame, frame["body"]])
    key = rogue.rng.choice(sorted(place))
    place[key] = rogue.rng.choice([None, 0, 1, 10**12, True, "x", "0" * 64, [], {}])
    return said(delivery, b".".join((header, b64(json.dumps(frame).encode()), signature)))


# Signatures that are not theirs.


def resigned(rogue: Rogue, delivery: Delivery) -> Delivery:
    sender = decode(payload_of(delivery)).sender
    return said(delivery, rogue.own.seal(rogue.federation, sender, manifest_of(delivery)))


def _headed(rogue: Rogue, delivery: Delivery, header: bytes, signature: bytes | None = None) -> Delivery:
    _, payload, old = parts_of(delivery)
    del rogue
    return said(delivery, b".".join((b64(header), payload, old if signature is None else signature)))


def other_algorithm(rogue: Rogue, delivery: Delivery) -> Delivery:
    kid = signer_of(delivery.payload)
    algorithm = rogue.rng.choice(
        ["none", "None", "NONE", "", "eddsa", "EdDSA ", "ES256", "RS256", "PS256", "HS512", None, 1]
    )
    header = json.dumps({"alg": algorithm, "kid": kid}).encode()
    return _headed(rogue, delivery, header, rogue.rng.choice([None, b"", b64(bytes(64))]))


def public_key_as_secret(rogue: Rogue, delivery: Delivery) -> Delivery:
    """HS256 with what everybody knows."""
    kid = signer_of(delivery.payload)
    secret = rogue.rng.choice([kid.encode(), base64.urlsafe_b64decode(kid + "="), b""])
    header, payload = b64(json.dumps({"alg": "HS256", "kid": kid}).encode()), parts_of(delivery)[1]
    signature = b64(hmac.new(secret, header + b"." + payload, hashlib.sha256).digest())
    return said(delivery, b".".join((header, payload, signature)))


def other_kid(rogue: Rogue, delivery: Delivery) -> Delivery:
    kid = rogue.rng.choice(
        [rogue.own.public, "", "A" * 43, "ä" * 43, signer_of(delivery.payload) + "=", "../key.pem", None, 7, ["x"], {}]
    )
    return _headed(rogue, delivery, json.dumps({"alg": "EdDSA", "kid": kid}).encode())


def odd_header(rogue: Rogue, delivery: Delivery) -> Delivery:
    """Duplicate keys, escapes, foreign letters, further fields, other spacing, no object at all."""
    kid = signer_of(delivery.payload)
    header = rogue.rng.choice(
        [
            f'{{"alg":"none","alg":"EdDSA","kid":"{kid}"}}',
            f'{{"alg":"EdDSA","kid":"{rogue.own.public}","kid":"{kid}"}}',
            f'{{"\\u0061lg":"EdDSA","kid":"{kid}"}}',
            f'{{"alg":"EdDS\\u0041","kid":"{kid}"}}',
            f'{{"alg":"EdDSА","kid":"{kid}"}}',  # noqa: RUF001 - a Cyrillic letter, deliberately
            f'{{"alg":"EdDSA","kid":"{kid}","crit":["x"],"x":1}}',
            f'{{"alg":"EdDSA","kid":"{kid}","b64":false,"crit":["b64"]}}',
            f'{{"alg":"EdDSA","kid":"{kid}","jwk":{{"kty":"OKP"}}}}',
            f'{{ "alg": "EdDSA", "kid": "{kid}" }}',
            f'{{"kid":"{kid}","alg":"EdDSA"}}',
            f'\ufeff{{"alg":"EdDSA","kid":"{kid}"}}',
            f'["EdDSA","{kid}"]',
            '"EdDSA"',
            "null",
            "[" * 300 + "]" * 300,
            '{"a":' * 200 + "1" + "}" * 200,
        ]
    )
    return _headed(rogue, delivery, header.encode())


# True messages in the wrong place.


def elsewhere(rogue: Rogue, delivery: Delivery) -> Delivery | None:
    """A true message on a topic of another client, kind, direction or federation, or on none."""
    address, topics = parse(delivery.topic), Topics(rogue.federation)
    kinds = [kind for kind in ("offer", "need", "status", "receipt", "adapter", "notice", "odd") if kind != address.kind]
    other = rogue.other(address.client)
    client = address.client or other
    topic = rogue.rng.choice(
        [
            topics.from_(other, address.kind),
            topics.to(other, address.kind),
            topics.from_(client, rogue.rng.choice(kinds)),
            topics.to(client, rogue.rng.choice(kinds)),
            topics.from_("coordinator", address.kind),
            delivery.topic.replace(rogue.federation, "other", 1),
            delivery.topic.replace("clipcast", "Clipcast", 1),
            delivery.topic + "/",
            delivery.topic + "/x",
            "/" + delivery.topic,
            delivery.topic.replace("/", "//", 1),
            delivery.topic + "\u200b",
            topics.broadcast("release"),
            topics.broadcast("classes" if address.kind != "classes" else "round"),
        ]
    )
    return None if topic == delivery.topic else Delivery(topic, delivery.payload)


def signed_elsewhere(rogue: Rogue, delivery: Delivery) -> Delivery | None:
    """What the true sender has signed for another federation, another kind or another receiver."""
    envelope = decode(payload_of(delivery))
    signer = rogue.signers[envelope.sender]
    strangers = [name for name in rogue.signers if name != envelope.sender]
    foreign = rogue.token()
    if foreign is None:
        return None
    federation, sender, manifest = rogue.rng.choice(
        [
            ("other", envelope.sender, envelope.manifest),
            (rogue.federation, rogue.rng.choice(strangers), envelope.manifest),
            (rogue.federation, envelope.sender, manifest_of(foreign)),
        ]
    )
    if (federation, sender, manifest.kind) == (rogue.federation, envelope.sender, envelope.manifest.kind):
        return None
    return said(delivery, signer.seal(federation, sender, manifest))


def swapped_sender(rogue: Rogue, delivery: Delivery) -> Delivery | None:
    """Another one's true message of the same kind."""
    address = parse(delivery.topic)
    others = [d for d in rogue.seen if parse(d.topic).kind == address.kind and parse(d.topic).client != address.client]
    return said(delivery, rogue.rng.choice(others).payload) if others else None


def repeated(rogue: Rogue, delivery: Delivery) -> Delivery | None:
    """What was said before, again. A status is a hint that has no order; what is retained may come again as it is."""
    del delivery
    old = [d for d in rogue.seen if is_token(d) and parse(d.topic).kind != "status"]
    newest = {d.topic: d for d in old if parse(d.topic).kind in ("classes", "round", "adapter")}
    old = [d for d in old if newest.get(d.topic) != d]
    return rogue.rng.choice(old) if old else None


def odd_size(rogue: Rogue, delivery: Delivery) -> Delivery:
    size = rogue.rng.choice([0, 1, MAX_TOKEN, MAX_TOKEN + 1, 100_000])
    return said(delivery, rogue.rng.choice([bytes(size), b"." * size, b"{" * size, b"e30." * (size // 4)]))


# Chunks.


def misplaced_chunk(rogue: Rogue, delivery: Delivery) -> Delivery | None:
    """A true chunk as another number, of another blob, client or federation, or of another length."""
    address, data = parse(delivery.topic), delivery.payload
    assert address.sha256 is not None
    base, index = delivery.topic.rsplit("/", 1)
    other = rogue.other(address.client)
    changed = rogue.rng.choice(
        [
            Delivery(f"{base}/{rogue.rng.choice([int(index) + 1, 99, 32767, 99999, 100000])}", data),
            Delivery(f"{base}/{rogue.rng.choice(['', '-1', '+1', '01', '1.0', '٣', '１', 'x', '1e1'])}", data),  # noqa: RUF001
            Delivery(delivery.topic, data[:-1]),
            Delivery(delivery.topic, data + b"\0"),
            Delivery(delivery.topic, b""),
            Delivery(delivery.topic.replace(address.sha256, "f" * 64), data),
            Delivery(delivery.topic.replace(address.sha256, address.sha256.upper()), data),
            Delivery(delivery.topic.replace(rogue.federation, "other", 1), data),
            Delivery(delivery.topic.replace(f"/{address.client}/", f"/{other}/"), data),
        ]
    )
    return None if changed.topic == delivery.topic and changed.payload == data else changed


TOKENS: tuple[Make, ...] = (
    flipped,
    truncated,
    extended,
    other_text,
    spliced,
    rewritten,
    resigned,
    other_algorithm,
    public_key_as_secret,
    other_kid,
    odd_header,
    elsewhere,
    signed_elsewhere,
    swapped_sender,
    repeated,
    odd_size,
)
CHUNKS: tuple[Make, ...] = (misplaced_chunk,)


def forge(rogue: Rogue, delivery: Delivery) -> tuple[str, Delivery] | None:
    """Make something of a message that is about to be delivered; None if nothing came of it."""
    make = rogue.rng.choice(TOKENS if is_token(delivery) else CHUNKS)
    try:
        made = make(rogue, delivery)
    except WireError:
        return None
    return None if made is None or made == delivery else (make.__name__, made)
