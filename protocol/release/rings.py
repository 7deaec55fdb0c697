"""Rings: a release reaches one device first, then a share of the fleet, then all. Pure: facts go in, a decision comes out.

A ring is passed when each of its devices that is known is done with the version, or has been silent for too long. Failures
above a share stop the release. Time is the release's age in seconds: it stands still while no desk is at work.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from protocol.messages import Finite, Name
from protocol.release.manifests import Phase, Release, Report, Share

COMMITTED: Phase = "committed"
FAILED: frozenset[Phase] = frozenset(("refused", "rolled-back"))
MOST_NAMED = 32  # so many names fit a manifest
RINGS = "1,10%,100%"
_RING = re.compile(r"^(?:(\d{1,2})|(\d{1,3}(?:\.\d+)?)%)\Z")


def place(version: int, device: str) -> float:
    """Return where a device stands in the order in which a version goes out, in [0, 100): another order each version."""
    digest = hashlib.sha256(f"{version}:{device}".encode()).digest()
    return min(int.from_bytes(digest[:8], "big") / 2**64 * 100, 99.99999999999999)  # the quotient may round up to 1


class Ring(BaseModel):
    """All devices whose place lies below `percent`, and `devices` devices at least, which are named if need be."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    devices: Annotated[int, Field(ge=1, le=MOST_NAMED)] = 1
    percent: Annotated[float, Field(ge=0, le=100)] = 0.0

    def __str__(self) -> str:
        if self.percent:
            return f"{self.percent:g}%"
        return f"{self.devices} device{'s' if self.devices > 1 else ''}"


def parse_rings(text: str) -> tuple[Ring, ...]:
    """Read e.g. "1,10%,100%"; raises ValueError unless each ring is wider than the one before and the last has all."""
    rings = []
    for part in text.split(","):
        found = _RING.match(part.strip())
        if found is None:
            raise ValueError(f"{part.strip()!r} is no ring: write a number of devices up to {MOST_NAMED}, or a share as 10%")
        count, share = found.groups()
        try:
            rings.append(Ring(devices=int(count)) if count else Ring(percent=float(share)))
        except ValueError as error:
            raise ValueError(f"{part.strip()!r} is no ring: 1 to {MOST_NAMED} devices, or up to 100%") from error
    _check_wider(rings)
    return tuple(rings)


def _check_wider(rings: list[Ring]) -> None:
    sizes = [(ring.percent, ring.devices) for ring in rings]
    if any(size <= before for before, size in pairwise(sizes)):
        raise ValueError("each ring has to be wider than the one before, devices first: e.g. 1,5,10%,100%")
    if rings[-1].percent < 100:
        raise ValueError("the last ring has to be 100%: who is to have no part in a release is told by its profiles")


class Rollout(BaseModel):
    """A release on its way: what is announced, and which ring is open.

    `ring` counts from 0 and is the number of rings once the last is passed; `since` is the release's age when it opened,
    None until a desk has seen it, and `named_before` how many devices were named then. A device in `excused` failed before
    an operator resumed: it counts no more. Without rings it is for all at once, and no failure stops it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    release: Release
    rings: tuple[Ring, ...]
    ring: Annotated[int, Field(ge=0)] = 0
    since: Finite | None = None
    named_before: Annotated[int, Field(ge=0)] = 0
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3600.0
    max_failure_share: Share = 0.2
    excused: tuple[Name, ...] = ()
    reason: Literal["", "operator", "ring-failed", "superseded"] = ""

    @model_validator(mode="after")
    def _ring_is_one(self) -> Rollout:
        if self.ring > len(self.rings):
            raise ValueError(f"ring {self.ring} of {len(self.rings)}")
        return self

    @property
    def complete(self) -> bool:
        """Whether the last ring is passed."""
        return self.ring == len(self.rings)

    @property
    def succeeded(self) -> bool:
        """Whether it is complete, and was not stopped since."""
        return self.complete and self.release.state == "open"

    @property
    def under_way(self) -> bool:
        """Whether it has still to reach somebody: until then there is no other release."""
        return not self.complete and self.release.state != "aborted"

    @classmethod
    def begin(cls, release: Release, rings: tuple[Ring, ...], timeout_s: float, max_failure_share: float) -> Rollout:
        """Return a release at its first ring; without rings it is for all."""
        percent = rings[0].percent if rings else 100.0
        release = release.model_copy(update={"state": "open", "devices": (), "percent": percent})
        return cls(release=release, rings=rings, timeout_s=timeout_s, max_failure_share=max_failure_share)


@dataclass(frozen=True)
class Standing:
    """Where a device stands, by its newest report: `moved` is the release's age when that last changed.

    `recent`: it was heard of lately, so that it can be expected to follow.
    """

    report: Report
    moved: float = 0.0
    recent: bool = True


@dataclass(frozen=True)
class Census:
    """The known devices that a release is for by now, each in one list, sorted; `newcomers` are those of the open ring."""

    committed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    excused: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    newcomers: frozenset[str] = frozenset()

    @property
    def failure_share(self) -> float:
        """The share of failures among those that are done."""
        done = len(self.committed) + len(self.failed)
        return len(self.failed) / done if done else 0.0

    @property
    def passed(self) -> bool:
        """Whether the ring is passed: nobody is waited for and it went well somewhere; with silent ones, in this ring."""
        if self.waiting or not self.committed:
            return False
        return not self.silent or not self.newcomers or not self.newcomers.isdisjoint(self.committed)


def fits(release: Release, report: Report) -> bool:
    """Whether a release is for devices of this one's profile."""
    return not release.profiles or report.profile in release.profiles


