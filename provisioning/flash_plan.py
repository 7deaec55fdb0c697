"""The steps from NVIDIA's archives to a board that runs a client, in order. Pure: it looks at data alone and does nothing.

The commands are NVIDIA's own, as platforms/*.toml has them. None was tried: no board was at hand.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath

from hardware_profiles.facts import Fact
from hardware_profiles.profile import Profile
from hardware_profiles.versions import release
from provisioning.flash_choice import Choice, Wanted, choose

TOOLS = "Linux_for_Tegra"
UNTRIED = "(from documents, not tried)"
NO_PASSWORD = (
    "no -p: whoever lists processes reads a password on a command line. Without it the script makes a random one and "
    f"prints it: note it down, and change it at the first login with `passwd` {UNTRIED}"
)
SUDO_PATH = 'sudo has its own PATH: sudo "$(command -v clipcast)" ... if it does not find clipcast'


@dataclass(frozen=True)
class Step:
    """One thing to do: a command in `folder` (as it was named, or empty for where one is), or, without one, what hands do.

    `run` marks what `--run` carries out: what builds an image for many boards, and what writes to boards.
    """

    title: str
    why: str
    argv: tuple[str, ...] = ()
    by_hand: tuple[str, ...] = ()
    root: bool = False
    folder: str = ""
    notes: tuple[str, ...] = ()
    run: bool = False

    @property
    def line(self) -> str:
        """The command as it would be typed."""
        return ("sudo " if self.root else "") + shlex.join(self.argv)


@dataclass(frozen=True)
class FlashPlan:
    """The steps, and what they were chosen by."""

    choice: Choice
    steps: tuple[Step, ...]

    @property
    def from_flash(self) -> tuple[Step, ...]:
        """The steps from the flash on."""
        first = next(number for number, step in enumerate(self.steps) if step.run)
        return self.steps[first:]


def plan_flash(profile: Profile, wanted: Wanted, folder: str = TOOLS) -> FlashPlan:
    """Return the steps; `folder` is where NVIDIA's tools are or will be.

    Raises ProvisioningError or ProfileError, with what is possible instead, for what does not exist.
    """
    choice = choose(profile, wanted)
    flash = _massflash if wanted.massflash else _flash
    return FlashPlan(choice, (*_prepare(choice, folder), *_fill(wanted, folder), *flash(choice, folder)))


def _prepare(choice: Choice, folder: str) -> tuple[Step, ...]:
    """Return what is done once on this machine, up to a root filesystem with NVIDIA's files."""
    archive = ".".join(map(str, (*release(choice.l4t), 0)[:3]))  # NVIDIA writes 39.2.0 where others say 39.2
    above = "" if folder == TOOLS else str(PurePosixPath(folder).parent)
    rootfs = f"{PurePosixPath(folder).name}/rootfs/"
    options = choice.flashing.binaries.get(choice.profile.soc, ())
    return (
        Step(
            "Unpack NVIDIA's tools",
            "they are NVIDIA's to give out: download both archives at developer.nvidia.com/embedded/jetson-linux-archive",
            ("tar", "xpf", f"Jetson_Linux_R{archive}_aarch64.tbz2"),
            folder=above,
            notes=(f"NVIDIA writes some names with R{archive}, some with r{archive}",),
        ),
        Step(
            "Unpack the root filesystem",
            "as root: its files have to keep their owners",
            ("tar", "xpf", f"Tegra_Linux_Sample-Root-Filesystem_R{archive}_aarch64.tbz2", "-C", rootfs),
            root=True,
            folder=above,
        ),
        Step(
            "Install what the tools need here",
            "among it an NFS server, from which a board fetches its image",
            ("./tools/l4t_flash_prerequisites.sh",),
            root=True,
            folder=folder,
        ),
        Step(
            "Put NVIDIA's files into the root filesystem",
            "drivers, kernel and firmware",
            ("./apply_binaries.sh", *options),
            root=True,
            folder=folder,
            notes=(f"{' '.join(options)} takes the GPU driver that this processor needs {UNTRIED}",) if options else (),
        ),
    )


