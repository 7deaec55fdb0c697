"""Which board is this? The answer comes with its reason, and is `generic-cpu` rather than a pretended Jetson."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from hardware_profiles.profile import Profile, load, names

FALLBACK = "generic-cpu"


@dataclass(frozen=True)
class Detection:
    """A profile and why it was chosen. `certain` is false for the fallback on a board that looks like a Jetson."""

    profile: Profile
    reason: str
    certain: bool


def detect(root: Path = Path("/")) -> Detection:
    """Recognise the board by its device tree's `compatible` and its memory, below `root` (another root in tests).

    The model string is not asked: an Orin Nano that calls itself an Orin NX is on record. `/proc/device-tree/compatible`
    names carrier, module, SKU and SoC in one read.
    """
    compatible = _read(root / "proc/device-tree/compatible").replace("\0", " ").split()
    memory = _mem_total_mib(root)
    for name in names():
        profile = load(name)
        wanted = profile.identity
        low, high = wanted.mem_total_mib
        if set(wanted.compatible) & set(compatible) and low <= memory <= high:
            match = min(set(wanted.compatible) & set(compatible))
            return Detection(profile, f"device tree says {match}, memory is {memory} MiB", certain=True)
    if any(entry.startswith("nvidia,tegra") for entry in compatible):
        reason = (
            f"this is a Jetson ({', '.join(compatible)}, {memory} MiB) that no profile describes: using {FALLBACK}, which "
            f"leaves its GPU idle. Name the nearest profile in the client's TOML, see `clipcast profiles list`"
        )
        return Detection(load(FALLBACK), reason, certain=False)
    machine = platform.machine() if root == Path("/") else "unknown machine"
    return Detection(load(FALLBACK), f"no Jetson device tree on this {machine}, memory is {memory} MiB", certain=True)


def _mem_total_mib(root: Path) -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) // 1024
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
