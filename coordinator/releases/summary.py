"""How the newest release stands, for whoever looks: from the journal alone, while a desk is at work or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.releases.book import Book, Entry
from coordinator.state.registry import Registry
from protocol.release.manifests import Report
from protocol.release.rings import Census, Standing, count, fits, is_for, phase_of


@dataclass(frozen=True)
class DeviceLine:
    """A device as it last spoke, `heard` in seconds since 1970.

    `part` is its list in the census, "later" if a ring to come has it, "none" if the release is for other profiles.
    """

    device: str
    part: str
    phase: str
    report: Report
    heard: int


@dataclass(frozen=True)
class Summary:
    """The newest release, where its devices stand, and each device; `ahead` speak of versions that the journal lacks."""

    entry: Entry
    census: Census
    devices: tuple[DeviceLine, ...]
    ahead: Mapping[str, int]

    @property
    def state(self) -> str:
        """One word for how it is: complete, or what is announced. A way back is complete when all who answer have it."""
        rollout, census = self.entry.rollout, self.census
        short = not rollout.rings and (census.waiting or census.failed or not census.committed)
        return "complete" if rollout.succeeded and not short else rollout.release.state

    @property
    def others(self) -> tuple[str, ...]:
        """The profiles of all known devices, if the release is for none of these."""
        profiles = {line.report.profile or "unknown" for line in self.devices}
        return tuple(sorted(profiles)) if all(line.part == "none" for line in self.devices) else ()

    @property
    def phases(self) -> dict[str, int]:
        """How many devices of the rings so far are in each phase."""
        members = [line.phase for line in self.devices if line.part not in ("later", "none")]
        return dict(sorted(Counter(members).items()))


def summary(book: Book, registry: Registry) -> Summary | None:
    """Return how the newest release stands, None before the first; raises FederationError."""
    entries = book.entries()
    if not entries:
        return None
    entry, known = entries[0], registry.devices()
    heard = {
        name: one
        for name, one in book.reports().items()
        if name in known and not known[name].revoked and not known[name].quarantined
    }
    census = count(entry.rollout, {name: Standing(one.report, one.moved) for name, one in heard.items()}, entry.age)
    release = entry.rollout.release
    lines = [
        DeviceLine(name, _part(entry, census, name, one.report), phase_of(release, one.report), one.report, one.heard)
        for name, one in heard.items()
    ]
    newest = max(one.version for one in entries)
    spoken = {name: max(one.report.running, one.report.release or 0) for name, one in heard.items()}
    return Summary(entry, census, tuple(lines), {name: version for name, version in spoken.items() if version > newest})


def _part(entry: Entry, census: Census, name: str, report: Report) -> str:
    release = entry.rollout.release
    if not fits(release, report):
        return "none"
    if not is_for(release, name, report):
        return "later"
    return next(part for part in ("committed", "failed", "excused", "silent", "waiting") if name in getattr(census, part))
