"""The readings for Prometheus, over HTTP, if the settings ask for it (`pip install 'clipcast[metrics]'`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from protocol.messages import Board, Status
from protocol.settings import SettingsError

GAUGES = {
    "temperature_c": ("clipcast_temperature_celsius", "The hottest zone"),
    "power_w": ("clipcast_power_watts", "The whole board, or the sum of its rails"),
    "gpu_load": ("clipcast_gpu_load_ratio", "The GPU's load, 0 to 1"),
    "memory_available_mib": ("clipcast_memory_available_mib", "MemAvailable: CPU and GPU share it on a Jetson"),
    "over_current_events": ("clipcast_over_current_events", "Throttlings for over-current since the board started"),
}


def serve_metrics(address: str, board: Callable[[], Board], status: Callable[[], Status]) -> Callable[[], None]:
    """Answer `GET /metrics` at HOST:PORT until what is returned is called. Raises SettingsError if that cannot be."""
    from prometheus_client import CollectorRegistry, start_http_server

    host, _, port = address.rpartition(":")
    registry = CollectorRegistry()
    registry.register(_Collector(board, status))
    try:
        server, thread = start_http_server(int(port), host, registry)
    except (OSError, OverflowError, ValueError) as error:
        raise SettingsError(f"cannot answer for Prometheus at {address}: {error}. Change `metrics`, or remove it") from error

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close


class _Collector:
    def __init__(self, board: Callable[[], Board], status: Callable[[], Status]) -> None:
        self._board = board
        self._status = status

    def collect(self) -> Iterator[Any]:
        """Yield what is known at this moment; what the board does not say has no line."""
        from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

        board, status = self._board(), self._status()
        for field, (name, what) in GAUGES.items():
            value = getattr(board, field)
            if value is not None:
                yield GaugeMetricFamily(name, what, value=float(value))
        yield GaugeMetricFamily("clipcast_round", "The round it last spoke of", value=float(status.round or 0))
        about = {"phase": status.phase, "profile": status.profile, "bits": status.bits, "device": status.device}
        also = {"platform": board.platform, "l4t": board.l4t, "power_mode": board.power_mode}
        told = {key: str(value) for key, value in {**about, **also}.items() if value is not None}
        yield InfoMetricFamily("clipcast_client", "What this client is doing, and on what", value=told)
