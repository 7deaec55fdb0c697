"""How much memory there is for a training at this moment, and the placement that fits into it.

On a Jetson CPU and GPU share one memory, and the kernel ends who takes too much of it: what fits is decided before.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from clip_lora.towers import as_dtype, load_config
from edge_client.config import Placement, told
from edge_client.errors import PlanRefusedError
from edge_client.monitor.sysfs import counts, text_of
from hardware_profiles.plan import FRAMEWORK_MIB, MIB, TowerShape, Training, predict, smaller
from protocol.messages import Recipe

MARGIN_MIB = 300  # is left to who answers pictures beside the training, and to what the prediction misses
KEEPING = 2.5  # times what is predicted is held at most where freed memory is kept: 1.8 was measured
STOP = "stop what else runs here"


@dataclass(frozen=True)
class Room:
    """MiB that may still be taken, what sets this limit, and how one gets more."""

    mib: float
    limit: str
    cure: str


def room_for(device: str, root: Path = Path("/")) -> Room | None:
    """Return what a training on a device may still take; None if the system does not say.

    That a GPU has memory of its own, as on a workstation, is asked of torch.
    """
    if device == "cuda" and not torch.cuda.get_device_properties(0).is_integrated:
        return Room(torch.cuda.mem_get_info()[0] / MIB, "free on the GPU", STOP)
    return min((*_of_system(root), *_of_groups(root)), key=lambda room: room.mib, default=None)


def held_mib(device: str, root: Path = Path("/")) -> float:
    """Return how much of what `predict` counts this process holds already: by its own account, or torch's of a GPU.

    There the libraries and the context are loaded, as layers were tried at the start, and pictures are not counted.
    """
    if device == "cuda":
        return FRAMEWORK_MIB["cuda"] + torch.cuda.memory_reserved() / MIB
    return (counts(root / "proc/self/status").get("RssAnon", 0)) / 1024


@functools.cache  # a round must not ask for the configuration again, which may be at a hub
def shape_of(model: str) -> TowerShape:
    """Return what an image tower's memory depends on; raises ModelError."""
    config: Any = load_config(model)
    of = config.vision_config
    sizes = (of.num_hidden_layers, of.hidden_size, of.intermediate_size, of.patch_size, of.image_size)
    return TowerShape(*sizes, config.projection_dim)


def fitted(
    placement: Placement, recipe: Recipe, batch: int, shape: TowerShape, pictures: int, room: Room | None, held: float
) -> Placement:
    """Return the placement, or the nearest smaller one that fits, for a round that would train in batches of `batch`.

    `held` is what this process has already, in MiB. The bits stay: others were told them, and only these were tried here.
    Raises PlanRefusedError, with what to do, if nothing fits.
    """
    if room is None:
        return placement
    wanted = _training(placement, recipe, batch, pictures)
    tried = [(training, predict(shape, training).total - held) for training in smaller(wanted, (wanted.bits,))]
    left = room.mib - MARGIN_MIB
    found = next((training for training, needed in tried if needed <= left), None)
    if found is None:
        raise PlanRefusedError(
            f"too little memory: in batches of 1 this training takes {tried[-1][1]:.0f} MiB more than this process holds, "
            f"and there are {room.mib:.0f} ({room.limit}), of which {MARGIN_MIB} stay free for what runs beside it: "
            f"{room.cure}, take a smaller model, or adapt the last blocks only (`first_block` in the recipe)"
        )
    if found == wanted:
        return placement
    change = f"batches of {found.batch}" if found.batch < batch else "blocks computed again on the way back"
    why = f"{tried[0][1]:.0f} MiB more would be needed, there are {room.mib:.0f} ({room.limit})"
    fallback = told(placement.fallback, f"{change}: {why}")
    limit = found.batch if found.batch < batch else placement.batch_size
    return replace(placement, batch_size=limit, checkpointing=found.checkpointing, fallback=fallback)


def ample(
    placement: Placement, recipe: Recipe, batch: int, shape: TowerShape, pictures: int, room: Room | None, held: float
) -> bool:
    """Whether there is so much memory that a round on a CPU need not return what it frees (edge_client/allocator.py)."""
    if room is None or placement.device != "cpu":
        return False
    most = KEEPING * predict(shape, _training(placement, recipe, batch, pictures)).total
    return most - held <= room.mib - MARGIN_MIB


def _training(placement: Placement, recipe: Recipe, batch: int, pictures: int) -> Training:
    dtype: Any = str(as_dtype(placement.dtype, placement.device)).removeprefix("torch.")
    return Training(
        recipe.rank, len(recipe.projections), recipe.first_block, batch, placement.bits, dtype, placement.device,
        placement.checkpointing, pictures,
    )  # fmt: skip


def _of_system(root: Path) -> Iterator[Room]:
    available = counts(root / "proc/meminfo").get("MemAvailable")
    if available is not None:
        yield Room(available / 1024, "MemAvailable", STOP)


def _of_groups(root: Path) -> Iterator[Room]:
    """Yield what each control group (version 2) around this process leaves; pages of files make way before it is full.

    Whether NVIDIA's driver counts a GPU's memory there is not known; it is taken as if it did.
    """
    for folder in _groups(root):
        for name in ("memory.max", "memory.high"):  # above the second it is slowed down until it crawls
            limit, used = _number(folder / name), _number(folder / "memory.current")
            if limit is not None and used is not None:
                files = counts(folder / "memory.stat")
                spare = files.get("inactive_file", 0) + files.get("active_file", 0)
                setting = {"memory.max": "MemoryMax=", "memory.high": "MemoryHigh="}[name]
                yield Room(max(0, limit - used + spare) / MIB, name, f"raise the unit's {setting}")


def _groups(root: Path) -> Iterator[Path]:
    lines = text_of(root / "proc/self/cgroup").splitlines()
    path = next((PurePosixPath(line[3:]) for line in lines if line.startswith("0::/")), None)
    for group in () if path is None else (path, *path.parents):
        yield root / "sys/fs/cgroup" / group.relative_to("/")


def _number(path: Path) -> int | None:
    text = text_of(path)
    return int(text) if text.isdecimal() else None  # "max": no limit
