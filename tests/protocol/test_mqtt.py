"""MqttBus against real brokers: the embedded one and Mosquitto."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from paho.mqtt.client import Client
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

import protocol
from protocol.bus import Connected, Delivery, Disconnected, Publish, Subscribe, Unsubscribe
from protocol.errors import BusError
from protocol.mqtt import WINDOW, MqttBus
from protocol.settings import BrokerSettings

WILL = Publish("status/doomed", b"gone", retain=True)
DOOMED = """
import sys
from protocol.bus import Publish
from protocol.mqtt import MqttBus
from protocol.settings import BrokerSettings
bus = MqttBus.open(BrokerSettings(url=sys.argv[1]), "doomed", Publish("status/doomed", b"gone", retain=True))
print("connected", flush=True)
sys.stdin.read()
"""


@pytest.fixture(params=["embedded", "mosquitto"])
def broker(request) -> str:
    started = request.getfixturevalue(request.param)
    return started if isinstance(started, str) else started()


@pytest.fixture
def connect():
    """Open buses that are closed after the test."""
    buses = []

    def connect(url: str, name: str = "a", will: Publish | None = None, **settings) -> MqttBus:
        buses.append(MqttBus.open(BrokerSettings(url=url, **{"connect_timeout_s": 10.0} | settings), name, will))
        return buses[-1]

    yield connect
    for bus in buses:
        bus.close()


@pytest.fixture
def listen(connect):
    """Open a bus that hears all of a filter, and is known to: its own echo has come back."""

    def listen(url: str, topic_filter: str = "t/#", name: str = "listener", **settings) -> MqttBus:
        bus = connect(url, name, **settings)
        bus.do(Subscribe(topic_filter))
        bus.do(Subscribe("echo/" + name))
        bus.do(Publish("echo/" + name, b""))
        await_event(bus, Delivery("echo/" + name, b""))
        return bus

    return listen


def next_event(bus: MqttBus):
    for _ in range(200):
        if (event := bus.receive(0.1)) is not None:
            return event
    raise AssertionError("no event in 20 s")


def await_event(bus: MqttBus, wanted) -> list:
    """Return what came before the event `wanted`, or the event of that class."""
    before = []
    while True:
        event = next_event(bus)
        if event == wanted or (isinstance(wanted, type) and isinstance(event, wanted)):
            return before
        before.append(event)


def test_messages_travel_in_order_and_an_unsubscription_ends_them(broker, connect, listen):
    listener, sender = listen(broker), connect(broker, "sender")
    payloads = [b"", b"\0\xff", bytes(range(256)) * 256]
    for payload in payloads:
        sender.do(Publish("t/x", payload, expiry_s=60))
    assert [next_event(listener) for _ in payloads] == [Delivery("t/x", payload) for payload in payloads]
    listener.do(Unsubscribe("t/#"))
    listener.do(Publish("t/x", b"unheard"))
    listener.do(Publish("echo/listener", b"end"))
    assert await_event(listener, Delivery("echo/listener", b"end")) == []


def test_the_last_retained_message_greets_a_late_subscriber(broker, connect, listen):
    sender = listen(broker, name="sender")
    for payload in (b"old", b"new"):
        sender.do(Publish("t/r", payload, retain=True))
    await_event(sender, Delivery("t/r", b"new"))
    late = connect(broker, "late")
    late.do(Subscribe("t/+"))
    assert next_event(late) == Connected(late._max_packet)
    assert next_event(late) == Delivery("t/r", b"new")


def test_the_last_will_is_spoken_and_kept_for_a_process_that_was_killed(broker, listen, connect):
    listener = listen(broker, "status/#")
    doomed = subprocess.Popen(
        [sys.executable, "-c", DOOMED, broker],
        cwd=Path(protocol.__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with doomed:
        assert doomed.stdout.readline() == b"connected\n"
        doomed.send_signal(signal.SIGKILL)
    assert next_event(listener) == Delivery("status/doomed", b"gone")
    late = connect(broker, "late")
    late.do(Subscribe("status/#"))
    assert all(isinstance(event, Connected) for event in await_event(late, Delivery("status/doomed", b"gone")))


def test_who_leaves_in_good_order_says_good_bye_and_no_last_will(broker, connect, listen):
    listener = listen(broker, "status/#")
    connect(broker, "doomed", WILL).close(Publish("status/doomed", b"bye", retain=True))
    listener.do(Publish("echo/listener", b"end"))
    assert next_event(listener) == Delivery("status/doomed", b"bye")
    assert await_event(listener, Delivery("echo/listener", b"end")) == []


def test_the_link_heals_when_the_broker_was_killed_and_comes_back(mosquitto, connect):
    url = mosquitto()
    bus = connect(url)
    assert isinstance(next_event(bus), Connected)
    mosquitto.last.kill()
    mosquitto.last.wait()
    assert isinstance(next_event(bus), Disconnected)
    assert bus.room() == 0
    bus.do(Publish("t/lost", b"while away"))
    mosquitto(port=BrokerSettings(url=url).port)
    await_event(bus, Connected)
    bus.do(Subscribe("t/#"))
    bus.do(Publish("t/x", b"back"))
    assert next_event(bus) == Delivery("t/x", b"back")
    assert bus.room() > 0


def test_a_message_above_the_announced_packet_size_is_refused_and_the_link_stays(mosquitto, listen):
    bus = listen(mosquitto("max_packet_size 2000"))
    with pytest.raises(BusError, match="takes at most 2000: raise its max_packet_size"):
        bus.do(Publish("t/x", bytes(2000)))
    bus.do(Publish("t/x", bytes(1900)))
    assert next_event(bus) == Delivery("t/x", bytes(1900))


def test_the_announced_packet_size_comes_with_the_connection(mosquitto, connect):
    assert next_event(connect(mosquitto("max_packet_size 2000"))) == Connected(2000)
    assert next_event(connect(mosquitto())) == Connected(None)


@pytest.mark.parametrize(("announced", "window"), [(3, 3), (50, WINDOW)])
def test_the_window_is_the_brokers_or_ours_whichever_is_smaller(mosquitto, connect, announced, window):
    bus = connect(mosquitto(f"max_inflight_messages {announced}"))
    assert bus.room() == window


def test_room_shrinks_by_each_message_and_a_starved_sender_is_woken(mosquitto, connect, wait_until):
    bus = connect(mosquitto())
    next_event(bus)
    mosquitto.last.send_signal(signal.SIGSTOP)
    try:
        for sent in range(WINDOW):
            assert bus.room() == WINDOW - sent
            bus.do(Publish("t/x", bytes(100)))
        assert bus.room() == 0
        assert bus.receive(0.0) is None
        woken = []
        waiting = threading.Thread(target=lambda: woken.append(bus.receive(20.0)))
        waiting.start()
        assert waiting.is_alive()
    finally:
        mosquitto.last.send_signal(signal.SIGCONT)
    waiting.join(10.0)
    assert woken == [None]
    wait_until(lambda: bus.room() == WINDOW, "the acknowledgements")


def test_what_exceeds_the_window_still_arrives_whole_and_in_order(mosquitto, listen):
    bus = listen(mosquitto("max_inflight_messages 2"))
    for number in range(100):
        bus.do(Publish("t/x", str(number).encode()))
    assert [next_event(bus).payload for _ in range(100)] == [str(number).encode() for number in range(100)]


def test_an_unreachable_broker_is_named_with_the_reason(free_port):
    with pytest.raises(BusError, match=rf"cannot reach the broker at mqtt://127.0.0.1:{free_port}: .*Connection refused"):
        MqttBus.open(BrokerSettings(url=f"mqtt://127.0.0.1:{free_port}", connect_timeout_s=1), "a")


def test_a_host_without_an_address_is_named_with_the_reason():
    with pytest.raises(BusError, match=r"mqtt://no-such-host.invalid: .*(not known|resolution|No address)"):
        MqttBus.open(BrokerSettings(url="mqtt://no-such-host.invalid", connect_timeout_s=1), "a")


def test_wake_ends_a_wait_from_another_thread(mosquitto, connect):
    bus = connect(mosquitto())
    next_event(bus)
    results = []
    waiting = threading.Thread(target=lambda: results.append(bus.receive(60.0)))
    waiting.start()
    bus.wake()
    waiting.join(10.0)
    assert results == [None]


def test_a_link_that_is_lost_while_it_connects_is_made_anew(mosquitto, connect, monkeypatch):
    """paho says so before its `connect` returns, when CONNECT cannot be written."""
    lost, ordinary = [], Client.connect

    def lose_the_first(client: Client, *arguments: object, **settings: object):
        code = ordinary(client, *arguments, **settings)
        if not lost:
            lost.append(client)
            client.socket().close()
            client._sock = None
            client.on_disconnect(client, None, None, ReasonCode(PacketTypes.DISCONNECT, "Unspecified error"), None)
        return code

    monkeypatch.setattr(Client, "connect", lose_the_first)
    assert isinstance(next_event(connect(mosquitto())), Disconnected)
    assert len(lost) == 1
