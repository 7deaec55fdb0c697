"""What a board's own files say of it, below `root` (another root in tests). Nothing is run, no privilege is needed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MODULE = re.compile(r"(?<!\w)p\d{4}-\d{4}(?!\w)")
TNSPEC = re.compile(r"^(?:TNSPEC|COMPATIBLE_SPEC)\s+(\d{4})-[^-\s]*-(\d{4})", re.MULTILINE)
RELEASE = r"([0-9]{1,4}(?:\.[0-9]{1,4}){0,2})"
L4T_RELEASE = re.compile(r"^#\s*R([0-9]{1,4}) \(release\), REVISION: " + RELEASE, re.MULTILINE)
L4T_PACKAGE = re.compile(r"^Package: nvidia-l4t-core\n(?:.+\n)*?Version: " + RELEASE, re.MULTILINE)
POWER_MODEL = re.compile(r"<\s*POWER_MODEL\s+ID=([0-9]{1,4})\s+NAME=([A-Za-z0-9][A-Za-z0-9_.-]{0,63})\s*>")
CURRENT_MODE = re.compile(r"pmode:([0-9]{1,6})")


@dataclass(frozen=True)
class BoardFiles:
    """What was found; empty, zero or None where a file is missing or says nothing.

    `compatible` are the entries of the device tree's list, `modules` the board ids with SKU in it, or else in the flashing
    specification, `l4t` the release of NVIDIA's Linux, `power_mode` the current one's name, `memory_mib` MemTotal.
    """

    model: str
    compatible: tuple[str, ...]
    modules: tuple[str, ...]
    modules_from: str
    memory_mib: int
    l4t: str
    power_mode: str
    is_super: bool
    nvidia_driver: bool

    @property
    def is_tegra(self) -> bool:
        """Whether this is a Jetson, of whatever kind."""
        return any(entry.startswith("nvidia,tegra") for entry in self.compatible)


def read_board(root: Path = Path("/")) -> BoardFiles:
    """Read what a board's files say; missing files are no error."""
    compatible = tuple(_read(root / "proc/device-tree/compatible").replace("\0", " ").split())
    modules, where = tuple(module for entry in compatible for module in MODULE.findall(entry)), "its device tree"
    if not modules:
        found = TNSPEC.search(_read(root / "etc/nv_boot_control.conf"))
        modules, where = ((f"p{found[1]}-{found[2]}",) if found else ()), "/etc/nv_boot_control.conf"
    return BoardFiles(
        model=_read(root / "proc/device-tree/model").strip("\0 \n"),
        compatible=compatible,
        modules=tuple(dict.fromkeys(modules)),
        modules_from=where,
        memory_mib=_memory_mib(root),
        l4t=_l4t(root),
        power_mode=power_mode(root),
        is_super=any(entry.endswith("-super") for entry in compatible),
        nvidia_driver=(root / "proc/driver/nvidia/version").exists(),
    )


def _l4t(root: Path) -> str:
    """Return the release: the file is absent in some containers and builds, where the packages' list may have it."""
    found = L4T_RELEASE.search(_read(root / "etc/nv_tegra_release"))
    if found:
        return f"{found[1]}.{found[2]}"
    package = L4T_PACKAGE.search(_read(root / "var/lib/dpkg/status"))
    return package[1] if package else ""


def power_mode(root: Path = Path("/")) -> str:
    """Return the current power mode's name, empty if unknown: its number means another mode on another board."""
    current = CURRENT_MODE.search(_read(root / "var/lib/nvpmodel/status"))
    names = {int(number): name for number, name in POWER_MODEL.findall(_read(root / "etc/nvpmodel.conf"))}
    return names.get(int(current[1]), "") if current else ""


def _memory_mib(root: Path) -> int:
    found = re.search(r"^MemTotal:\s+(\d+)", _read(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) // 1024 if found else 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
