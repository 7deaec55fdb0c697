"""Faults that speak MQTT 5: PUBLISH packets are lost, doubled and delayed past each other, PUBACKs held back, by a seed.

Only fixed headers are read, and of a PUBLISH topic and packet id. Acknowledgements keep their order, as MQTT demands: in the
place of a message that is lost or late an empty one travels to a topic that nobody listens to, and is acknowledged; copies
travel at QoS 0, which nobody acknowledges.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass

from tests.faults.relay import Pair, Relay

PUBLISH, PUBACK = 3, 4
NOBODY = b"nobody"
TINY_S = 1e-4


@dataclass(frozen=True)
class Packet:
    """A packet as it travels: the first byte of its header, and what follows the remaining length."""

    head: int
    body: bytes

    @property
    def kind(self) -> int:
        """Return the type of packet."""
        return self.head >> 4

    @property
    def qos(self) -> int:
        """Return a PUBLISH's quality of service."""
        return self.head >> 1 & 3

    @property
    def topic(self) -> str:
        """Return a PUBLISH's topic."""
        return self.body[2 : 2 + int.from_bytes(self.body[:2], "big")].decode()

    @property
    def id_at(self) -> int:
        """Return where a PUBLISH's packet id stands in the body."""
        return 2 + int.from_bytes(self.body[:2], "big")

    def encode(self) -> bytes:
        """Return the bytes on the wire."""
        length, rest = bytearray(), len(self.body)
        while True:
            rest, digit = divmod(rest, 128) if rest >= 128 else (0, rest)
            length.append(digit | 0x80 if rest else digit)
            if not rest:
                return bytes([self.head, *length]) + self.body


def emptied(publish: Packet) -> Packet:
    """Return an empty message at QoS 1 with the same packet id."""
    no_properties = b"\x00"
    topic = len(NOBODY).to_bytes(2, "big") + NOBODY
    return Packet(publish.head & 0xFE, topic + publish.body[publish.id_at : publish.id_at + 2] + no_properties)


def at_qos_0(publish: Packet) -> Packet:
    """Return the same message as one that nobody acknowledges."""
    if publish.qos == 0:
        return publish
    body = publish.body[: publish.id_at] + publish.body[publish.id_at + 2 :]
    return Packet(publish.head & 0xF1, body)


async def read_packet(reader: asyncio.StreamReader) -> Packet | None:
    """Return the next packet of a stream, None at its end."""
    first = await reader.read(1)
    if not first:
        return None
    length = shift = 0
    while True:
        digit = (await reader.readexactly(1))[0]
        length |= (digit & 0x7F) << shift
        shift += 7
        if not digit & 0x80:
            return Packet(first[0], await reader.readexactly(length))


@dataclass(frozen=True)
class MqttFaults:
    """Probabilities by message, in both directions, and how long what is late may be late, in seconds."""

    drop: float = 0.0
    double: float = 0.0
    reorder: float = 0.0
    hold_acks: float = 0.0
    late_s: float = 0.3


class MqttProxy:
    """Forwards 127.0.0.1:port to a broker's port, with faults drawn from `seed`."""

    def __init__(self, target: int, seed: int, faults: MqttFaults) -> None:
        self.counts: Counter[str] = Counter()
        self._faults = faults
        self._rng = random.Random(seed)
        self._relay = Relay(target, self._pump)
        self.port = self._relay.port

    def close(self) -> None:
        """Stop."""
        self._relay.close()

    async def _pump(self, pair: Pair, direction: str) -> None:
        reader, writer = pair.ends(direction)
        acks = 0.0  # when the last of them is due
        while (packet := await read_packet(reader)) is not None:
            if packet.kind == PUBLISH and packet.qos < 2:
                self._publish(packet, writer)
            elif packet.kind == PUBACK:
                held = self._rng.uniform(0.0, self._faults.late_s) if self._hits(self._faults.hold_acks, "held") else 0.0
                acks = max(acks + TINY_S, asyncio.get_running_loop().time() + held)
                self._at(acks, writer, packet)
            else:
                writer.write(packet.encode())
            await writer.drain()

    def _publish(self, packet: Packet, writer: asyncio.StreamWriter) -> None:
        self.counts["messages"] += 1
        is_dropped = self._hits(self._faults.drop, "dropped")
        is_late = not is_dropped and self._hits(self._faults.reorder, "reordered")
        if is_late or (not is_dropped and self._hits(self._faults.double, "doubled")):
            late = asyncio.get_running_loop().time() + self._rng.uniform(0.0, self._faults.late_s)
            self._at(late, writer, at_qos_0(packet))
        if not is_dropped and not is_late:
            writer.write(packet.encode())
        elif packet.qos:
            writer.write(emptied(packet).encode())

    def _at(self, moment: float, writer: asyncio.StreamWriter, packet: Packet) -> None:
        def write() -> None:
            if not writer.is_closing():
                writer.write(packet.encode())

        asyncio.get_running_loop().call_at(moment, write)

    def _hits(self, probability: float, what: str) -> bool:
        hit = self._rng.random() < probability
        self.counts[what] += hit
        return hit
