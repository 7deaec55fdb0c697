"""Which board is this, and what runs on it? Answered with the reason, and never with a pretended Jetson."""

from __future__ import annotations

import platform as this_machine
from dataclasses import dataclass
from pathlib import Path

from hardware_profiles.board_files import BoardFiles, read_board
from hardware_profiles.platform import Platform, platform_of
from hardware_profiles.profile import Profile, load, load_soc, names

CPU, CUDA = "generic-cpu", "generic-cuda"


@dataclass(frozen=True)
class Detection:
    """A profile and why it was chosen, the platform (None for one that no data describes), and what the files said.

    `certain` is false where only the model string spoke for the profile, and for the fallback on an unknown Jetson.
    """

    profile: Profile
    platform: Platform | None
    board: BoardFiles
    reason: str
    certain: bool


def detect(root: Path = Path("/")) -> Detection:
    """Recognise the board by module and SKU together with its memory, else by its model string, below `root`.

    The model string comes last: an Orin Nano that calls itself an Orin NX is on record. `/proc/device-tree/compatible`
    names carrier, module, SKU and processor in one read.
    """
    board = read_board(root)
    profile, reason, certain = _recognise(board, "" if root != Path("/") else this_machine.machine())
    platform = platform_of(board.l4t) if board.l4t or not board.is_tegra else None
    return Detection(profile, platform, board, reason, certain)


def _recognise(board: BoardFiles, machine: str) -> tuple[Profile, str, bool]:
    memory = f"memory is {board.memory_mib} MiB"
    for profile in map(load, names()):
        if (match := _match(profile, board)) and _fits(profile, board):
            lies = bool(board.model) and bool(profile.identity.models) and board.model not in profile.identity.models
            doubt = f"; its model string, {board.model!r}, says otherwise and is not believed" if lies else ""
            return profile, f"{match}, {memory}{doubt}", True
    if board.is_tegra:
        for profile in map(load, names()):
            if not board.modules and board.model in profile.identity.models and _fits(profile, board):
                return (
                    profile,
                    f"only its model string says so ({board.model!r}), {memory}: look whether that is true",
                    False,
                )
        return load(CPU), _unknown(board), False
    if board.nvidia_driver:
        return load(CUDA), f"no Jetson, but NVIDIA's driver is there, {memory}", True
    return load(CPU), f"no Jetson device tree on this {machine or 'unknown machine'}, {memory}", True


def _match(profile: Profile, board: BoardFiles) -> str:
    """Return what of the board's files names this profile, in words; empty if nothing does."""
    for module in board.modules:
        if module in profile.identity.modules:
            return f"{board.modules_from} says {module}"
    for entry in board.compatible:
        if entry in profile.identity.compatible:
            return f"its device tree says {entry}"
    return ""


def _fits(profile: Profile, board: BoardFiles) -> bool:
    low, high = profile.identity.mem_total_mib
    soc_fits = not profile.soc or load_soc(profile.soc).compatible in board.compatible
    return soc_fits and low <= board.memory_mib <= high


def _unknown(board: BoardFiles) -> str:
    return (
        f"this is a Jetson ({', '.join(board.compatible)}, {board.memory_mib} MiB) that no profile describes: using {CPU}, "
        f"which leaves its GPU idle. Name the nearest profile in the client's TOML, see `clipcast profiles list`"
    )
