"""Readings from the kernel's own files, below `root` (another root in tests): no privilege, nothing to install.

Boards differ in which of these files they have, and some fail while they are read: whatever is missing or makes no sense is
left out, never an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from edge_client.monitor.readings import Readings
from hardware_profiles.board_files import power_mode

PLAUSIBLE_C = (-40.0, 150.0)  # a zone whose sensor is off says -256
TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")  # what the whole board takes, where it is measured
GPU_LOADS = ("sys/devices/gpu.0/load", "sys/devices/platform/gpu.0/load", "sys/devices/platform/17000000.gpu/load")
GPU_NODES = ("gv11b", "gp10b", "gm20b", "ga10b", "gb10b", "gpu")


def read_sysfs(root: Path = Path("/")) -> Readings:
    """Return what the files below `root` say."""
    memory = {name: kib // 1024 for name, kib in counts(root / "proc/meminfo").items()}
    swap = (memory.get("SwapTotal"), memory.get("SwapFree"))
    load, mhz = _gpu(root)
    return Readings(
        temperatures_c=dict(_temperatures(root)),
        power_w=_power(root),
        gpu_load=load,
        gpu_mhz=mhz,
        memory_available_mib=memory.get("MemAvailable"),
        memory_total_mib=memory.get("MemTotal"),
        swap_used_mib=None if swap[0] is None or swap[1] is None else swap[0] - swap[1],
        over_current_events=_over_current(root),
        power_mode=power_mode(root) or None,
    )


def _temperatures(root: Path) -> Iterator[tuple[str, float]]:
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        celsius = _number(zone / "temp")
        if celsius is not None and PLAUSIBLE_C[0] <= celsius / 1000 <= PLAUSIBLE_C[1]:
            yield text_of(zone / "type") or zone.name, celsius / 1000


def _power(root: Path) -> float | None:
    """W of the whole board if one rail measures that, else the sum of all rails."""
    rails = dict(_rails(root))
    for name in TOTAL_RAILS:
        if name in rails:
            return rails[name]
    return sum(rails.values()) if rails else None


def _rails(root: Path) -> Iterator[tuple[str, float]]:
    """Each rail's name and W: from the hwmon driver (JetPack 5 and newer), or from the older one's iio device."""
    for label in sorted((root / "sys/bus/i2c/devices").glob("*/hwmon/hwmon*/in*_label")):
        number = label.name.removeprefix("in").removesuffix("_label")
        volts, amperes = _number(label.with_name(f"in{number}_input")), _number(label.with_name(f"curr{number}_input"))
        name = text_of(label)
        if volts is not None and amperes is not None and name not in {"", "NC"}:
            yield name, volts * amperes / 1e6
    for label in sorted((root / "sys/bus/i2c/drivers/ina3221x").glob("*/iio:device*/rail_name_*")):
        number = label.name.removeprefix("rail_name_")
        milliwatts = _number(label.with_name(f"in_power{number}_input"))
        if milliwatts is not None and text_of(label):
            yield text_of(label), milliwatts / 1000


def _gpu(root: Path) -> tuple[float | None, float | None]:
    """Return the GPU's load, 0 to 1, and its clock in MHz: of the device whose node is called like a GPU."""
    for device in sorted((root / "sys/class/devfreq").glob("*")):
        name = text_of(device / "device/of_node/name") or device.name
        if any(node in name for node in GPU_NODES):
            load, hertz = _number(device / "device/load"), _number(device / "cur_freq")
            return (None if load is None else load / 1000), (None if hertz is None else hertz / 1e6)
    loads = (_number(root / place) for place in GPU_LOADS)
    return next((load / 1000 for load in loads if load is not None), None), None


def _over_current(root: Path) -> int | None:
    """Return how often the board was throttled because its supply could not follow."""
    events = [
        _number(file)
        for name in sorted((root / "sys/class/hwmon").glob("hwmon*/name"))
        if text_of(name) == "soctherm_oc"
        for file in sorted(name.parent.glob("oc*_event_cnt"))
    ]
    known = [int(count) for count in events if count is not None]
    return sum(known) if known else None


def counts(path: Path) -> dict[str, int]:
    """Return numbers by name, from lines of a name and a number (and a unit)."""
    pairs = (line.split()[:2] for line in text_of(path).splitlines() if len(line.split()) >= 2)
    return {name.rstrip(":"): int(value) for name, value in pairs if value.isdecimal()}


def _number(path: Path) -> float | None:
    try:
        number = float(text_of(path))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def text_of(path: Path) -> str:
    """Return what a file says, empty if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        return ""
