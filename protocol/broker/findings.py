"""What a check of a broker finds, and how what it announces is judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from protocol.broker.probe import Probe
from protocol.findings import Finding
from protocol.messages import CHUNK_SIZE
from protocol.mqtt import WINDOW
from protocol.settings import BrokerSettings
from protocol.topics import Topics
from protocol.transfer.exchange import PACKET_MARGIN, chunk_size
from protocol.trust.signing import MAX_TOKEN

SHORTEST_KEEPALIVE_S = 10
RAISE = "raise its max_packet_size (`clipcast broker config` writes what we recommend)"


@dataclass(frozen=True)
class Place:
    """Who measures where: a federation, the id whose topics are used, and a name that nobody else has."""

    settings: BrokerSettings
    federation: str
    client: str
    nonce: str

    @property
    def topics(self) -> Topics:
        """The federation's topics."""
        return Topics(self.federation)

    def probe(self, name: str = "probe", settings: BrokerSettings | None = None) -> Probe:
        """Return a connection with a client id that no device has."""
        return Probe(settings or self.settings, f"{self.federation}:{self.client}:{self.nonce}:{name}")

    def topic(self, name: str) -> str:
        """Return a topic of our own where nobody listens."""
        return self.topics.check(self.client, f"{self.nonce}-{name}")


def limits(announced: dict[str, int], keepalive_s: int) -> Iterator[Finding]:
    """Judge what CONNACK announces."""
    yield _packet_size(announced.get("MaximumPacketSize"))
    window = announced.get("ReceiveMaximum", 65535)
    small = window < WINDOW
    cure = f"uploads go {window} chunks at a time instead of {WINDOW}: raise its limit of unacknowledged messages"
    yield Finding("receive maximum", f"{window} messages", *(("warn", cure) if small else ()))
    for name, word, cure in (
        ("MaximumQoS", "QoS 1", "let it take QoS 1: `max_qos 1` or no such line"),
        (
            "RetainAvailable",
            "retained messages",
            "let it keep retained messages: a client that comes late finds its round there",
        ),
        ("WildcardSubscriptionAvailable", "wildcards", "allow wildcards in subscriptions: the coordinator needs them"),
    ):
        missing = announced.get(name, 1) == 0
        yield Finding(word, "not available" if missing else "available", *(("fail", cure) if missing else ()))
    keepalive = announced.get("ServerKeepAlive", keepalive_s)
    short = keepalive < SHORTEST_KEEPALIVE_S
    cure = "a chunk has to pass within it on the slowest link: raise its limit"
    yield Finding("keepalive", f"{keepalive} s", *(("warn", cure) if short else ()))
    expiry, aliases = announced.get("SessionExpiryInterval", 0), announced.get("TopicAliasMaximum", 0)
    yield Finding("sessions, aliases", f"kept for {expiry} s, {aliases} topic aliases; neither is used")


def _packet_size(size: int | None) -> Finding:
    if size is None:
        return Finding("packet size", "no limit announced")
    chunk = chunk_size(size)
    measured = f"{size} bytes, chunks of {chunk}"
    if size < chunk + PACKET_MARGIN // 4:
        return Finding("packet size", f"{size} bytes", "fail", f"the smallest chunk of {chunk} bytes does not fit: {RAISE}")
    if size < MAX_TOKEN + PACKET_MARGIN:
        return Finding("packet size", measured, "warn", f"plans of many clients have up to {MAX_TOKEN}: {RAISE}")
    return Finding("packet size", measured, *(("warn", RAISE) if chunk < CHUNK_SIZE else ()))


def packet_of(topic: str, size: int) -> bytes:
    """Return the payload that makes a PUBLISH of QoS 1, without properties, a packet of exactly `size` bytes."""
    for digits in (1, 2, 3, 4):
        rest = size - 1 - digits
        if 0 <= rest < 128**digits and (digits == 1 or rest >= 128 ** (digits - 1)):
            return bytes(rest - 2 - len(topic.encode()) - 2 - 1)
    raise ValueError(f"no packet has {size} bytes")
