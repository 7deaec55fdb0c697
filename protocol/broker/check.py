"""Measures a live broker: whether it can carry a federation, how fast, and what it lets others do.

It speaks on `from/ID/check/...`, where nobody listens, and once, unretained, on topics that this user should not reach. All
of it expires within a minute, and what is retained for a test is cleared: nothing is left behind.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import ssl
import statistics
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from email.utils import formatdate

from protocol import tls
from protocol.broker.findings import RAISE, Place, limits, packet_of
from protocol.broker.rights import rights
from protocol.errors import BusError
from protocol.findings import Finding
from protocol.mqtt import WINDOW, MqttBus
from protocol.settings import BrokerSettings
from protocol.transfer.exchange import chunk_size

LARGEST_TRIED = 1024 * 1024
LENGTH_BYTES = 5
ROUND_TRIPS = 20
CHUNKS_S = 2.0
ECHO_S = 2.0
EXPIRED_S = 2.5
TAKEN_OVER_S = 5.0
SOON_DAYS = 30


def check(settings: BrokerSettings, federation: str, client: str) -> Iterator[Finding]:
    """Yield what is found, in the order in which it is measured. A broker that cannot be used ends it with a `fail`."""
    place = Place(settings, federation, client, secrets.token_hex(4))
    try:
        yield _reach(place)
        yield from _link(settings)
        yield from _strangers(place)
        with place.probe() as probe:
            yield from limits(probe.limits, settings.keepalive_s)
            if (answer := probe.publish(place.topic("own"), b"")).refused:
                yield Finding("own topics", answer.text, "fail", _own_cure(place))
                return
            yield Finding("own topics", f"may write below from/{client}")
            keeps = probe.limits.get("RetainAvailable", 1) != 0
        yield _boundary(place)
        yield _chunks(place)
        hears = _echoes(place)
        yield _round_trip(place, hears)
        if keeps:  # else to retain something would end the connection
            yield from _retained(place) if hears else _unheard("retained messages, tried", "message expiry, tried")
        yield from rights(place)
        yield _two_of_one_name(place)
    except BusError as error:
        yield Finding("connection", str(error), "fail", "see the broker's log")


def brief(settings: BrokerSettings, federation: str, client: str) -> Iterator[Finding]:
    """Yield what a client has to know: that it gets in, how, the size of packets, and a round trip. A second at most."""
    place = Place(settings, federation, client, secrets.token_hex(4))
    try:
        yield _reach(place)
        yield from _link(settings)
        with place.probe() as probe:
            yield from limits(probe.limits, settings.keepalive_s)
            if (answer := probe.publish(place.topic("own"), b"")).refused:
                yield Finding("own topics", answer.text, "fail", _own_cure(place))
                return
        yield _round_trip(place, _echoes(place))
    except BusError as error:
        yield Finding("connection", str(error), "fail", "see the broker's log, and `clipcast broker check`")


def _reach(place: Place) -> Finding:
    start = time.monotonic()
    MqttBus.open(place.settings, f"{place.federation}:{place.client}:{place.nonce}:reach").close()
    return Finding("reachable", f"speaks MQTT 5, lets us in within {1000 * (time.monotonic() - start):.0f} ms")


def _link(settings: BrokerSettings) -> Iterator[Finding]:
    if not settings.tls:
        local = settings.host in ("localhost", "127.0.0.1", "::1")
        cure = "use TLS: docs/operations.md, The link"
        yield Finding(
            "encryption", "none, on this machine" if local else "none", "ok" if local else "warn", "" if local else cure
        )
        return
    try:
        plain = socket.create_connection((settings.host, settings.port), 5.0)
        with tls.context(settings).wrap_socket(plain, server_hostname=settings.host) as link:
            version, cipher, certificate = link.version(), link.cipher(), link.getpeercert()
    except OSError as error:
        raise BusError(f"the broker ends a second connection: {tls.plain(error)}") from error
    old = version != "TLSv1.3"
    yield Finding(
        "encryption", f"{version}, {cipher[0] if cipher else '?'}", *(("warn", "let it speak TLS 1.3") if old else ())
    )
    yield _expiry(str((certificate or {}).get("notAfter", "")))


def _expiry(not_after: str) -> Finding:
    until = ssl.cert_time_to_seconds(not_after)
    days = int((until - datetime.now(timezone.utc).timestamp()) // 86400)
    measured = f"valid until {formatdate(until)[5:16]}, {days} days"
    if days < SOON_DAYS:
        return Finding("certificate", measured, "warn", "issue another one: `clipcast ca issue`")
    return Finding("certificate", measured)


def _strangers(place: Place) -> Iterator[Finding]:
    """Try to come in without any credentials."""
    bare = place.settings.model_copy(
        update={"username": None, "password_file": None, "cert_file": None, "key_file": None, "connect_timeout_s": 5.0}
    )
    try:
        MqttBus.open(bare, f"{place.federation}:{place.nonce}:stranger").close()
    except BusError:
        yield Finding("strangers", "stay outside without credentials")
        return
    yield Finding("strangers", "anybody gets in", "warn", "ask for certificates or passwords: `clipcast broker config`")


def _boundary(place: Place) -> Finding:
    """Try a packet of exactly the announced size, and larger ones: they have to be refused.

    By one byte, or a few: Mosquitto 2.0 does not count the bytes of a packet's own length.
    """
    name, topic = "packet size, tried", place.topic("boundary")
    with place.probe("boundary") as probe:
        limit = probe.limits.get("MaximumPacketSize")
        if limit is None or limit > LARGEST_TRIED:
            return Finding(name, "no limit below 1 MiB to try")
        if (answer := probe.publish(topic, packet_of(topic, limit), expiry_s=None)).refused:
            return Finding(
                name, f"{limit} bytes are refused: {answer.text}", "fail", f"it announces more than it takes: {RAISE}"
            )
        for size in range(limit + 1, limit + LENGTH_BYTES + 1):
            with contextlib.suppress(ValueError):  # no packet has that size
                if probe.publish(topic, packet_of(topic, size), expiry_s=None).refused:
                    return Finding(name, f"{limit} bytes pass, {size} are refused")
    return Finding(
        name, f"{limit} bytes pass, {limit + LENGTH_BYTES} too", "warn", "it takes more than it announces; harmless"
    )


def _chunks(place: Place) -> Finding:
    """Send chunks in our window for some seconds; and so find out whether they pass at all."""
    with place.probe("chunks") as probe:
        size = chunk_size(probe.limits.get("MaximumPacketSize"))
        window = min(WINDOW, probe.limits.get("ReceiveMaximum", WINDOW))
        topic, chunk = place.topic("chunk"), secrets.token_bytes(size)
        start = time.monotonic()
        for _ in range(window):
            probe.hand_over(topic, chunk)
        under_way, done = window, 0
        while under_way:
            if (answer := probe.next_acknowledged()).refused:
                return Finding(
                    f"chunks of {size} bytes", f"refused: {answer.text}", "fail", f"{_own_cure(place)}; or {RAISE}"
                )
            under_way, done = under_way - 1, done + 1
            if answer.at - start < CHUNKS_S:
                probe.hand_over(topic, chunk)
                under_way += 1
    rate = done * size / (answer.at - start)
    return Finding(f"chunks of {size} bytes", f"{rate / 1e6:.2f} MB/s acknowledged, {window} under way")


def _echoes(place: Place) -> bool:
    """Whether this user hears what it says itself: then more can be measured."""
    topic = place.topic("echo")
    with place.probe("echo") as probe:
        if probe.subscribe(topic).refused or probe.publish(topic, b"").refused:
            return False
        return probe.hears(ECHO_S) is not None


def _round_trip(place: Place, hears: bool) -> Finding:
    topic, times = place.topic("echo"), []
    with place.probe("trip") as probe:
        if hears:
            probe.subscribe(topic)
        for _ in range(ROUND_TRIPS):
            start = time.monotonic()
            answer = probe.publish(topic, b"")
            if answer.refused or (hears and probe.hears(ECHO_S) is None):
                return Finding("round trip", "not all came back", "warn", "see the broker's log")
            times.append(time.monotonic() - start)
    what = "there and back" if hears else "to the acknowledgement"
    return Finding("round trip", f"{1000 * statistics.median(times):.1f} ms {what}, median of {ROUND_TRIPS}")


def _unheard(*names: str) -> Iterator[Finding]:
    for name in names:
        yield Finding(name, "not measured: by its access rules this user does not hear itself", "unknown")


def _retained(place: Place) -> Iterator[Finding]:
    """Keep a message, look for it, clear it, look again; and one that expires."""
    kept, stale = place.topic("kept"), place.topic("stale")
    with place.probe("keeper") as probe:
        try:
            probe.publish(kept, b"kept", retain=True)
            probe.publish(stale, b"stale", retain=True, expiry_s=1)
            found = _is_kept(place, kept)
            time.sleep(EXPIRED_S)
            expired = not _is_kept(place, stale)
        finally:
            for topic in (kept, stale):
                probe.publish(topic, b"", retain=True)
        cleared = not _is_kept(place, kept) and not _is_kept(place, stale)
    cure = "clients that join or come back find no round there: let it keep retained messages"
    words = f"{'kept' if found else 'not kept'}, {'cleared' if cleared else 'not cleared'}"
    yield Finding("retained messages, tried", words, *(() if found and cleared else ("fail", cure)))
    cure = "stale messages come back after a cut: harmless, they are refused, but they cost bytes"
    yield Finding("message expiry, tried", "kept" if expired else "not kept", *(() if expired else ("warn", cure)))


def _is_kept(place: Place, topic: str) -> bool:
    """Whether a new subscriber is given a message; a message of our own, said afterwards, tells that nothing else comes."""
    mark = place.topic("mark")
    with place.probe("reader") as probe:
        probe.subscribe(topic)
        probe.subscribe(mark)
        probe.publish(mark, b"")
        while (heard := probe.hears(ECHO_S)) is not None and heard.topic != mark:
            if heard.topic == topic:
                return True
    return False


def _two_of_one_name(place: Place) -> Finding:
    """See whether a second connection of one client id ends the first: so two devices of one name are noticed."""
    with place.probe("twin") as first, contextlib.suppress(BusError), place.probe("twin"):
        if first.ended(TAKEN_OVER_S):
            return Finding("two of one name", "the second ends the first")
    return Finding(
        "two of one name", "both stay", "warn", "give every device an id of its own; it is not noticed if two have one"
    )


def _own_cure(place: Place) -> str:
    return (
        f"this user may not write what {place.client} has to say in {place.federation}: the user, or the certificate's name,"
        f" has to be {place.client}, and the access rules those of {place.federation}"
    )
