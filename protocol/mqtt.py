"""MqttBus: the bus over a real broker. The only file that imports paho.

MQTT 5, QoS 1, clean start, no session. A thread of ours connects, and after a loss connects again with full jitter and a
fresh paho client: nothing queued inside paho outlives a connection (its queues resend what the broker refuses), the
transfer protocol asks again for what was lost. The broker's limits are read from CONNACK and obeyed before sending.
paho's callbacks only enqueue.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import random
import socket
import ssl
import threading
from collections import deque
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from protocol import tls
from protocol.bus import Action, Connected, Delivery, Disconnected, Event, Publish, Subscribe, Unsubscribe
from protocol.doublings import worth_telling
from protocol.errors import BusError
from protocol.retry import Retry
from protocol.settings import BrokerSettings

log = logging.getLogger(__name__)

WINDOW = 8
INBOX_BYTES = 64 << 20
PACKET_OVERHEAD = 64
NO_ANSWER = "no answer"
WITHOUT_A_WORD = "it ended the connection without a word"
UNREACHED = "Check that it runs there and that [broker] in the settings names it; `mosquitto -v` starts one for a try"
CURES = {
    "Not authorized": "Check `username` and `password_file`, or `cert_file`, under [broker], and its access rules",
    "Bad user name or password": "Check `username` and `password_file` under [broker]",
    "Client identifier not valid": "Its log says what it wants",
    "Banned": "Its log says why",
    "Unsupported protocol version": "It speaks MQTT 3.1.1 at most: clipcast needs MQTT 5 (Mosquitto 1.6 or newer)",
    WITHOUT_A_WORD: "Perhaps it asks for credentials or a client's certificate, or speaks TLS on that port (mqtts://)",
}
RESET = "reset by peer"


class MqttBus:
    """A connection to an MQTT 5 broker that heals itself. `MqttBus.open` makes one."""

    def __init__(self, settings: BrokerSettings, client_id: str, will: Publish | None = None) -> None:
        self._settings = settings
        self._client_id = client_id
        self._will = will
        self._tls = tls.context(settings) if settings.tls else None
        self._password = settings.password()
        self._inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._came = self._taken = self._dropped = 0  # bytes: the first is paho's thread's, the second the user's
        self._client: Client | None = None
        self._connected = False
        self._taken_in = self._ever_taken_in = False
        self._max_packet: int | None = None
        self._window = WINDOW
        self._in_flight: set[int] = set()  # touched by the user's thread alone: paho may acknowledge before publish returns
        self._acknowledged: deque[int] = deque()
        self._starved = False
        self._lost = threading.Event()
        self._settled = threading.Event()
        self._closing = threading.Event()
        self._trouble = NO_ANSWER
        self._thread = threading.Thread(target=self._stay_connected, name=f"mqtt[{client_id}]", daemon=True)

    @classmethod
    def open(cls, settings: BrokerSettings, client_id: str, will: Publish | None = None) -> MqttBus:
        """Connect, and wait until the broker has taken us in; raises BusError with the broker's or the system's reason."""
        try:
            bus = cls(settings, client_id, will)
        except (OSError, tls.CredentialsError) as error:
            raise BusError(
                f"the broker's credentials cannot be read: {error}. Check the files named under [broker]"
            ) from error
        bus._thread.start()
        bus._settled.wait(settings.connect_timeout_s)
        if not bus._ever_taken_in:  # lost again at once, as by a take-over, is a matter for what follows
            bus.close()
            raise BusError(f"cannot reach the broker at {settings.url}: {bus._trouble}. {bus._cure()}")
        return bus

    def do(self, action: Action) -> None:
        """Hand an action to the broker if connected; raises BusError if the message can never fit its limits.

        While disconnected nothing is kept: after `Connected` the ends say again all that still matters.
        """
        if isinstance(action, Publish):
            self._check_size(action)
        client = self._client
        if client is None or not self._connected:
            return
        match action:
            case Publish(topic=topic, payload=payload, retain=retain, expiry_s=expiry):
                info = client.publish(topic, payload, qos=1, retain=retain, properties=expiring(expiry))
                if info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS:
                    self._in_flight.add(info.mid)
            case Subscribe(filter=topic_filter):
                client.subscribe(topic_filter, qos=1)
            case Unsubscribe(filter=topic_filter):
                client.unsubscribe(topic_filter)

    def receive(self, timeout: float) -> Event | None:
        """Return the next event, or None after `timeout` seconds or a wake."""
        try:
            event = self._inbox.get(timeout=timeout) if timeout > 0 else self._inbox.get_nowait()
        except queue.Empty:
            return None
        if isinstance(event, Delivery):
            self._taken += len(event.payload)
        return event

    def room(self) -> int:
        """How many more chunks fit the window of unacknowledged messages."""
        self._settle_acknowledged()
        room = self._window - len(self._in_flight) if self._connected else 0
        self._starved = room <= 0
        return room

    def drained(self) -> bool:
        """Whether the broker has acknowledged all that was handed over, or the link is down."""
        self._settle_acknowledged()
        return not self._in_flight or not self._connected

    def wake(self) -> None:
        """Make a waiting receive return."""
        self._inbox.put(None)

    def close(self, last: Publish | None = None) -> None:
        """Send `last`, leave without the will, and stop trying."""
        client, connected = self._client, self._connected
        self._closing.set()
        if client is not None and connected:
            if last:
                with contextlib.suppress(RuntimeError, ValueError):  # the link may go down just now: then the will speaks
                    client.publish(last.topic, last.payload, qos=1, retain=last.retain).wait_for_publish(2.0)
            client.disconnect()
        if self._thread.is_alive():
            self._thread.join(self._settings.connect_timeout_s + 5.0)

    def _settle_acknowledged(self) -> None:
        while self._acknowledged:
            self._in_flight.discard(self._acknowledged.popleft())

    def _check_size(self, message: Publish) -> None:
        size = len(message.payload) + len(message.topic.encode()) + PACKET_OVERHEAD
        if self._max_packet is not None and size > self._max_packet:
            raise BusError(
                f"{message.topic} needs a packet of {size} bytes, the broker at {self._settings.url} takes at most "
                f"{self._max_packet}: raise its max_packet_size"
            )

    def _stay_connected(self) -> None:
        """Connect, serve until the link is lost, wait, again."""
        retry = Retry(random.Random())
        while not self._closing.is_set():
            if self._serve_once():
                retry.taken_in()
            if self._closing.is_set():
                return
            self._inbox.put(Disconnected(self._trouble))
            if self._tls and (self._trouble == WITHOUT_A_WORD or RESET in self._trouble):
                self._trouble = tls.refusal(self._settings, self._tls) or self._trouble
            if not self._cure().startswith(UNREACHED) and self._trouble != WITHOUT_A_WORD:
                self._settled.set()  # no use in trying again
            self._closing.wait(retry.pause())

    def _serve_once(self) -> bool:
        """Run one connection to its end; return whether the broker took us in."""
        self._taken_in = False
        client = self._make_client()
        self._lost.clear()  # now: paho may find the link lost while it still connects
        try:
            client.connect(self._settings.host, self._settings.port, self._settings.keepalive_s, clean_start=True)
        except (OSError, ValueError) as error:
            self._trouble = tls.plain(error)
            log.debug("broker %s: %s", self._settings.url, self._trouble)
            return False
        self._in_flight.clear()
        self._acknowledged.clear()
        self._client = client
        client.loop_start()
        while not self._lost.wait(1.0):
            if self._closing.is_set() or (self._taken_in and not client.is_connected()):
                break
        self._connected = False
        taken_in = self._taken_in
        client.loop_stop()
        self._client = None
        return taken_in

    def _cure(self) -> str:
        if self._settings.tls and RESET in self._trouble:
            return f"{UNREACHED}. Perhaps that port does not speak TLS: then write mqtt:// in `url`"
        return CURES.get(self._trouble) or tls.cure(self._trouble) or UNREACHED

    def _make_client(self) -> Client:
        client = new_client(self._settings, self._client_id, self._tls, self._password)
        client.max_inflight_messages_set(self._window)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        if self._will:
            client.will_set(self._will.topic, self._will.payload, qos=1, retain=self._will.retain)
        return client

    def _on_connect(
        self, client: Client, _data: Any, _flags: ConnectFlags, code: ReasonCode, properties: Properties | None
    ) -> None:
        if code.is_failure:
            self._trouble = str(code)
            self._lost.set()
            return
        self._max_packet = getattr(properties, "MaximumPacketSize", None)
        receive_maximum = max(1, getattr(properties, "ReceiveMaximum", WINDOW))
        if receive_maximum < self._window:
            # paho takes a smaller window only before it connects.
            self._window = receive_maximum
            self._trouble = f"the broker takes {receive_maximum} unacknowledged messages, connecting anew with that"
            client.disconnect()
            return
        if not getattr(properties, "RetainAvailable", 1):
            log.warning("broker %s keeps no retained messages: clients that join late will wait", self._settings.url)
        self._connected = self._taken_in = self._ever_taken_in = True
        self._inbox.put(Connected(self._max_packet))
        self._settled.set()

    def _on_disconnect(
        self, _client: Client, _data: Any, _flags: DisconnectFlags, code: ReasonCode, _properties: Properties | None
    ) -> None:
        self._connected = False
        if code.is_failure and self._taken_in:  # before that, the broker's own reason is the better one
            self._trouble = str(code)
        elif code.is_failure and self._trouble == NO_ANSWER:
            self._trouble = WITHOUT_A_WORD
        self._lost.set()

    def _on_message(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        if self._came - self._taken > INBOX_BYTES:  # while the user is busy: what is lost comes again, memory does not
            self._dropped += 1
            if worth_telling(self._dropped):
                log.warning("dropped %d messages: more than %d MB wait to be read", self._dropped, INBOX_BYTES >> 20)
            return
        self._came += len(message.payload)
        self._inbox.put(Delivery(message.topic, bytes(message.payload)))

    def _on_subscribe(
        self, _client: Client, _data: Any, _mid: int, codes: list[ReasonCode], _properties: Properties | None
    ) -> None:
        for code in codes:
            if code.is_failure:
                log.error("broker %s refused a subscription: %s. Check its access rules", self._settings.url, code)

    def _on_publish(self, _client: Client, _data: Any, mid: int, code: ReasonCode, _properties: Properties) -> None:
        self._acknowledged.append(mid)
        if code.is_failure:
            log.warning("broker %s refused a message: %s. Check its access rules", self._settings.url, code)
        if self._starved:
            self._starved = False
            self._inbox.put(None)


def new_client(settings: BrokerSettings, client_id: str, secured: ssl.SSLContext | None, secret: str | None) -> Client:
    """Return a paho client that speaks MQTT 5 and does not reconnect by itself; it is not connected yet."""
    client = Client(
        CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTProtocolVersion.MQTTv5, reconnect_on_failure=False
    )
    client.connect_timeout = 5.0
    client.on_socket_open = _send_at_once
    if settings.username:
        client.username_pw_set(settings.username, secret)
    if secured is not None:
        client.tls_set_context(secured)
    return client


def expiring(seconds: int | None) -> Properties | None:
    """Return the properties of a message that is worthless after so many seconds."""
    if seconds is None:
        return None
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.MessageExpiryInterval = seconds
    return properties


def _send_at_once(_client: Client, _data: Any, sock: Any) -> None:
    """Switch off Nagle's algorithm: with it every need and offer waits for a delayed acknowledgement, about 40 ms."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
