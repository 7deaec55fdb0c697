"""A Linux_for_Tegra on this machine: NVIDIA's tools, and the root filesystem that they write to a board."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hardware_profiles.board_files import read_board
from hardware_profiles.platform import platform_of
from provisioning.errors import ProvisioningError

TOOLS = ("apply_binaries.sh", "flash.sh")
PROGRAMS = ("bin/ls", "usr/bin/ls", "usr/bin/gnuls", "usr/bin/dpkg", "bin/bash")
ARM64, MACHINES = 183, {3: "i386", 40: "arm", 62: "x86-64", 183: "arm64", 243: "risc-v"}
BSP_VERSION = re.compile(r"^(BSP_BRANCH|BSP_MAJOR|BSP_MINOR)=\"?(\d{1,4})\"?\s*$", re.MULTILINE)
INSTALLED = re.compile(r"^Package: (\S+)\nStatus: install ok installed$", re.MULTILINE)


@dataclass(frozen=True)
class Image:
    """The folder of NVIDIA's tools, and its `rootfs`. Only what is inside of that is read: links may lead elsewhere."""

    folder: Path

    @classmethod
    def open(cls, folder: Path) -> Image:
        """Return the image; raises ProvisioningError, saying which of NVIDIA's steps comes first, if there is none yet."""
        missing = [name for name in TOOLS if not (folder / name).is_file()]
        if missing:
            raise ProvisioningError(
                f"{folder} is no Linux_for_Tegra ({', '.join(missing)} is not there). First, where it should be: tar xpf "
                f"Jetson_Linux_R*_aarch64.tbz2; `clipcast device flash-plan` lists all steps"
            )
        image = cls(folder)
        if not (image.rootfs / "etc").is_dir():
            raise ProvisioningError(
                f"{image.rootfs} holds no root filesystem. First: sudo tar xpf Tegra_Linux_Sample-Root-Filesystem_R*_aarch64"
                f".tbz2 -C {image.rootfs}/, then sudo ./apply_binaries.sh in {folder}"
            )
        if image.rootfs.resolve() == Path("/"):
            raise ProvisioningError(f"{image.rootfs} is this machine's own root: no image")
        return image

    @property
    def rootfs(self) -> Path:
        """The root filesystem."""
        return self.folder / "rootfs"

    def check_runs_client(self) -> None:
        """Raise ProvisioningError unless the image is for a board that a client can run on."""
        machine = self.machine
        if machine != "arm64":
            raise ProvisioningError(
                f"{self.rootfs} is {machine or 'no system that can be told: no program of it was found'}, and a Jetson is "
                f"arm64: unpack NVIDIA's sample root filesystem there"
            )
        if not self.l4t:
            raise ProvisioningError(
                f"{self.rootfs} does not say which L4T it is: NVIDIA's files are not in it yet. First: sudo "
                f"./apply_binaries.sh in {self.folder} (on Thor with --openrm)"
            )
        platform = platform_of(self.l4t)
        if platform is None:
            raise ProvisioningError(
                f"{self.rootfs} is L4T {self.l4t}, which clipcast knows nothing of: `clipcast profiles list`"
            )
        if not platform.client:
            raise ProvisioningError(f"{self.rootfs} is L4T {self.l4t}, where no client runs. {platform.advice.strip()}")

    @cached_property
    def l4t(self) -> str:
        """L4T's release as the root filesystem says, empty if NVIDIA's files are not in it."""
        named = ("etc/nv_tegra_release", "var/lib/dpkg/status")
        leads_out = any((self.rootfs / name).exists() and not self.has(name) for name in named)
        return "" if leads_out else read_board(self.rootfs).l4t

    @property
    def tools_l4t(self) -> str:
        """L4T's release as the tools say, empty if they do not."""
        try:
            text = (self.folder / "nv_tegra/bsp_version").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        found = dict(BSP_VERSION.findall(text))
        return ".".join(found[key] for key in ("BSP_BRANCH", "BSP_MAJOR", "BSP_MINOR")) if len(found) == 3 else ""

    @cached_property
    def machine(self) -> str:
        """The processor that the image's programs are for, empty if none was found: bytes 18 and 19 of an ELF header."""
        for name in PROGRAMS:
            head = self._read(name, 20)
            if head[:4] == b"\x7fELF" and len(head) == 20:
                order = "little" if head[5] == 1 else "big"
                number = head[18] | head[19] << 8 if order == "little" else head[18] << 8 | head[19]
                return MACHINES.get(number, f"of ELF machine {number}")
        return ""

    @cached_property
    def packages(self) -> frozenset[str]:
        """The names of the installed Debian packages."""
        return frozenset(INSTALLED.findall(self._read("var/lib/dpkg/status").decode(errors="replace")))

    @property
    def machine_id(self) -> bool:
        """Whether the image has an id of a machine."""
        return self._read("etc/machine-id").strip() not in (b"", b"uninitialized")

    @property
    def host_keys(self) -> bool:
        """Whether the image has ssh's keys of a machine."""
        return self.has("etc/ssh") and any((self.rootfs / "etc/ssh").glob("ssh_host_*_key"))

    def has(self, name: str) -> bool:
        """Whether there is such a file inside of the root filesystem."""
        return self._inside(name) is not None

    def _read(self, name: str, most: int = -1) -> bytes:
        path = self._inside(name)
        try:
            if path is not None and path.is_file():
                with path.open("rb") as file:
                    return file.read(most)
        except OSError:
            pass
        return b""

    def _inside(self, name: str) -> Path | None:
        """Return a path with its links followed, None if it is not there or leads out of the root filesystem."""
        try:
            path = (self.rootfs / name).resolve(strict=True)
        except (OSError, RuntimeError):
            return None
        return path if path.is_relative_to(self.rootfs.resolve()) else None
