"""What Prometheus reads, over real HTTP."""

from __future__ import annotations

import socket
import urllib.request

import pytest

from edge_client.monitor.prometheus import serve_metrics
from protocol.messages import Board, Status
from protocol.settings import SettingsError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def test_what_the_board_says_is_read_anew_each_time_and_what_it_does_not_say_is_left_out():
    boards = [
        Board(platform="jetpack-6.2", temperature_c=51.5, over_current_events=0),
        Board(temperature_c=60.0, power_w=7.5),
    ]
    status, port = Status(state="online", phase="training", round=3, bits=4), free_port()
    close = serve_metrics(f"127.0.0.1:{port}", lambda: boards.pop(0), lambda: status)
    try:
        first, second = read(port), read(port)
    finally:
        close()
    assert first.pop('clipcast_client_info{bits="4",phase="training",platform="jetpack-6.2"}') == 1.0
    assert first == {"clipcast_temperature_celsius": 51.5, "clipcast_over_current_events": 0.0, "clipcast_round": 3.0}
    assert (second["clipcast_temperature_celsius"], second["clipcast_power_watts"]) == (60.0, 7.5)
    with pytest.raises(OSError, match="refused"):
        read(port)


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "no.such.host.invalid:9464", "{taken}"])
def test_an_address_that_cannot_be_had_is_named(address):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = address.format(taken=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(SettingsError, match="cannot answer for Prometheus") as caught:
            serve_metrics(address, Board, lambda: Status(state="online"))
    assert address in str(caught.value)
