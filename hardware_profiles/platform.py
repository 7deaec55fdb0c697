"""What runs on a device, as data: JetPack lines and plain Linux. One TOML in platforms/ = one platform.

A platform is no part of a profile: an Orin Nano may run two.
"""

from __future__ import annotations

import shlex
from typing import Annotated, Literal

from pydantic import Field

from hardware_profiles.facts import Fact, Frozen, made_of, names_in, read_named
from hardware_profiles.flashing import Flashing
from hardware_profiles.versions import Range

PLATFORMS = "platforms"
LINUX = "linux"
Package = Literal["torch", "bitsandbytes", "onnxruntime", "onnxruntime-gpu"]


class Wheel(Frozen):
    """Where a package comes from, and whether what is installed from there runs.

    `requirement` is what pip is told (empty: no index has it, `why` says where it is), `index` the index to tell pip of
    (empty: the one it uses), `also` what the wheel needs and does not say, `socs` the processors this holds for (empty:
    all). `runs`: `yes` if that is on record, `expected` if it follows from documents, `no` if it installs and cannot run.
    """

    package: Package
    requirement: str = ""
    index: str = ""
    also: tuple[str, ...] = ()
    socs: tuple[str, ...] = ()
    runs: Literal["yes", "expected", "no"]
    why: str
    source: Annotated[str, Field(min_length=10)]
    verified: bool

    def command(self) -> str:
        """Return the command that installs it; empty if no index has it."""
        if not self.requirement:
            return ""
        if not self.index:
            return _pip(self.requirement, *self.also)
        # From there alone: of two indexes pip takes the newer version, and that is the one that cannot run.
        alone = _pip("--no-deps", "--index-url", self.index, self.requirement)
        return f"{alone} && {_pip(*self.also)}" if self.also else alone


def _pip(*words: str) -> str:
    return shlex.join(("pip", "install", *words))


class Platform(Frozen):
    """A JetPack line, or plain Linux.

    `client` says whether a clipcast client can run there; where it cannot, `advice` says what to do instead. `ceilings`
    are the newest versions that exist for its Python. `flash` says how it is flashed, if clipcast plans that.
    """

    name: str
    title: str
    client: bool
    advice: str = ""
    l4t: Range | None = None
    facts: dict[str, Fact]
    ceilings: dict[str, Fact] = Field(default={})
    wheels: tuple[Wheel, ...] = ()
    flash: Flashing | None = None

    def sources(self, package: Package, soc: str | None = None) -> list[Wheel]:
        """Return where a package may come from, on a processor or (None) on any; what runs comes first."""
        found = [wheel for wheel in self.wheels if wheel.package == package]
        fit = [wheel for wheel in found if soc is None or not wheel.socs or soc in wheel.socs]
        return sorted(fit, key=lambda wheel: ("yes", "expected", "no").index(wheel.runs))


def names() -> list[str]:
    """Return the names of all platforms, sorted."""
    return names_in(PLATFORMS)


def load(name: str) -> Platform:
    """Return a platform by name; raises ProfileError with the names there are."""
    return made_of(Platform, PLATFORMS, name, read_named(PLATFORMS, name, "platform"))


def platform_of(l4t: str) -> Platform | None:
    """Return the platform of an L4T release ("" on other machines), or None if no platform describes it."""
    if not l4t:
        return load(LINUX)
    return next((found for found in map(load, names()) if found.l4t is not None and l4t in found.l4t), None)
