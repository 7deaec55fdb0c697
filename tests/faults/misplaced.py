"""True messages in the wrong place, at the wrong time, or by the wrong one; chunks that fit nowhere."""

from __future__ import annotations

from protocol.bus import Delivery
from protocol.envelope import decode
from protocol.topics import Topics, parse
from protocol.trust.signing import MAX_TOKEN
from tests.faults.rogue import Rogue, is_token, manifest_of, payload_of, said


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
    return said(delivery, signer.seal(federation, sender, manifest, envelope.to))


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
