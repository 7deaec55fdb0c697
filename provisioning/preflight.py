"""What makes a flash fail, looked for on this machine before: files below `root` are read, nothing is run or changed.

The list is what public flashing guides name as causes. Only what cannot work is a failure; the rest warns.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hardware_profiles.facts import Fact
from hardware_profiles.profile import Profile, load, names
from protocol.findings import Finding, State
from provisioning.flash_choice import Choice
from provisioning.image_findings import image_findings

NVIDIA = "0955"
NFS = 2049
UP, TUN = 0x1, 0x1
TUNNELS = ("tun", "wg", "ppp", "tailscale", "ipsec")
X86_64 = "x86_64"


def preflight(choice: Choice, folder: Path, root: Path = Path("/"), machine: str | None = None) -> Iterator[Finding]:
    """Yield what is found on the machine with the files below `root`; `folder` is where NVIDIA's tools are or will be.

    `machine` is the processor, by default this machine's.
    """
    yield _processor(os.uname().machine if machine is None else machine)
    yield _system(choice.flashing.host, root)
    yield _disk(choice.flashing.disk, folder)
    yield from image_findings(choice, folder)
    yield boards(choice, root, 1)
    yield _modem_manager(root)
    yield _vpn(root)
    yield from _firewalls(choice, root)


def _processor(machine: str) -> Finding:
    if machine == X86_64:
        return Finding("processor", machine)
    return Finding(
        "processor", machine, "fail", "NVIDIA's tools are x86-64 programs: flash from such a machine, no virtual one"
    )


def _system(host: Fact, root: Path) -> Finding:
    said = dict(re.findall(r'^(ID|VERSION_ID|PRETTY_NAME)="?([^"\n]*)"?$', _read(root / "etc/os-release"), re.MULTILINE))
    supported = host.value if isinstance(host.value, tuple) else ()
    name = said.get("PRETTY_NAME", "unknown")
    if said.get("ID") == "ubuntu" and said.get("VERSION_ID") in supported:
        return Finding("system", name)
    return Finding("system", name, "warn", f"NVIDIA's tools are made for Ubuntu {' and '.join(supported)}: others may work")


def _disk(needed: Fact, folder: Path) -> Finding:
    """Compare what is free where the tools are to be with what everything takes; less is enough where they are unpacked."""
    there = folder.absolute()
    while not there.is_dir():
        there = there.parent
    free = shutil.disk_usage(there).free / 1e9
    measured, need = f"{free:.0f} GB free at {there}", float(str(needed.value))
    if free >= need:
        return Finding("disk", measured)
    unpacked = (folder / "rootfs/etc").is_dir()
    state: State = "warn" if unpacked and free >= need / 4 else "fail"
    return Finding("disk", measured, state, f"unpacking and building take about {needed}: make room, or take another disk")


def boards(choice: Choice, root: Path, most: int) -> Finding:
    """Look for boards in recovery mode: only such as are planned, at least one and at most so many.

    An image for many is made with one attached alone, so one is what a plan begins with.
    """
    wanted, name = str(choice.board.recovery_usb_id.value), "board in recovery mode"
    seen = Counter(_usb(root))
    others = {found: count for found, count in seen.items() if found != wanted}
    measured = ", ".join(f"{count} x {found} ({_what(found, wanted)})" for found, count in sorted(seen.items())) or "none"
    if seen[wanted] == 0 and any(_same_config(choice, found) for found in others):
        cure = "another module than the profile's, flashed by the same configuration: name its profile to be sure"
        return Finding(name, measured, "fail", cure)
    if seen[wanted] == 0:
        cure = f"none is {wanted}: put the board into recovery mode as the plan says; charge-only cables and hubs hide it"
        return Finding(name, measured, "fail", cure)
    if others:
        return Finding(name, measured, "fail", "unplug the others: the tools take whatever they find first")
    if seen[wanted] > most == 1 and choice.wanted.massflash:
        return Finding(name, measured, "fail", "the image is made with one board attached alone: the others come after that")
    if seen[wanted] > most:
        many = "the image is for no more" if choice.wanted.massflash else "or plan with --massflash"
        return Finding(name, measured, "fail", f"{most} at most: unplug the others, {many}")
    return Finding(name, measured)


def _usb(root: Path) -> Iterator[str]:
    """Yield the ids of NVIDIA's devices on USB."""
    for vendor in sorted((root / "sys/bus/usb/devices").glob("*/idVendor")):
        if _read(vendor).strip().lower() == NVIDIA:
            yield f"{NVIDIA}:{_read(vendor.with_name('idProduct')).strip().lower()}"


