"""Boards as trees of files, in the shapes that are documented for JetPack 4 to 7: none was copied from a board."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MODES_NANO_SUPER, MODES_NX, MODES_THOR = (
    "".join(f"< POWER_MODEL ID={number} NAME={name} >\nCPU_ONLINE CORE_0 1\n" for number, name in enumerate(names))
    for names in (("15W", "25W", "MAXN_SUPER"), ("MAXN", "10W", "15W", "25W"), ("MAXN", "120W"))
)


@dataclass(frozen=True)
class Root:
    """What stands in a board's files; None: no such file."""

    compatible: str | None = None
    memory_mib: int | None = None
    model: str | None = None
    tegra_release: str | None = None
    dpkg_status: str | None = None
    boot_control: str | None = None
    power_modes: str | None = None
    power_status: str | None = None
    nvidia_driver: str | None = None

    def write(self, root: Path) -> Path:
        """Write the tree below a folder, and return that."""
        memory = None if self.memory_mib is None else f"MemTotal:   {self.memory_mib * 1024 + 512} kB\nMemFree:  1000 kB\n"
        for path, text in {
            "proc/device-tree/compatible": self.compatible,
            "proc/device-tree/model": None if self.model is None else self.model + "\0",
            "proc/meminfo": memory,
            "proc/driver/nvidia/version": self.nvidia_driver,
            "etc/nv_tegra_release": self.tegra_release,
            "etc/nv_boot_control.conf": self.boot_control,
            "etc/nvpmodel.conf": self.power_modes,
            "var/lib/nvpmodel/status": self.power_status,
            "var/lib/dpkg/status": self.dpkg_status,
        }.items():
            if text is not None:
                file = root / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(text.encode())
        return root


def release(major: int, revision: str, board: str = "generic") -> str:
    return (
        f"# R{major} (release), REVISION: {revision}, GCID: 43443517, BOARD: {board}, EABI: aarch64, "
        f"DATE: Wed Dec 31 00:15:19 UTC 2025\n# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n"
    )


NANO = Root(
    "nvidia,p3449-0000-b00+p3448-0000-b00\0nvidia,jetson-nano\0nvidia,tegra210\0", 3956,
    "NVIDIA Jetson Nano Developer Kit", release(32, "7.1", "t210ref"),
)  # fmt: skip
TX2 = Root(
    "nvidia,p2597-0000+p3310-1000\0nvidia,jetson-cvm\0nvidia,tegra186\0", 7860, "quill", release(32, "7.6", "t186ref")
)
XAVIER_NX = Root(
    "nvidia,p3449-0000+p3668-0000\0nvidia,tegra194\0", 7765, "NVIDIA Jetson Xavier NX Developer Kit",
    release(35, "3.1", "t186ref"),
)  # fmt: skip
AGX_XAVIER = Root("nvidia,p2972-0000\0nvidia,tegra194\0", 31919, "Jetson-AGX", release(32, "7.1", "t186ref"))
ORIN_NANO_4 = Root(
    "nvidia,p3768-0000+p3767-0004\0nvidia,p3767-0004\0nvidia,tegra234\0", 3620,
    "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit", release(36, "4.3"),
)  # fmt: skip
ORIN_NANO_SUPER = Root(
    "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0", 7620,
    "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", release(36, "4.3"),
    power_modes=MODES_NANO_SUPER, power_status="pmode:0002\n",
)  # fmt: skip
ORIN_NANO_JP7 = Root(
    "nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0", 7480,
    "NVIDIA Jetson Orin Nano Developer Kit", release(39, "2.0"),
)  # fmt: skip
# On record: the specification it was flashed by says Orin Nano 8GB, the model string says Orin NX.
LIAR = Root(
    "nvidia,p3768-0000+p3767-0003\0nvidia,p3767-0003\0nvidia,tegra234\0", 7620,
    "NVIDIA Jetson Orin NX Engineering Reference Developer Kit Super", release(36, "4.7"),
)  # fmt: skip
ORIN_NX_16 = Root(
    "nvidia,p3768-0000+p3767-0000\0nvidia,p3767-0000\0nvidia,tegra234\0", 15656,
    "NVIDIA Jetson Orin NX Engineering Reference Developer Kit", release(36, "5.0"),
    power_modes=MODES_NX, power_status="pmode:0003\n",
)  # fmt: skip
AGX_ORIN_64 = Root(
    "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0", 62841,
    "NVIDIA Jetson AGX Orin Developer Kit", release(35, "6.1", "t186ref"),
)  # fmt: skip
THOR = Root(
    "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0", 125772, "NVIDIA Jetson AGX Thor Developer Kit",
    release(38, "4.0"), power_modes=MODES_THOR, power_status="pmode:0001\n", nvidia_driver="NVRM version\n",
)  # fmt: skip
T4000 = Root(
    "nvidia,tegra264\0", 62900, "NVIDIA Jetson Thor Developer Kit", release(39, "2.1"),
    boot_control="TNSPEC 3834-000-0000-A.1-1-1-jetson-agx-thor-t4000-\nCOMPATIBLE_SPEC 3834-000-0000--1--t4000-\n",
)  # fmt: skip
RASPBERRY = Root("raspberrypi,5-model-b\0brcm,bcm2712\0", 8063, "Raspberry Pi 5 Model B Rev 1.0")
WORKSTATION = Root(None, 64_000, nvidia_driver="NVRM version: NVIDIA UNIX x86_64 Kernel Module\n")
