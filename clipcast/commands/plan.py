"""`clipcast plan`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hardware_profiles.plan import TowerShape


def plan(
    profile: Annotated[
        str, typer.Option(help="A name from `clipcast profiles list`; without it the board is detected.")
    ] = "",
    model: Annotated[str, typer.Option(help="A hub name, a folder, or tiny-clip.")] = "tiny-clip",
    *,
    memory: Annotated[int, typer.Option(min=0, help="MiB of memory; 0: what the profile's device has.")] = 0,
    bits: Annotated[int, typer.Option(help="4, 8 or 32; 0: what the profile says.")] = 0,
    batch: Annotated[int, typer.Option(min=0, help="Pictures a step; 0: what the profile says.")] = 0,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter, as in the recipe.")] = 4,
    first_block: Annotated[int, typer.Option(min=0, help="First adapted block, as in the recipe.")] = 0,
    pictures: Annotated[int, typer.Option(min=0, help="How many pictures the device has.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a training takes of a device's memory, by part, and which bits and batch fit.

    Example: `clipcast plan --profile jetson-orin-nano-4gb --model openai/clip-vit-large-patch14`
    """
    from hardware_profiles.detect import detect
    from hardware_profiles.facts import ProfileError
    from hardware_profiles.plan import Training
    from hardware_profiles.plan import plan as plan_for
    from hardware_profiles.profile import load

    found = None if profile else detect()
    board = load(profile) if found is None else found.profile
    if bits not in (0, 4, 8, 32):
        raise ProfileError(f"--bits {bits}: choose one of 4, 8, 32")
    shape = tower_shape(model)
    if first_block >= shape.blocks:
        raise ProfileError(f"--first-block {first_block}: {model} has {shape.blocks} blocks, the last is {shape.blocks - 1}")
    wanted = Training(
        min(rank, board.max_rank), 4, first_block, batch or board.batch_size, bits or board.bits,  # type: ignore[arg-type]
        board.in_dtype, board.device, pictures=pictures,
    )  # fmt: skip
    chosen = plan_for(board, shape, wanted, memory or (found.board.memory_mib if found else 0))
    if as_json:
        what = {"profile": board.name, "model": model, **asdict(chosen.training), "memory_mib": asdict(chosen.memory)}
        typer.echo(json.dumps({**what, "total_mib": chosen.memory.total, "budget_mib": chosen.budget}))
        return
    how = f"{chosen.training.bits}-bit base, {chosen.training.dtype}, batches of {chosen.training.batch}"
    again = ", blocks computed again on the way back" if chosen.training.checkpointing else ""
    typer.echo(f"{board.title}, {model}: {how}{again}")
    for part, mib in asdict(chosen.memory).items():
        typer.echo(f"  {part:12} {mib:8.1f} MiB")
    typer.echo(f"  {'total':12} {chosen.memory.total:8.1f} MiB of {chosen.budget:.0f} that are left for it")
    if chosen.training.bits != 32:
        little = ": little, and it costs time" if chosen.saved < 0.1 * chosen.memory.total else ""
        typer.echo(f"{chosen.training.bits} bits save {chosen.saved / 1024:.2f} GiB against float16{little}")
    if board.device == "cuda":
        typer.echo("predicted: nothing of this was measured on a GPU yet")


def tower_shape(model: str) -> TowerShape:
    """Return what an image tower's memory depends on; raises ModelError."""
    from hardware_profiles.plan import KNOWN

    if model in KNOWN:
        return KNOWN[model]
    from edge_client.memory import shape_of

    return shape_of(model)