def _fill(wanted: Wanted, folder: str) -> tuple[Step, ...]:
    """Return what makes the root filesystem ours."""
    alike = ("all boards get this user, password and host name: change them on each",)
    claim = ("--token-file FILE adds this one board's claim (`clipcast device add ID`)",)
    return (
        Step(
            "Make the first user",
            "else the first boot waits in a wizard for somebody with a screen. --accept-license accepts NVIDIA's license",
            ("./tools/l4t_create_default_user.sh", "-u", "USER", "-n", "HOSTNAME", "--accept-license"),
            root=True,
            folder=folder,
            notes=(NO_PASSWORD, *(alike if wanted.massflash else ())),
        ),
        Step(
            "Lay the client into the root filesystem",
            "the package, the lab's settings, and a unit that installs the package at the first boot. Without --run it "
            "shows what it would write",
            (
                *("clipcast", "device", "overlay", "--l4t-dir", folder, "--coordinator", "coordinator.toml", "--ca", "ca"),
                *("--package", "clipcast-client_VERSION_all.deb", *(("--massflash",) if wanted.massflash else ()), "--run"),
            ),
            root=True,
            notes=(SUDO_PATH, *(() if wanted.massflash else claim)),
        ),
    )


def _flash(choice: Choice, folder: str) -> tuple[Step, ...]:
    """Return recovery mode, the flash of one board, and what comes after."""
    shown = f"`lsusb -d {choice.board.recovery_usb_id.value}` shows it then"
    flash = Step(
        "Flash",
        "writes the image to the board, and its firmware: all that was on it is lost",
        choice.command.of(choice.config.config),
        root=True,
        folder=folder,
        notes=_notes(choice),
        run=True,
    )
    return (
        _hands(choice.board.recovery, "Put the board into recovery mode", shown),
        flash,
        _hands(choice.board.after, "Start the board", "the first boot installs the client"),
    )


def _massflash(choice: Choice, folder: str) -> tuple[Step, ...]:
    """Return the same for many boards: one image is made with one board attached, then written to as many as are."""
    count, config, many = choice.wanted.boards, choice.config.config, choice.flashing.massflash
    shown = f"`lsusb -d {choice.board.recovery_usb_id.value}` shows"
    doubt = f"source: {many.source}" + ("" if many.verified else f" {UNTRIED}")
    build = Step(
        "Make one image for all boards",
        "the EEPROM of the one board tells the tools which module it is; nothing is written to it yet",
        many.building(choice.command, config, count),
        root=True,
        folder=folder,
        notes=(*_notes(choice), doubt),
        run=True,
    )
    write = Step(
        f"Flash up to {count} boards at once",
        "writes the image to all boards in recovery mode: all that was on them is lost",
        many.writing(config, count),
        root=True,
        folder=folder,
        notes=(
            f"for the next boards this step again, and nothing before it {UNTRIED}",
            *((many.note,) if many.note else ()),
            doubt,
        ),
        run=True,
    )
    enrol = Step(
        "Let each board be enrolled",
        "the image holds nothing that tells one board from another",
        by_hand=("for each, once it is in the network: `clipcast device provision` gives it its own claim over ssh",),
    )
    again = Step(
        f"Put up to {count} boards into recovery mode, that one again",
        f"{shown} them then",
        by_hand=("as before: each by a cable of its own",),
    )
    return (
        _hands(choice.board.recovery, "Put one of the boards into recovery mode", f"{shown} it then. Leave the others off"),
        build,
        again,
        write,
        _hands(choice.board.after, "Start the boards, each", "the first boot installs the client"),
        enrol,
    )


def _hands(what: Fact | None, title: str, why: str) -> Step:
    """Return a step for hands, with the doubts about it."""
    if what is None or not isinstance(what.value, tuple):
        return Step(title, why, by_hand=("as the manual of its carrier board says",))
    return Step(title, why, by_hand=what.value, notes=() if what.verified else (f"source: {what.source} {UNTRIED}",))


def _notes(choice: Choice) -> tuple[str, ...]:
    """Return for which carrier the configuration is, what else there is, and how sure the command is."""
    config, command = choice.config, choice.command
    others = [
        one for one in choice.board.configs if one.super == config.super and choice.l4t in one.l4t and one is not config
    ]
    told = "".join(f"; {one.carrier}: {one.config}" for one in others)
    source = f"source: {command.source}" + ("" if command.verified else f" {UNTRIED}")
    return (f"{config.config} is for: {config.carrier}{told}", *((command.note,) if command.note else ()), source)
