"""One connection to a broker for measuring: every answer as it comes. It never reconnects, and holds nothing back."""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from protocol import tls
from protocol.errors import BusError
from protocol.mqtt import expiring, new_client
from protocol.settings import BrokerSettings

ANSWER_S = 30.0
FAILURE = 0x80
EXPIRY_S = 60
LIMITS = (
    "MaximumPacketSize",
    "ReceiveMaximum",
    "MaximumQoS",
    "RetainAvailable",
    "WildcardSubscriptionAvailable",
    "ServerKeepAlive",
    "TopicAliasMaximum",
    "SessionExpiryInterval",
)


@dataclass(frozen=True)
class Answer:
    """What the broker said to a CONNECT, PUBLISH or SUBSCRIBE, or as it ended the connection (`gone`)."""

    kind: str
    mid: int
    code: int
    text: str
    at: float
    gone: bool = False

    @property
    def refused(self) -> bool:
        """Whether it said no."""
        return self.gone or self.code >= FAILURE


@dataclass(frozen=True)
class Heard:
    """A message that came in."""

    topic: str
    payload: bytes
    retained: bool


@dataclass
class Probe:
    """A connection, as a context: `with Probe(settings, "name") as probe`. Raises BusError if the broker refuses it."""

    settings: BrokerSettings
    client_id: str
    limits: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> Probe:
        settings = self.settings
        self._gone: Answer | None = None
        self._said: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._heard: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        try:
            secured = tls.context(settings) if settings.tls else None
            self._client = client = new_client(settings, self.client_id, secured, settings.password())
            client.max_inflight_messages_set(0)
            client.on_connect = lambda _c, _d, _f, code, limits: self._connected(code, limits)
            client.on_publish = lambda _c, _d, mid, code, _p: self._say("publish", mid, code)
            client.on_subscribe = lambda _c, _d, mid, codes, _p: self._say("subscribe", mid, codes[0])
            client.on_disconnect = lambda _c, _d, _f, code, _p: self._say("gone", 0, code)
            client.on_message = lambda _c, _d, m: self._heard.put(Heard(m.topic, bytes(m.payload), bool(m.retain)))
            client.connect(settings.host, settings.port, settings.keepalive_s, clean_start=True)
        except (OSError, ValueError) as error:
            raise BusError(f"cannot reach the broker at {settings.url}: {tls.plain(error)}") from error
        client.loop_start()
        if (answer := self._answer("connect", 0)).refused:
            self.__exit__(None, None, None)
            raise BusError(f"cannot reach the broker at {settings.url}: {answer.text}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expiry_s: int | None = EXPIRY_S) -> Answer:
        """Send a message at QoS 1; return how it was acknowledged."""
        return self._answer("publish", self.hand_over(topic, payload, retain=retain, expiry_s=expiry_s))

    def hand_over(self, topic: str, payload: bytes, *, retain: bool = False, expiry_s: int | None = EXPIRY_S) -> int:
        """Send a message at QoS 1 and do not wait; return its number, which `next_acknowledged` returns."""
        return int(self._client.publish(topic, payload, qos=1, retain=retain, properties=expiring(expiry_s)).mid)

    def next_acknowledged(self) -> Answer:
        """Wait for the next acknowledgement, whatever of."""
        return self._answer("publish", None)

    def subscribe(self, topic_filter: str) -> Answer:
        """Listen to a topic filter."""
        return self._answer("subscribe", int(self._client.subscribe(topic_filter, qos=1)[1] or 0))

    def unsubscribe(self, topic_filter: str) -> None:
        """Listen no more."""
        self._client.unsubscribe(topic_filter)

    def hears(self, seconds: float) -> Heard | None:
        """Return the next message that comes in, None if there is none for so long."""
        try:
            return self._heard.get(timeout=max(seconds, 0.001))
        except queue.Empty:
            return None

    def ended(self, seconds: float) -> Answer | None:
        """Return how the broker ends this connection, None if it does not for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                if (answer := self._said.get(timeout=left)).gone:
                    return answer
            except queue.Empty:
                break
        return None

    def _connected(self, code: Any, limits: Any) -> None:
        self.limits = {name: int(value) for name in LIMITS if (value := getattr(limits, name, None)) is not None}
        self._say("connect", 0, code)

    def _say(self, kind: str, mid: int, code: Any) -> None:
        answer = Answer(kind, mid, int(code.value), str(code), time.monotonic(), kind == "gone")
        if answer.gone:
            self._gone = answer
        self._said.put(answer)

    def _answer(self, kind: str, mid: int | None) -> Answer:
        end = time.monotonic() + ANSWER_S
        while (left := end - time.monotonic()) > 0:
            if self._gone is not None and self._said.empty():
                return self._gone
            try:
                answer = self._said.get(timeout=left)
            except queue.Empty:
                break
            if answer.gone or (answer.kind == kind and mid in (None, answer.mid)):
                return answer
        raise BusError(f"the broker at {self.settings.url} has not answered for {ANSWER_S:g} s")
