"""The fault proxies themselves: each fault does what it says, and without faults every byte passes."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import wait_until
from tests.faults.mqtt_proxy import MqttFaults, MqttProxy, Packet, at_qos_0, emptied, read_packet
from tests.faults.proxy import FaultProxy
from tests.faults.relay import UP


@pytest.fixture
def echo() -> Iterator[int]:
    """Port of a server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(near: socket.socket) -> None:
        with near:
            while data := _received(near):
                near.sendall(data)

    def serve() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(near,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield int(listener.getsockname()[1])
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def _received(end: socket.socket) -> bytes:
    try:
        return end.recv(65536)
    except OSError:
        return b""


def received(end: socket.socket, size: int) -> bytes:
    """What comes until `size` bytes, the end of the connection or a second of silence."""
    end.settimeout(1.0)
    data = b""
    while len(data) < size and (more := _received(end)):
        data += more
    return data


def through(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), 5)


def test_without_faults_every_byte_passes(echo: int, fault_proxy: Callable[..., FaultProxy]) -> None:
    proxy = fault_proxy(echo)
    data = random.Random(0).randbytes(1_000_000)
    with through(proxy) as end:
        threading.Thread(target=end.sendall, args=(data,), daemon=True).start()
        assert hashlib.sha256(received(end, len(data))).digest() == hashlib.sha256(data).digest()
    assert proxy.moved[UP] == len(data)
    assert proxy.cuts == 0


def test_a_connection_is_cut_at_its_byte(echo: int, fault_proxy: Callable[..., FaultProxy]) -> None:
    proxy = fault_proxy(echo, cut_after=(1000, 1000))
    with through(proxy) as end:
        end.sendall(bytes(2500))
        assert len(received(end, 2500)) <= 1000
        assert end.recv(1) == b""
    assert proxy.cuts == 1
    assert sum(proxy.moved.values()) == 1000


def test_a_rate_holds_and_a_delay_delays(echo: int, fault_proxy: Callable[..., FaultProxy]) -> None:
    slow = fault_proxy(echo, rate=100_000.0, directions=(UP,))
    with through(slow) as end:
        began = time.monotonic()
        end.sendall(bytes(50_000))
        assert len(received(end, 50_000)) == 50_000
        assert time.monotonic() - began >= 0.45
    late = fault_proxy(echo, delay_s=0.2)
    with through(late) as end:
        began = time.monotonic()
        end.sendall(b"x")
        assert received(end, 1) == b"x"
        assert time.monotonic() - began >= 0.4  # there and back


def test_frozen_connections_stay_and_move_again(echo: int, fault_proxy: Callable[..., FaultProxy]) -> None:
    proxy = fault_proxy(echo)
    with through(proxy) as end:
        end.sendall(b"a")
        assert received(end, 1) == b"a"
        proxy.freeze()
        end.sendall(b"b")
        assert received(end, 1) == b""
        proxy.thaw()
        assert received(end, 1) == b"b"


@pytest.mark.parametrize("reset", [False, True])
def test_all_connections_are_cut_at_drawn_times(echo: int, fault_proxy: Callable[..., FaultProxy], reset: bool) -> None:
    proxy = fault_proxy(echo)
    with through(proxy) as one, through(proxy) as other:
        for end in (one, other):
            end.sendall(b"a")
            assert received(end, 1) == b"a"
        proxy.cut_every((0.05, 0.1), reset)
        wait_until(lambda: proxy.cuts >= 2)
        for end in (one, other):
            if reset:
                with pytest.raises(ConnectionResetError):
                    end.recv(1)
            else:
                assert end.recv(1) == b""
    proxy.heal()


def packet_of(data: bytes) -> Packet | None:
    async def read() -> Packet | None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await read_packet(reader)

    return asyncio.run(read())


@pytest.mark.parametrize("size", [0, 1, 100, 127, 128, 16_383, 16_384, 70_000])
def test_packets_are_read_as_they_are_written(size: int) -> None:
    packet = Packet(0x32, b"\x00\x03a/b\x00\x07\x00" + bytes(size))
    assert packet_of(packet.encode()) == packet
    assert (packet.kind, packet.qos, packet.topic) == (3, 1, "a/b")
    assert emptied(packet) == Packet(0x32, b"\x00\x06nobody\x00\x07\x00")
    assert at_qos_0(packet) == Packet(0x30, b"\x00\x03a/b\x00" + bytes(size))
    assert packet_of(b"") is None


def test_messages_are_lost_doubled_and_late_and_still_acknowledged(mosquitto: Callable[..., str]) -> None:
    """With paho at both ends: every publication is acknowledged, some arrive never, some twice."""
    from paho.mqtt.client import Client
    from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

    port = int(mosquitto().rsplit(":", 1)[1])
    proxy = MqttProxy(port, 3, MqttFaults(drop=0.2, double=0.2, reorder=0.3, hold_acks=0.3, late_s=0.05))
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
    got: list[int] = []
    ready = threading.Event()
    client.on_message = lambda _client, _data, message: got.append(int(message.payload)) if message.payload else None
    client.on_subscribe = lambda *_: ready.set()
    client.connect("127.0.0.1", proxy.port)
    client.loop_start()
    try:
        client.subscribe("t", qos=1)
        assert ready.wait(10)
        for number in range(200):
            sent = client.publish("t", str(number), qos=1)
            sent.wait_for_publish(10)
            assert sent.is_published()
        wait_until(lambda: len(set(got)) > 100)
    finally:
        client.disconnect()
        client.loop_stop()
        proxy.close()
    assert len(set(got)) < 200
    assert len(got) > len(set(got))
    assert got != sorted(got)
    assert all(proxy.counts[what] > 0 for what in ("dropped", "doubled", "reordered", "held"))
