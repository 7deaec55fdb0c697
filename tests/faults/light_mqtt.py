"""A minimal MQTT 5 connection for fleets of thousands: bytes in, events out, no thread and no socket of its own.

It says what MqttBus says: clean start, no session, QoS 1 for all, a last will; and it is the bus of one client's end.
"""

from __future__ import annotations

from collections import deque

from protocol.bus import Action, Connected, Delivery, Disconnected, Event, Publish, Subscribe

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, UNSUBSCRIBE, PINGREQ = 1, 2, 3, 4, 8, 9, 10, 12
WINDOW = 8
MESSAGE_EXPIRY = 0x02


class LightMqtt:
    """One connection's state: `outgoing` is to be sent, `feed` takes what has come, `events` is for the client's end."""

    def __init__(self, client_id: str, will: Publish, keepalive_s: int) -> None:
        self.outgoing = bytearray()
        self.events: deque[Event] = deque()
        self.subscribed = 0
        self.is_connected = False
        self._hello = _connect(client_id, will, keepalive_s)
        self._incoming = bytearray()
        self._ids = 0
        self._in_flight: set[int] = set()

    def opened(self) -> None:
        """The socket is connected: ask the broker to take us in."""
        self.lost()
        self.outgoing += self._hello

    def lost(self) -> None:
        """The socket is gone, and all that was under way."""
        if self.is_connected:
            self.events.append(Disconnected("lost"))
        self.is_connected, self.subscribed = False, 0
        self.outgoing.clear()
        self._incoming.clear()
        self._in_flight.clear()

    def ping(self) -> None:
        """Tell the broker that we live."""
        if self.is_connected:
            self.outgoing += bytes([PINGREQ << 4, 0])

    def feed(self, data: bytes) -> None:
        """Take in bytes from the broker."""
        self._incoming += data
        position = 0
        while (packet := _packet(self._incoming, position)) is not None:
            head, start, position = packet
            self._took(head, bytes(self._incoming[start:position]))
        del self._incoming[:position]

    def do(self, actions: list[Action]) -> None:
        """Carry out actions; while disconnected nothing is kept."""
        if not self.is_connected:
            return
        for action in actions:
            self._ids = self._ids % 65_535 + 1
            name = self._ids.to_bytes(2, "big")
            if isinstance(action, Publish):
                expiry = b"" if action.expiry_s is None else bytes([MESSAGE_EXPIRY]) + action.expiry_s.to_bytes(4, "big")
                body = _text(action.topic.encode()) + name + bytes([len(expiry)]) + expiry + action.payload
                self.outgoing += _framed(PUBLISH << 4 | 2 | action.retain, body)
                self._in_flight.add(self._ids)
            elif isinstance(action, Subscribe):
                self.outgoing += _framed(SUBSCRIBE << 4 | 2, name + b"\x00" + _text(action.filter.encode()) + b"\x01")
            else:
                self.outgoing += _framed(UNSUBSCRIBE << 4 | 2, name + b"\x00" + _text(action.filter.encode()))

    def room(self) -> int:
        """How many more chunks fit the window."""
        return WINDOW - len(self._in_flight) if self.is_connected else 0

    def drained(self) -> bool:
        """Whether the broker has acknowledged all, or the link is down."""
        return not self._in_flight

    def _took(self, head: int, body: bytes) -> None:
        kind = head >> 4
        if kind == CONNACK and body[1] == 0:
            self.is_connected = True
            self.events.append(Connected())
        elif kind == PUBLISH:
            end = 2 + int.from_bytes(body[:2], "big")
            topic, qos = body[2:end].decode(), head >> 1 & 3
            if qos:
                self.outgoing += _framed(PUBACK << 4, body[end : end + 2])
                end += 2
            properties, start = _number(body, end)
            self.events.append(Delivery(topic, body[start + properties :]))
        elif kind == PUBACK:
            self._in_flight.discard(int.from_bytes(body[:2], "big"))
        elif kind == SUBACK:
            self.subscribed += 1


def _connect(client_id: str, will: Publish, keepalive_s: int) -> bytes:
    flags = 0x02 | 0x04 | 0x08 | (0x20 if will.retain else 0)  # clean start, a will at QoS 1
    head = _text(b"MQTT") + bytes([5, flags]) + keepalive_s.to_bytes(2, "big") + b"\x00"
    payload = _text(client_id.encode()) + b"\x00" + _text(will.topic.encode()) + _text(will.payload)
    return _framed(CONNECT << 4, head + payload)


def _text(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


def _framed(head: int, body: bytes) -> bytes:
    length, rest = bytearray(), len(body)
    while True:
        rest, digit = rest >> 7, rest & 0x7F
        length.append(digit | (0x80 if rest else 0))
        if not rest:
            return bytes([head]) + length + body


def _number(data: bytes | bytearray, position: int) -> tuple[int, int]:
    """Read a variable byte integer; return it and where it ends. Raises IndexError if it is not all there."""
    value = shift = 0
    while True:
        digit = data[position]
        position += 1
        value |= (digit & 0x7F) << shift
        shift += 7
        if not digit & 0x80:
            return value, position


def _packet(data: bytearray, position: int) -> tuple[int, int, int] | None:
    """Return the next packet's first byte, start and end of its body; None if it is not all there."""
    try:
        length, start = _number(data, position + 1)
    except IndexError:
        return None
    return (data[position], start, start + length) if start + length <= len(data) else None
