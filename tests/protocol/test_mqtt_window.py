"""What really travels: a tap between MqttBus and Mosquitto counts the unacknowledged messages."""

from __future__ import annotations

import signal
import socket
import threading

import pytest

from protocol.bus import Publish
from protocol.mqtt import WINDOW, MqttBus
from protocol.settings import BrokerSettings

PUBLISH, PUBACK = 3, 4


def packet_types(stream: bytearray):
    """Take whole MQTT packets off the stream; yield their types."""
    while len(stream) >= 2:
        length, used, more = 0, 1, True
        while more:
            if used >= len(stream):
                return
            length |= (stream[used] & 0x7F) << 7 * (used - 1)
            more = bool(stream[used] & 0x80)
            used += 1
        if len(stream) < used + length:
            return
        yield stream[0] >> 4
        del stream[: used + length]


class Tap:
    """A TCP relay to a broker for any number of connections."""

    def __init__(self, port: int) -> None:
        self._broker = ("127.0.0.1", port)
        self._server = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._unacknowledged = 0
        self.most = 0
        self.published = 0
        self.url = f"mqtt://127.0.0.1:{self._server.getsockname()[1]}"
        self._sockets: list[socket.socket] = [self._server]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            broker = socket.create_connection(self._broker)
            self._sockets += [client, broker]
            for source, target in ((client, broker), (broker, client)):
                self._threads.append(threading.Thread(target=self._relay, args=(source, target)))
                self._threads[-1].start()

    def _relay(self, source: socket.socket, target: socket.socket) -> None:
        stream = bytearray()
        try:
            while data := source.recv(65536):
                stream += data
                for kind in packet_types(stream):
                    self._count(kind)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def _count(self, kind: int) -> None:
        with self._lock:
            self._unacknowledged += {PUBLISH: 1, PUBACK: -1}.get(kind, 0)
            self.published += kind == PUBLISH
            self.most = max(self.most, self._unacknowledged)

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for opened in self._sockets:
            opened.close()
        for thread in self._threads[1:]:
            thread.join()


@pytest.mark.parametrize(("announced", "window"), [(1, 1), (3, 3), (50, WINDOW)])
def test_no_more_messages_travel_unacknowledged_than_both_sides_allow(mosquitto, wait_until, announced, window):
    tap = Tap(BrokerSettings(url=mosquitto(f"max_inflight_messages {announced}")).port)
    try:
        bus = MqttBus.open(BrokerSettings(url=tap.url, connect_timeout_s=10.0), "a")
        try:
            mosquitto.last.send_signal(signal.SIGSTOP)
            for _ in range(60):  # without asking for room
                bus.do(Publish("t/x", bytes(20_000)))
            wait_until(lambda: tap.published >= window, "the window to fill")
            mosquitto.last.send_signal(signal.SIGCONT)
            wait_until(lambda: bus.room() == window, "all acknowledgements")
        finally:
            bus.close()
    finally:
        mosquitto.last.send_signal(signal.SIGCONT)
        tap.close()
    assert tap.published == 60
    assert tap.most == window
