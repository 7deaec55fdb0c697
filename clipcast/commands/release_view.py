"""How a release stands, on the terminal: a few lines and a table, or JSON."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from coordinator.releases.book import Entry
    from coordinator.releases.summary import DeviceLine, Summary


def where(entry: Entry) -> str:
    """Say how far a release is."""
    rollout = entry.rollout
    if not rollout.rings:
        return "all devices at once"
    if rollout.complete:
        return f"all {len(rollout.rings)} rings passed"
    return f"ring {rollout.ring + 1} of {len(rollout.rings)}, {rollout.rings[rollout.ring]}"


def show(found: Summary, *, devices: bool) -> None:
    """Print how a release stands, with the devices that have failed, or all."""
    from rich.console import Console
    from rich.table import Table

    release, census = found.entry.rollout.release, found.census
    reason = f" ({found.entry.rollout.reason})" if found.entry.rollout.reason else ""
    facts = {
        "release": f"{found.entry.version}{', back from a later one' if release.rollback else ''}",
        "state": f"{found.state}{reason}",
        "ring": where(found.entry).removeprefix("ring "),
        "devices": ", ".join(f"{count} {phase}" for phase, count in found.phases.items()) or _nobody(found),
        "waiting for": some(census.waiting),
        "silent": some(census.silent),
        "excused": some(census.excused),
        "made": f"{_ago(found.entry.made)}",
        "note": release.note,
    }
    for what, value in facts.items():
        if value:
            typer.echo(f"{what}: {value}")
    lines = found.devices if devices else [line for line in found.devices if line.part in ("failed", "excused")]
    if not lines:
        return
    table = Table("device", "phase", "running", "profile", "why", "last heard", title_justify="left")
    for line in lines:
        report = line.report
        said = (line.device, _phase(line), str(report.running), report.profile or "-", _why(line), _ago(line.heard))
        table.add_row(*(part.replace("[", r"\[") for part in said))
    Console().print(table)


def _nobody(found: Summary) -> str:
    if found.others:
        return (
            f"none: it is for {', '.join(found.entry.rollout.release.profiles)}, those known are {', '.join(found.others)}"
        )
    return "none yet"


def _phase(line: DeviceLine) -> str:
    """Say where a device stands; in brackets what the phase does not say."""
    also = {"silent", "excused", "later"} & {line.part}
    return "not for it" if line.part == "none" else f"{line.phase} ({also.pop()})" if also else line.phase


def _why(line: DeviceLine) -> str:
    """Return the reason of what a device says of this release."""
    if line.part not in ("failed", "excused"):
        return ""
    return ": ".join(part for part in (line.report.reason, line.report.detail) if part)


def _ago(moment: int) -> str:
    seconds = max(0, int(time.time()) - moment)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def some(names: Collection[str]) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(list(names)[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def as_record(found: Summary) -> dict[str, object]:
    """Return how a release stands as plain values for JSON."""
    rollout = found.entry.rollout
    return {
        "version": found.entry.version,
        "state": found.state,
        "reason": rollout.reason,
        "rollback": rollout.release.rollback,
        "ring": rollout.ring,
        "rings": [str(ring) for ring in rollout.rings],
        "percent": rollout.release.percent,
        "named": list(rollout.release.devices),
        "phases": found.phases,
        **{part: list(names) for part, names in asdict(found.census).items() if part != "newcomers"},
        "ahead": dict(found.ahead),
        "devices": [
            {"device": line.device, "part": line.part, "phase": line.phase, "heard": line.heard, **line.report.model_dump()}
            | {"phase": line.phase}
            for line in found.devices
        ],
        "artefact": rollout.release.artefact.sha256,
        "made": found.entry.made,
        "note": rollout.release.note,
    }
