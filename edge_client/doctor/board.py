"""The board and its system: what it is, how it is, and whether there is room."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from edge_client.monitor.readings import Readings
from hardware_profiles.detect import Detection
from protocol.findings import Finding

RELEASED = datetime(2026, 11, 1, tzinfo=timezone.utc)  # no clock that is right shows an earlier day
SCARCE_MIB, LEAST_MIB = 1500, 700
SCARCE_DISK, LEAST_DISK = 4 * 1024**3, 512 * 1024**2


def examine_board(
    found: Detection, readings: Readings, folder: Path, now: datetime, root: Path = Path("/"), *, is_client: bool = False
) -> Iterator[Finding]:
    """Yield what is found; `folder` is where the client keeps its state, or will."""
    yield _profile(found, is_client)
    yield _platform(found)
    yield _python(found)
    yield _power(found, readings)
    yield _temperature(found, readings)
    yield _over_current(readings)
    yield _memory(readings)
    yield _swap(found, root)
    yield _disk(folder)
    yield _clock(now)


def _profile(found: Detection, is_client: bool) -> Finding:
    told = f"{found.profile.name}: {found.reason}"
    if found.profile.tier == "unsupported":
        return Finding("board", told, "fail", found.profile.advice)
    if found.profile.tier == "inference":
        return Finding("board", told, "fail" if is_client else "warn", found.profile.advice)
    return Finding("board", told, *(() if found.certain else ("warn", "name the profile in client.toml: `profile = ...`")))


def _platform(found: Detection) -> Finding:
    l4t = f", L4T {found.board.l4t}" if found.board.l4t else ""
    if found.platform is None:
        return Finding("platform", f"none that is known{l4t}", "warn", "JetPack 6.2 and 7.2 are: flash one of them")
    told = f"{found.platform.title}{l4t}"
    if not found.platform.client:
        return Finding("platform", told, "warn" if found.profile.tier == "inference" else "fail", found.platform.advice)
    return Finding("platform", told)


def _python(found: Detection) -> Finding:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    fact = found.platform.facts.get("python") if found.platform else None
    if found.board.is_tegra and fact is not None and str(fact.value) != here:
        cure = f"use the system's {fact.value}: NVIDIA's wheels are made for that one only"
        return Finding("Python", here, "warn", cure)
    return Finding("Python", here)


def _power(found: Detection, readings: Readings) -> Finding:
    if readings.power_mode:
        return Finding("power mode", readings.power_mode)
    if not found.board.is_tegra:
        return Finding("power mode", "none: no Jetson", "ok")
    return Finding("power mode", "not found", "warn", "look with `sudo nvpmodel -q`: a low one switches cores off")


def _temperature(found: Detection, readings: Readings) -> Finding:
    hottest, limits = readings.hottest_c, found.profile.thermal
    if hottest is None:
        return Finding("temperature", "the board does not say", "unknown")
    if limits is not None and hottest > limits.pause_above_c:
        return Finding(
            "temperature", f"{hottest:.0f} C", "warn", f"training waits above {limits.pause_above_c:.0f} C: cool it"
        )
    return Finding("temperature", f"{hottest:.0f} C")


def _over_current(readings: Readings) -> Finding:
    count = readings.over_current_events
    if count is None:
        return Finding("over-current", "the board does not count", "unknown")
    cure = "a stronger supply, or a lower power mode: `sudo nvpmodel -m ID`"
    return Finding("over-current", f"{count} events since it started", *(("warn", cure) if count else ()))


def _memory(readings: Readings) -> Finding:
    available, total = readings.memory_available_mib, readings.memory_total_mib
    if available is None:
        return Finding("memory", "the system does not say", "unknown")
    told = f"{available} MiB available of {total}"
    cure = "stop what else runs; without a desktop: `sudo systemctl set-default multi-user.target`. See `clipcast plan`"
    if available < SCARCE_MIB:
        return Finding("memory", told, "fail" if available < LEAST_MIB else "warn", cure)
    return Finding("memory", told)


def _swap(found: Detection, root: Path) -> Finding:
    try:
        lines = (root / "proc/swaps").read_text().splitlines()[1:]
    except OSError:
        return Finding("swap", "the system does not say", "unknown")
    devices = [line.split()[0] for line in lines if line.split()]
    compressed = [device for device in devices if re.match(r"/dev/zram", device)]
    if found.board.is_tegra and compressed:
        cure = "zram takes memory and processor, and holds nothing of the GPU's: `sudo systemctl disable nvzramconfig`"
        return Finding("swap", ", ".join(devices), "warn", cure)
    return Finding("swap", ", ".join(devices) or "none")


def _disk(folder: Path) -> Finding:
    place = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    free = shutil.disk_usage(place).free
    told = f"{free / 1024**3:.1f} GiB free at {place}"
    if free < SCARCE_DISK:
        cure = "make room, or set `state` in client.toml to another disk"
        return Finding("disk", told, "fail" if free < LEAST_DISK else "warn", cure)
    return Finding("disk", told)


def _clock(now: datetime) -> Finding:
    told = now.strftime("%Y-%m-%d %H:%M UTC")
    if now < RELEASED:
        cure = (
            "the federation does not mind, but TLS certificates are not valid yet: `timedatectl set-ntp true`, or a battery"
        )
        return Finding("clock", told, "warn", cure)
    return Finding("clock", told)
