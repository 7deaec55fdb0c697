"""Ask a board how it is: the kernel's files first, and only for what they leave open NVIDIA's tools."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from edge_client.monitor.nvml import read_nvml
from edge_client.monitor.readings import Readings
from edge_client.monitor.sysfs import read_sysfs
from edge_client.monitor.tegrastats import read_tegrastats

Reader = Callable[[], Readings]


def read_jtop() -> Readings:
    """Return what jetson-stats' service says, if its Python package is installed; it is asked, never needed."""
    try:
        from jtop import jtop
    except ImportError:
        return Readings()
    with contextlib.suppress(Exception), jtop() as board:  # another version of its service raises what it likes
        return Readings(
            temperatures_c={name: float(zone["temp"]) for name, zone in board.temperature.items() if zone.get("online")},
            power_w=float(board.power["tot"]["power"]) / 1000,
        )
    return Readings()


class Monitor:
    """Readings of this board.

    A reader is asked only while temperature or power is missing; those that know nothing of either are not asked again.
    """

    def __init__(
        self, first: Reader = read_sysfs, others: Sequence[Reader] = (read_tegrastats, read_jtop, read_nvml)
    ) -> None:
        self._first = first
        self._others = list(others)

    def read(self) -> Readings:
        """Return readings of now; takes a second at most where the kernel's files say too little."""
        found = self._first()
        for reader in tuple(self._others):
            if found.temperatures_c and found.power_w is not None:
                break
            more = reader()
            if not more.temperatures_c and more.power_w is None:
                self._others.remove(reader)
            found = found.or_else(more)
        return found
