"""How NVIDIA's tools write a JetPack line to a board, as data: releases, what they need of the host, commands."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hardware_profiles.facts import Fact, Frozen
from hardware_profiles.versions import Range, Release

Storage = Literal["nvme", "sd", "emmc"]
STORAGES: tuple[Storage, ...] = ("nvme", "sd", "emmc")


class FlashCommand(Frozen):
    """What flashes some modules onto a kind of storage; `{config}` stands for the board's configuration.

    `modules` are the beginnings of board ids: p3767, or p3767-0005 where one SKU alone has the slot.
    """

    modules: tuple[str, ...]
    storage: Storage
    l4t: Range = Range()
    argv: tuple[str, ...]
    note: str = ""
    source: Annotated[str, Field(min_length=10)]
    verified: bool

    def of(self, config: str) -> tuple[str, ...]:
        """Return the command for a board's configuration."""
        return _filled(self.argv, config)

    @property
    def uses_nfs(self) -> bool:
        """Whether the board mounts the host's images over NFS: only the tool that boots an initial RAM disk has it do so."""
        return self.argv[0].endswith("l4t_initrd_flash.sh")


class Massflash(Frozen):
    """How one image is made for many boards, and written to `{count}` of them at a time; `{config}` as in a command.

    `build` stands before the arguments of the command that flashes one board, `write` is a command of its own.
    """

    build: tuple[str, ...]
    write: tuple[str, ...]
    note: str = ""
    source: Annotated[str, Field(min_length=10)]
    verified: bool

    def building(self, command: FlashCommand, config: str, count: int) -> tuple[str, ...]:
        """Return what makes the image; boards fetch it over the network on USB whatever one board alone would do."""
        rest = command.of(config)[1:]
        network = () if "--network" in rest else ("--network", "usb0")
        return (*_filled(self.build, config, count), *network, *rest)

    def writing(self, config: str, count: int) -> tuple[str, ...]:
        """Return what writes the image to the boards."""
        return _filled(self.write, config, count)


class Flashing(Frozen):
    """What flashing a platform takes.

    `releases` are L4T releases by JetPack, the newest last. `host` are the Ubuntu releases that NVIDIA's tools support,
    `disk` the room that unpacking and building take. `binaries` are the options of apply_binaries.sh by processor.
    `without_nfs` are the processors that fetch no image over NFS, whatever flashes them. `without` says, for storage that
    has no command, why not and what to do instead.
    """

    releases: dict[str, Release]
    releases_source: Annotated[str, Field(min_length=10)]
    host: Fact
    disk: Fact
    binaries: dict[str, tuple[str, ...]] = Field(default={})
    massflash: Massflash
    without_nfs: tuple[str, ...] = ()
    without: dict[Storage, str] = Field(default={})
    commands: tuple[FlashCommand, ...]

    def command(self, modules: tuple[str, ...], storage: Storage, l4t: str) -> FlashCommand | None:
        """Return what flashes one of these modules, None if there is nothing for this storage."""
        return next((found for found in self.commands if _fits(found, modules, l4t) and found.storage == storage), None)

    def storages(self, modules: tuple[str, ...], l4t: str) -> list[Storage]:
        """Return what these modules can be flashed to."""
        return [storage for storage in STORAGES if self.command(modules, storage, l4t)]


def _filled(argv: tuple[str, ...], config: str, count: int = 1) -> tuple[str, ...]:
    return tuple(part.replace("{config}", config).replace("{count}", str(count)) for part in argv)


def _fits(command: FlashCommand, modules: tuple[str, ...], l4t: str) -> bool:
    return l4t in command.l4t and any(module.startswith(command.modules) for module in modules)
