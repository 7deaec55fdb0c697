"""`clipcast profiles list|show|detect`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hardware_profiles.facts import Fact
    from hardware_profiles.platform import Platform
    from hardware_profiles.profile import Profile

app = typer.Typer(help="Devices as data: what clipcast knows of each board.")
TIERS = {"train": "trains and answers", "inference": "answers only", "unsupported": "not supported"}
RUNS = {"yes": "runs", "expected": "should run", "no": "installs and does not run"}
WIDTH = 100
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_(*, as_json: AsJson = False) -> None:
    """List the profiles, and the platforms that they run.

    Example: `clipcast profiles list`
    """
    from hardware_profiles import platform
    from hardware_profiles.profile import load, names

    if as_json:
        typer.echo(json.dumps({"profiles": names(), "platforms": platform.names()}))
        return
    for name in names():
        profile = load(name)
        use = f"{profile.bits}-bit on {profile.device}, batches of {profile.batch_size}"
        typer.echo(f"{name:32} {profile.title}: {use if profile.tier == 'train' else TIERS[profile.tier]}")
    typer.echo(f"platforms: {', '.join(platform.names())}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A profile or a platform from `list`.")], *, as_json: AsJson = False
) -> None:
    """Show a profile or a platform; facts that nobody here measured are marked.

    Example: `clipcast profiles show jetson-orin-nano-8gb`, `clipcast profiles show jetpack-6.2`
    """
    from hardware_profiles import platform
    from hardware_profiles.profile import load

    found = platform.load(name) if name in platform.names() else load(name)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    typer.echo(f"{found.name}: {found.title}")
    for key, text in _platform_rows(found) if isinstance(found, platform.Platform) else _profile_rows(found):
        typer.echo(f"  {key:20} {text}")


@app.command()
def detect(*, as_json: AsJson = False) -> None:
    """Say which profile and platform fit this machine, and why.

    Example: `clipcast profiles detect`
    """
    from hardware_profiles.detect import detect as detect_board

    found = detect_board()
    platform = found.platform.name if found.platform else None
    if as_json:
        board = {"l4t": found.board.l4t or None, "power_mode": found.board.power_mode or None}
        what = {"profile": found.profile.name, "platform": platform, "reason": found.reason, "certain": found.certain}
        typer.echo(json.dumps({**what, **board}))
        return
    typer.echo(f"{found.profile.name}: {found.reason}")
    l4t = f" (L4T {found.board.l4t})" if found.board.l4t else ""
    typer.echo(f"platform: {platform or 'none that clipcast has data for'}{l4t}")
    if found.board.power_mode:
        typer.echo(f"power mode: {found.board.power_mode}")
    if found.profile.advice:
        typer.echo(f"{TIERS[found.profile.tier]}: {found.profile.advice}")


def _profile_rows(profile: Profile) -> Iterator[tuple[str, str]]:
    """Yield what `show` prints of a profile: a key, or none where a line goes on, and a text."""
    yield "tier", TIERS[profile.tier]
    for key in ("device", "bits", "dtype", "batch_size", "max_rank", "threads"):
        yield key, str(getattr(profile, key))
    yield "onnx_providers", ", ".join(profile.onnx_providers)
    yield "platforms", ", ".join(profile.platforms)
    yield from _facts(profile.facts)
    yield from _facts({key: getattr(profile.supports, key) for key in type(profile.supports).model_fields})
    if profile.power is not None:
        modes = {"power_modes": profile.power.modes, "super_modes": profile.power.super_modes}
        yield from _facts({key: fact for key, fact in modes.items() if fact is not None})
    if profile.flash is not None:
        yield from _facts({"recovery_usb_id": profile.flash.recovery_usb_id})
        for config in profile.flash.configs:
            mark = "" if config.verified else " (not verified)"
            yield "flash", f"{config.config}: {config.carrier}, L4T {config.l4t}{mark}"
    for text in (profile.advice, profile.notes):
        yield from (("", line) for line in wrap(text, WIDTH))


def _platform_rows(platform: Platform) -> Iterator[tuple[str, str]]:
    """Yield what `show` prints of a platform; of a package, what runs first."""
    yield from _facts(platform.facts)
    yield from _facts({f"newest {package}": fact for package, fact in platform.ceilings.items()})
    for package in dict.fromkeys(wheel.package for wheel in platform.wheels):
        for wheel in platform.sources(package):
            where = f" ({', '.join(wheel.socs)})" if wheel.socs else ""
            yield package, f"{RUNS[wheel.runs]}{where}{': ' if wheel.command() else ''}{wheel.command()}"
            yield from (("", line) for line in wrap(wheel.why, WIDTH))
            yield "", f"source: {wheel.source}{'' if wheel.verified else ' (not verified)'}"
    yield from (("", line) for line in wrap(platform.advice, WIDTH))


def _facts(facts: dict[str, Fact]) -> Iterator[tuple[str, str]]:
    for key, fact in facts.items():
        yield key, str(fact)
        yield "", f"source: {fact.source}"
