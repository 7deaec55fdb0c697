"""NVIDIA's Linux_for_Tegra as far as it is looked at, and a lab to fill it: nothing in it is NVIDIA's."""

from __future__ import annotations

from pathlib import Path

from coordinator.broker.authority import Authority
from provisioning.package.deb import build_package
from provisioning.site import Site
from tests.provisioning.package.wheels import own_wheel, wheelhouse

BROKER = "mqtts://labserver"
# The first 20 bytes of a program for arm64: ELF, 64 bits, little-endian, machine 183.
ARM64_PROGRAM = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00" + (183).to_bytes(2, "little")
SCRIPT = '#!/bin/sh\necho "$(basename "$0") $*" >> "{log}"\nexit {code}\n'


def tegra(folder: Path, l4t: str, *, program: bytes = ARM64_PROGRAM, flash_ends_with: int = 0) -> Path:
    """Write a Linux_for_Tegra of a release, e.g. 36.4.3, whose tools note in `ran` how they were called."""
    branch, major, minor = l4t.split(".")
    rootfs = folder / "rootfs"
    for name in ("etc", "bin", "var/lib/dpkg"):
        (rootfs / name).mkdir(parents=True)
    (rootfs / "etc/nv_tegra_release").write_text(
        f"# R{branch} (release), REVISION: {major}.{minor}, GCID: 1, BOARD: generic\n"
    )
    (rootfs / "bin/ls").write_bytes(program)
    packages = ("python3", "python3-venv", "passwd")
    status = "\n".join(f"Package: {name}\nStatus: install ok installed\n" for name in packages)
    (rootfs / "var/lib/dpkg/status").write_text(status)
    (folder / "nv_tegra").mkdir()
    said = f"BSP_BRANCH={branch}\nBSP_MAJOR={major}\nBSP_MINOR={minor}\n"
    (folder / "nv_tegra/bsp_version").write_text(said)
    tools = ("apply_binaries.sh", "flash.sh", "l4t_initrd_flash.sh", "tools/kernel_flash/l4t_initrd_flash.sh")
    for tool in tools:
        path = folder / tool
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SCRIPT.format(log=folder / "ran", code=flash_ends_with if "flash" in tool else 0))
        path.chmod(0o755)
    return folder


def lab(folder: Path) -> Site:
    """Make a lab's settings and authority in a folder, and read them as a board's."""
    authority = Authority.create(folder / "ca", "lab")
    authority.issue("enrol")
    (folder / "coordinator.toml").write_text(
        'federation = "lab"\nclasses = ["cat", "dog"]\n[broker]\nurl = "mqtts://localhost"\n'
    )
    return Site.read(folder / "coordinator.toml", folder / "ca", BROKER)


def package(folder: Path) -> Path:
    """Build a small package of a client that answers."""
    made = build_package(folder / "dist", "infer", own_wheel(folder / "own"), wheelhouse(folder / "wheels"))
    assert made.name == "clipcast-client_0.1.0_all.deb"
    return made
