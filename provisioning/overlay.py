"""What is laid into the root filesystem of a Linux_for_Tegra before it is flashed.

The package goes in as the file that it is, with a unit that installs it at the first boot, when dpkg runs on its own
machine: the package's scripts make its user and enable its services as they do anywhere, and dpkg knows every file. It is
not unpacked into the image besides: that would be the same gigabytes twice, and files that dpkg does not know until then.
Without a network this works if the image has what the package depends on, which is looked up here; a package that carries
its wheels needs a Python alone.

The lab's settings are there before the package and stay: dpkg is told to keep what it finds. The package's units let its
user read the key and the token that are laid here for root alone.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from protocol.trust.claims import STAMP, TLS_KEY
from provisioning.errors import ProvisioningError
from provisioning.linux_for_tegra import Image
from provisioning.rootfs import Entry, Found, RootFs
from provisioning.site import PACKAGE, STATE, TOKEN, Site

HOME = "usr/lib/clipcast-firstboot"
UNIT = "clipcast-firstboot.service"
UNITS = "etc/systemd/system"
# What makes a board the one that it is: in an image for many it would make all of them one device.
OWN = (TOKEN, *(f"{STATE[1:]}/{name}" for name in (STAMP, "key.pem", TLS_KEY)))


@dataclass(frozen=True)
class Package:
    """A Debian package of a client: its file, version, and the alternatives for each package that it depends on."""

    path: Path
    version: str
    depends: tuple[tuple[str, ...], ...]

    @classmethod
    def read(cls, path: Path) -> Package:
        """Read what a package says of itself; raises ProvisioningError."""
        program = shutil.which("dpkg-deb")
        if program is None:
            raise ProvisioningError("this needs dpkg-deb, which is not there: sudo apt-get install dpkg")
        if not path.is_file():
            raise ProvisioningError(f"{path}: no such file. `clipcast device package` makes the package")
        done = subprocess.run([program, "-f", str(path)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ProvisioningError(f"{path} is no Debian package: {done.stderr.strip()}")
        fields = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line and not line.startswith(" "))
        name, machine = fields.get("Package", ""), fields.get("Architecture", "")
        if name != PACKAGE or machine not in ("all", "arm64"):
            raise ProvisioningError(
                f"{path} is {name} for {machine}, not {PACKAGE} for all or arm64: `clipcast device package`"
            )
        return cls(path, fields.get("Version", ""), tuple(_alternatives(fields.get("Depends", ""))))


def _alternatives(depends: str) -> Iterator[tuple[str, ...]]:
    for needed in filter(None, (part.strip() for part in depends.split(","))):
        yield tuple(choice.split("(")[0].split(":")[0].strip() for choice in needed.split("|"))


@dataclass(frozen=True)
class Overlay:
    """What would be laid into an image: each file against what stands there, and what is to be known before flashing."""

    image: Image
    found: tuple[Found, ...]
    warnings: tuple[str, ...]

    @property
    def changes(self) -> tuple[Entry, ...]:
        """What is not yet as it should be."""
        return tuple(found.entry for found in self.found if found.state != "same")


def entries(site: Site, package: Path, token: str | None = None) -> tuple[Entry, ...]:
    """Return all files of the overlay; the link that has the unit run comes last, when it finds what it needs."""
    here = resources.files("provisioning") / "firstboot"
    return (
        *(Entry(file.path, file.data, file.mode) for file in site.files(token=token)),
        Entry(f"{HOME}/clipcast-client.deb", package),
        Entry(f"{HOME}/install", (here / "install").read_bytes(), 0o755),
        Entry(f"{UNITS}/{UNIT}", (here / UNIT).read_bytes()),
        Entry(f"{UNITS}/multi-user.target.wants/{UNIT}", link=f"/{UNITS}/{UNIT}", mode=0o777),
    )


def plan_overlay(
    image: Image, site: Site, package: Package, token: str | None = None, *, massflash: bool = False
) -> Overlay:
    """Look at an image, writing nothing; raises ProvisioningError if it cannot be the client's.

    An image for many boards must hold nothing that belongs to one: it is refused with a token, or with what an earlier
    overlay or a board has left there.
    """
    image.check_runs_client()
    left = [name for name in OWN if image.has(name)]
    if massflash and token:
        raise ProvisioningError(
            "one token for many boards: it is used once, and the others stay outside. Leave --token-file out; each board "
            "gets its own afterwards, by `clipcast device provision`"
        )
    if massflash and left:
        raise ProvisioningError(
            f"{', '.join(str(image.rootfs / name) for name in left)}: that belongs to one board, and all that are flashed "
            f"would be that one. Remove it first"
        )
    rootfs = RootFs(image.rootfs)
    found = tuple(rootfs.look(entry) for entry in entries(site, package.path, token))
    return Overlay(image, found, tuple(_warnings(image, package, token, left, massflash=massflash)))


def _warnings(image: Image, package: Package, token: str | None, left: list[str], *, massflash: bool) -> Iterator[str]:
    missing = [" or ".join(choices) for choices in package.depends if not image.packages & {*choices}]
    if missing:
        yield (
            f"not in the image, and needed by the package: {', '.join(missing)}. The first boot fetches it, if it has a "
            f"network; else install it in the image first"
        )
    if token:
        yield f"{TOKEN} is used once: flash one board with this image"
    elif TOKEN in left:
        yield f"{image.rootfs / TOKEN} is there from before, and stays: remove it unless this image is for that board"
    else:
        yield "no claim is in the image: each board gets its own afterwards, by `clipcast device provision`"
    if massflash and image.machine_id:
        yield f"{image.rootfs}/etc/machine-id holds an id, which all boards would have: `sudo truncate -s 0` it"
    if massflash and image.host_keys:
        yield f"{image.rootfs}/etc/ssh holds host keys, which all boards would have: remove ssh_host_* there"


def lay(overlay: Overlay) -> Iterator[Entry]:
    """Write what differs, in order, each file whole or not at all; yield what was written. Again, it changes nothing."""
    rootfs = RootFs(overlay.image.rootfs)
    for entry in overlay.changes:
        rootfs.lay(entry)
        yield entry
