"""`clipcast profiles list|show|detect`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer(help="Devices as data: what clipcast knows of each board.")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_(*, as_json: AsJson = False) -> None:
    """List the profiles.

    Example: `clipcast profiles list`
    """
    from hardware_profiles.profile import load, names

    if as_json:
        typer.echo(json.dumps(names()))
        return
    for name in names():
        profile = load(name)
        typer.echo(f"{name:28} {profile.title}: {profile.bits}-bit on {profile.device}, batches of {profile.batch_size}")


@app.command()
def show(name: Annotated[str, typer.Argument(help="A name from `list`.")], *, as_json: AsJson = False) -> None:
    """Show one profile; facts that nobody measured on the device are marked.

    Example: `clipcast profiles show jetson-orin-nano-8gb`
    """
    from hardware_profiles.profile import load

    profile = load(name)
    if as_json:
        typer.echo(profile.model_dump_json(indent=2))
        return
    typer.echo(f"{profile.name}: {profile.title}")
    for key in ("device", "bits", "batch_size", "max_rank", "threads"):
        typer.echo(f"  {key:20} {getattr(profile, key)}")
    typer.echo(f"  {'onnx_providers':20} {', '.join(profile.onnx_providers)}")
    for key, fact in profile.facts.items():
        mark = "" if fact.verified else "  (not verified on the device)"
        typer.echo(f"  {key:20} {fact.value} {fact.unit}".rstrip() + f"{mark}\n  {'':20} source: {fact.source}")
    typer.echo(f"\n{profile.notes.strip()}")


@app.command()
def detect(*, as_json: AsJson = False) -> None:
    """Say which profile fits this machine, and why.

    Example: `clipcast profiles detect`
    """
    from hardware_profiles.detect import detect as detect_board

    found = detect_board()
    if as_json:
        typer.echo(json.dumps({"profile": found.profile.name, "reason": found.reason, "certain": found.certain}))
        return
    typer.echo(f"{found.profile.name}: {found.reason}")
