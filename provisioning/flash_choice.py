"""What a board is flashed with: its JetPack, L4T, configuration and command, from data; or why not, and what is possible."""

from __future__ import annotations

from dataclasses import dataclass

from hardware_profiles import platform as platforms
from hardware_profiles.flashing import FlashCommand, Flashing, Storage
from hardware_profiles.platform import Platform
from hardware_profiles.profile import Flash, FlashConfig, Profile
from provisioning.errors import ProvisioningError


@dataclass(frozen=True)
class Wanted:
    """What is to be flashed: `jetpack` as NVIDIA numbers it, `l4t` empty for that JetPack's own.

    `boards` is how many get one image at a time; 0 flashes one board, which may get a claim in its image.
    """

    jetpack: str
    storage: Storage
    l4t: str = ""
    super: bool = False
    boards: int = 0

    @property
    def massflash(self) -> bool:
        """Whether one image is made for many boards."""
        return self.boards > 0


@dataclass(frozen=True)
class Choice:
    """What data say to what is wanted: how the platform and the board are flashed, with which configuration and command."""

    profile: Profile
    platform: Platform
    flashing: Flashing
    board: Flash
    l4t: str
    config: FlashConfig
    command: FlashCommand
    wanted: Wanted

    @property
    def uses_network(self) -> bool:
        """Whether the board fetches the image from this machine over the network on USB."""
        uses_nfs = self.command.uses_nfs or self.wanted.massflash
        return uses_nfs and self.profile.soc not in self.flashing.without_nfs


def choose(profile: Profile, wanted: Wanted) -> Choice:
    """Return what a board is flashed with.

    Raises ProvisioningError or ProfileError, with what is possible instead, for what does not exist.
    """
    profile.check_trains()
    board, platform, flashing = _platform(profile, wanted)
    l4t = _l4t(platform, flashing, wanted)
    config = _config(profile, board, wanted, l4t)
    modules = profile.identity.modules
    command = flashing.command(modules, wanted.storage, l4t)
    if command is None:
        why = flashing.without.get(wanted.storage, f"no command for {wanted.storage} is known")
        there = " or ".join(flashing.storages(modules, l4t)) or "nothing that is known"
        raise ProvisioningError(
            f"{profile.title} on {platform.title} cannot be flashed to {wanted.storage}: {why}. It can be flashed to {there}"
        )
    return Choice(profile, platform, flashing, board, l4t, config, command, wanted)


def _platform(profile: Profile, wanted: Wanted) -> tuple[Flash, Platform, Flashing]:
    """Return how the board is flashed, the platform of the JetPack, and how that is."""
    possible = [platforms.load(name) for name in profile.platforms]
    known = {jetpack: found for found in possible if found.flash for jetpack in found.flash.releases}
    if not profile.flash or not known:
        raise ProvisioningError(
            f"{profile.title} is not flashed by NVIDIA's tools: install Linux on it as its maker says, then `clipcast "
            f"device provision`"
        )
    platform = known.get(wanted.jetpack)
    if platform is None or platform.flash is None:
        raise ProvisioningError(f"{profile.title} does not run JetPack {wanted.jetpack}: it runs {', '.join(known)}")
    return profile.flash, platform, platform.flash


def _l4t(platform: Platform, flashing: Flashing, wanted: Wanted) -> str:
    l4t = wanted.l4t or flashing.releases[wanted.jetpack]
    try:
        belongs = platform.l4t is not None and l4t in platform.l4t
    except ValueError as error:
        raise ProvisioningError(f"--l4t: {error}") from error
    if not belongs:
        raise ProvisioningError(
            f"L4T {l4t} is not of JetPack {wanted.jetpack}, which is {platform.title}: "
            + ", ".join(f"{jetpack} is L4T {its}" for jetpack, its in flashing.releases.items())
        )
    return l4t


def _config(profile: Profile, board: Flash, wanted: Wanted, l4t: str) -> FlashConfig:
    """Return NVIDIA's configuration for the board: the first that fits, which is the developer kit's."""
    of_kind = [config for config in board.configs if config.super == wanted.super]
    fits = [config for config in of_kind if l4t in config.l4t]
    if fits:
        return fits[0]
    if not of_kind:
        raise ProvisioningError(f"{profile.title} has no Super configuration: leave --super out")
    there = ", ".join(f"{config.config} (L4T {config.l4t})" for config in of_kind)
    other = "leave --super out, or take another JetPack" if wanted.super else "take another JetPack"
    raise ProvisioningError(
        f"{profile.title} has no {'Super ' if wanted.super else ''}configuration on L4T {l4t}. There is {there}: {other}"
    )
