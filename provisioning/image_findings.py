"""What is in an image that is about to be flashed, and what should be or must not: only if one is unpacked already."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from protocol.findings import Finding
from provisioning.flash_choice import Choice
from provisioning.linux_for_tegra import Image
from provisioning.overlay import HOME, OWN
from provisioning.site import PACKAGE

WIZARD = "nv-oem-config.target"  # apply_binaries.sh makes it the target of the first boot where there is a desktop


def image_findings(choice: Choice, folder: Path) -> Iterator[Finding]:
    """Yield what is to be known of the root filesystem in `folder`; nothing if there is none yet."""
    image = Image(folder)
    if not (image.rootfs / "etc").is_dir():
        return
    yield _client(image)
    yield _first_user(image)
    if choice.wanted.massflash:
        yield _one_boards(image)


def _client(image: Image) -> Finding:
    if image.has(f"{HOME}/clipcast-client.deb") or PACKAGE in image.packages:
        return Finding("client in the image", "yes")
    return Finding(
        "client in the image", "no", "warn", "`clipcast device overlay` lays it; else `clipcast device provision` afterwards"
    )


def _first_user(image: Image) -> Finding:
    """Look where the first boot leads: NVIDIA's wizard and what starts services exclude each other."""
    try:
        target = (image.rootfs / "etc/systemd/system/default.target").readlink().name
    except OSError:
        target = ""
    if target != WIZARD:
        return Finding("first user", "no wizard at the first boot")
    return Finding(
        "first user",
        "none: the first boot is NVIDIA's wizard",
        "warn",
        "no client starts before somebody with a screen has been through it: ./tools/l4t_create_default_user.sh",
    )


def _one_boards(image: Image) -> Finding:
    """Look for what would make all boards one device."""
    name = "what is one board's own"
    left, hidden = [], []
    for path in OWN:
        try:
            (image.rootfs / path).lstat()
            left.append(path)
        except PermissionError:
            hidden.append(path)
        except OSError:
            continue
    if left:
        cure = "all boards would be that one, or quarrel about its claim: remove it from the image"
        return Finding(name, ", ".join(left), "fail", cure)
    if hidden:
        return Finding(name, f"cannot be looked for: {', '.join(hidden)}", "fail", "run this as root: sudo")
    return Finding(name, "nothing in the image")