def _with_id(usb_id: str) -> list[Profile]:
    return [one for one in map(load, names()) if one.flash and one.flash.recovery_usb_id.value == usb_id]


def _what(usb_id: str, wanted: str) -> str:
    if usb_id == wanted:
        return "as planned"
    return " or ".join(one.name for one in _with_id(usb_id)) or "no recovery mode that is known: perhaps a board that runs"


def _same_config(choice: Choice, usb_id: str) -> bool:
    configs = {config.config for one in _with_id(usb_id) if one.flash for config in one.flash.configs}
    return choice.config.config in configs


def _modem_manager(root: Path) -> Finding:
    running = any(_read(comm).strip() == "ModemManager" for comm in (root / "proc").glob("[0-9]*/comm"))
    if not running:
        return Finding("ModemManager", "not running")
    return Finding(
        "ModemManager", "running", "warn", "it takes USB serial devices for modems: sudo systemctl stop ModemManager"
    )


def _vpn(root: Path) -> Finding:
    up = [
        link.name for link in sorted((root / "sys/class/net").glob("*")) if _is_tunnel(link) and _number(link / "flags") & UP
    ]
    if not up:
        return Finding("VPN", "none is up")
    return Finding(
        "VPN", f"up: {', '.join(up)}", "warn", "it may take the board's network address for its own: end it meanwhile"
    )


def _is_tunnel(link: Path) -> bool:
    wireguard = "DEVTYPE=wireguard" in _read(link / "uevent")
    return wireguard or link.name.startswith(TUNNELS) or bool(_number(link / "tun_flags") & TUN)


def _firewalls(choice: Choice, root: Path) -> Iterator[Finding]:
    if not choice.uses_network:
        yield Finding("firewall", "not asked: this board fetches nothing over NFS")
        return
    yield _ipv6(root)
    yield _ufw(root)
    yield Finding(
        "other firewalls",
        "not looked at: their rules can be read as root alone",
        "unknown",
        f"`sudo nft list ruleset`: let port {NFS} in from usb0 (NFS, from which the board fetches the image)",
    )


def _ipv6(root: Path) -> Finding:
    """Look whether the network on USB can have the addresses that NVIDIA's tool gives it."""
    off = root / "proc/sys/net/ipv6/conf/all/disable_ipv6"
    if off.exists() and _number(off) == 0:
        return Finding("IPv6", "on")
    measured = "off" if off.exists() else "not in this kernel"
    return Finding("IPv6", measured, "fail", "the board is spoken to over it: sudo sysctl net.ipv6.conf.all.disable_ipv6=0")


def _ufw(root: Path) -> Finding:
    if not re.search(r"^ENABLED\s*=\s*yes", _read(root / "etc/ufw/ufw.conf"), re.MULTILINE | re.IGNORECASE):
        return Finding("firewall (ufw)", "off")
    rules, cure = root / "etc/ufw/user.rules", f"sudo ufw allow {NFS}, or `sudo ufw disable` meanwhile"
    if not os.access(rules, os.R_OK):
        return Finding("firewall (ufw)", f"on; whether it lets {NFS} in can be read as root alone", "warn", cure)
    if re.search(rf"--dports? (\S+,)?{NFS}\b.* -j ACCEPT", _read(rules)):
        return Finding("firewall (ufw)", f"on, lets {NFS} in")
    return Finding("firewall (ufw)", f"on, and no rule lets {NFS} in", "fail", cure)


def _number(path: Path) -> int:
    try:
        return int(_read(path).strip() or "0", 0)
    except ValueError:
        return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
