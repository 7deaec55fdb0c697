"""What a broker lets a user do that it should not: access rules, measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from protocol.broker.findings import Place
from protocol.broker.probe import Probe
from protocol.envelope import COORDINATOR
from protocol.errors import WireError
from protocol.findings import Finding
from protocol.topics import Topics, parse

HEAR_S = 1.0
ENOUGH = 3
EVERYTHING, BROKERS_OWN = "#", "$SYS/#"
CURE = "set access rules: `clipcast broker config` writes them. Signatures hold without, but others see and disturb more"
SAID = b"clipcast broker check"


def forbidden(place: Place) -> dict[str, str]:
    """Return topics that this user should not write to, by a word for each. Nobody acts on what is said there."""
    topics, other, stranger = place.topics, Topics(place.nonce), f"check-{place.nonce}"
    found = {
        "from another client": topics.from_(stranger, "check"),
        "of another federation": other.from_(place.client, "check"),
        "$SYS": "$SYS/clipcast",
    }
    if place.client == COORDINATOR:
        return {**found, "another federation's round": other.broadcast("round")}
    return {
        **found,
        "classes": topics.broadcast("classes"),
        "round": topics.broadcast("round"),
        "release": topics.broadcast("release"),
        "key": topics.broadcast("key"),
        "a broadcast blob": topics.blob("0" * 64, 0),
        "to another client": topics.to(stranger, "check"),
    }


def rights(place: Place) -> Iterator[Finding]:
    """Say something, unretained, where this user has no business, and listen where it has none."""
    filters = [EVERYTHING, BROKERS_OWN, *(place.topics.coordinator_filters() if place.client != COORDINATOR else ())]
    tried = forbidden(place)
    taken: list[str] = []
    heard: set[str] = set()
    with contextlib.ExitStack() as stack:
        # One connection each: a broker may end it for what was asked.
        listeners = [stack.enter_context(place.probe(f"listener{number}")) for number in range(len(filters))]
        open_to = [one for one, wanted in zip(listeners, filters, strict=True) if not one.subscribe(wanted).refused]
        for word, topic in tried.items():
            with place.probe("writer") as probe:
                if not probe.publish(topic, SAID, expiry_s=60).refused:
                    taken.append(word)
        until = time.monotonic() + HEAR_S
        for listener in open_to:
            heard |= _heard(listener, place, until)
    if taken:
        yield Finding("forbidden to write", f"takes: {', '.join(taken)}", "warn", CURE)
    else:
        yield Finding("forbidden to write", f"refuses all {len(tried)} that were tried")
    if heard:
        yield Finding("forbidden to read", f"brings {', '.join(sorted(heard)[:ENOUGH])}", "warn", CURE)
    else:
        yield Finding("forbidden to read", f"{', '.join(filters)} bring nothing")


def _heard(listener: Probe, place: Place, until: float) -> set[str]:
    """Return the first topics that came in and are not for this user."""
    found: set[str] = set()
    while len(found) < ENOUGH and (message := listener.hears(until - time.monotonic())) is not None:
        if not _may_hear(place, message.topic):
            found.add(message.topic)
    return found


def _may_hear(place: Place, topic: str) -> bool:
    try:
        address = parse(topic)
    except WireError:
        return topic.startswith(place.topics.check(place.client, place.nonce))
    if address.federation != place.federation:
        return False
    return address.client in (None, place.client) or place.client == COORDINATOR