def is_for(release: Release, device: str, report: Report) -> bool:
    """Whether a device takes part by now."""
    return fits(release, report) and (device in release.devices or place(release.version, device) < release.percent)


def phase_of(release: Release, report: Report) -> Phase:
    """Return how far a device is with this release: what it says of another one does not count."""
    return report.phase if report.release == release.version else "idle"


def count(rollout: Rollout, fleet: Mapping[str, Standing], now: float) -> Census:
    """Count where the devices stand that a release is for, at the age `now`."""
    release = rollout.release
    found: dict[str, list[str]] = {}
    members = [name for name, standing in sorted(fleet.items()) if is_for(release, name, standing.report)]
    for name in members:
        found.setdefault(_list_of(rollout, name, fleet[name], now), []).append(name)
    before = rollout.rings[rollout.ring - 1].percent if rollout.ring else 0.0
    earlier = set(release.devices[: rollout.named_before])
    newcomers = frozenset(name for name in members if name not in earlier and place(release.version, name) >= before)
    return Census(newcomers=newcomers, **{where: tuple(names) for where, names in found.items()})


def _list_of(rollout: Rollout, name: str, standing: Standing, now: float) -> str:
    phase = phase_of(rollout.release, standing.report)
    if phase == COMMITTED:
        return "committed"
    if phase in FAILED:
        return "excused" if name in rollout.excused else "failed"
    moved = standing.moved if standing.report.release == rollout.release.version else 0.0
    since = now if rollout.since is None else max(rollout.since, moved)
    return "silent" if now - since >= rollout.timeout_s else "waiting"


def decide(rollout: Rollout, fleet: Mapping[str, Standing], now: float) -> Rollout:
    """Return what becomes of a release at the age `now`: the same, stopped, the next ring, or more devices by name.

    `fleet` are the devices that are known and not shut out. Only an open release changes, and never to reach fewer.
    """
    if rollout.release.state != "open" or not rollout.rings:
        return rollout
    if rollout.since is None:
        rollout = rollout.model_copy(update={"since": now})
    census = count(rollout, fleet, now)
    if census.failure_share > (0.0 if rollout.ring == 0 else rollout.max_failure_share):
        return stopped(rollout, "paused", "ring-failed")
    if rollout.complete:
        return rollout
    return _next_ring(rollout, now) if census.passed else _enough_named(rollout, census, fleet, now)


def stopped(
    rollout: Rollout, state: Literal["paused", "aborted"], reason: Literal["operator", "ring-failed", "superseded"]
) -> Rollout:
    """Return a release that goes no further."""
    release = rollout.release.model_copy(update={"state": state})
    return rollout.model_copy(update={"release": release, "reason": reason})


def resumed(rollout: Rollout, reports: Mapping[str, Report]) -> Rollout:
    """Return a release that goes on: who has failed so far counts no more, and the silent get as long as before."""
    failed = {name for name, report in reports.items() if phase_of(rollout.release, report) in FAILED}
    release = rollout.release.model_copy(update={"state": "open"})
    excused = tuple(sorted({*rollout.excused, *failed}))
    return rollout.model_copy(update={"release": release, "reason": "", "excused": excused, "since": None})


def _next_ring(rollout: Rollout, now: float) -> Rollout:
    ring, release = rollout.ring + 1, rollout.release
    if ring == len(rollout.rings):
        return rollout.model_copy(update={"ring": ring})
    release = release.model_copy(update={"percent": max(release.percent, rollout.rings[ring].percent)})
    named = len(release.devices)
    return rollout.model_copy(update={"ring": ring, "release": release, "since": now, "named_before": named})


def _enough_named(rollout: Rollout, census: Census, fleet: Mapping[str, Standing], now: float) -> Rollout:
    """Name devices until the ring has as many as it should that are not silent and have not failed.

    Of those that were heard of lately, the first by their place. Then the silent are waited for once more.
    """
    release = rollout.release
    lacking = rollout.rings[rollout.ring].devices - len(census.committed) - len(census.waiting)
    room = min(lacking, MOST_NAMED - len(release.devices))
    if room <= 0:
        return rollout
    others = [
        name
        for name, standing in fleet.items()
        if standing.recent and fits(release, standing.report) and not is_for(release, name, standing.report)
    ]
    chosen = sorted(others, key=lambda name: (place(release.version, name), name))[:room]
    if not chosen:
        return rollout
    release = release.model_copy(update={"devices": (*release.devices, *chosen)})
    return rollout.model_copy(update={"release": release, "since": now})
