"""What a device does about a release, sans-I/O: events go in, the state to keep and steps come out.

A step is carried out after the state is on the disk. So a process that is cut off anywhere finds at its next start either
the state before an event, and the event comes again, or the one after it, and `started` repeats the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.releases.slots import Ended, Final, Slot, State
from protocol.release.manifests import Phase, Release, Report
from protocol.release.rings import is_for

MOST_BOOTS = 3


@dataclass(frozen=True)
class Fetch:
    """Get the blobs of this release."""

    release: Release


@dataclass(frozen=True)
class Prepare:
    """Load this release beside the model that answers, and let it answer its smoke picture."""

    release: Release


@dataclass(frozen=True)
class Use:
    """Answer with this slot from now on, None for the model that the device was set up with; `watch` how that goes."""

    slot: Slot | None
    watch: Release | None = None


@dataclass(frozen=True)
class Stop:
    """Let go of what was being fetched or prepared."""


Step = Fetch | Prepare | Use | Stop


class Follower:
    """One device's state of affairs. Each method returns what to do next, once `state` is kept."""

    def __init__(self, device: str, profile: str | None, state: State) -> None:
        self.state = state
        self._device = device
        self._profile = profile
        self._news: Release | None = None  # the newest release, while another one is tried

    def report(self) -> Report:
        """Return what the coordinator is told."""
        state, ended, running = self.state, self.state.ended, self.state.running
        if state.release is not None:
            phase: Phase = "fetching" if state.stage == "idle" else state.stage
            return Report(running=running, profile=self._profile, release=state.release.version, phase=phase)
        if ended is None:
            return Report(running=running, profile=self._profile)
        return Report(
            running=running,
            profile=self._profile,
            release=ended.version,
            phase=ended.phase,
            reason=ended.reason,
            detail=ended.detail,
        )

    def started(self) -> list[Step]:
        """Begin where the last process ended. A model that was loaded or tried three times in vain is given up."""
        state = self.state
        if state.release is not None and state.stage != "fetching":
            self._keep(boots=state.boots + 1)
            if self.state.boots > MOST_BOOTS:
                doing = "tried" if state.stage == "trying" else "loaded"
                problem = f"the process ended {MOST_BOOTS} times while it was {doing}"
                if state.stage == "trying":
                    return self._back("crashed", problem)
                return [self.using(), *self._over(state.release, "refused", "crashed", problem)]
        return [self.using(), *self.under_way()]

    def using(self) -> Use:
        """Return what answers, as it is on the disk."""
        return Use(self.state.current, self.state.release if self.state.stage == "trying" else None)

    def under_way(self) -> list[Step]:
        """Return what is to be done for the release under way: at a start, and where a step could not be carried out."""
        state = self.state
        if state.release is None or state.stage == "trying":
            return []
        return [Prepare(state.release) if state.stage == "staged" else Fetch(state.release)]

    def left(self) -> None:
        """Take the start back: the process ends in good order, which is not held against the release under way."""
        self._keep(boots=max(0, self.state.boots - 1))

    def announced(self, release: Release) -> list[Step]:
        """Take in a release, new or said again. It is the only one that the coordinator speaks of: others end."""
        state = self.state
        if state.stage == "trying" and not self._under_way(release):
            if release.rollback:  # the operator wants all back, and knows more than the trial
                return [*self._back("aborted", "the operator went back to another version"), *self.announced(release)]
            self._news = release  # one thing after the other: the trial ends first
            return []
        self._news = None
        dropped = [] if self._under_way(release) else self._drop()
        return [*dropped, *self._taken_in(release)]

    def _taken_in(self, release: Release) -> list[Step]:
        running = self.state.running
        if release.state == "aborted":
            return self._aborted(release)
        if not self._is_for_me(release):
            return self._drop() if self._under_way(release) else []
        if self._under_way(release):
            return self._updated(release)
        if self._is_done(release):
            return []
        if release.version < running and not release.rollback:
            return self._over(release, "refused", "older-version", f"version {running} is here")
        if release.version == running:
            return self._over(release, "committed")
        if release.state == "paused":
            return []
        self._keep(release=release, stage="fetching", ended=None)
        return [Fetch(release)]

    def fetched(self) -> list[Step]:
        """Go on with the release under way: all its blobs are here."""
        if self.state.stage != "fetching" or self.state.release is None:
            return []
        self._keep(stage="staged", boots=0)
        return [Prepare(self.state.release)]

    def failed(self, reason: str, detail: str) -> list[Step]:
        """Refuse the release under way: it cannot be had, or is not what it should be."""
        if self.state.release is None or self.state.stage == "trying":
            return []
        release = self.state.release
        return self._over(release, "refused", reason, detail)

    def prepared(self) -> list[Step]:
        """Switch, unless it is paused: the release under way has answered its smoke picture as it should."""
        state = self.state
        if state.stage != "staged" or state.release is None:
            return []
        if state.release.state != "open":
            self._keep(boots=0)
            return []
        self._keep(previous=state.current, current=Slot.of(state.release), stage="trying", boots=0)
        return [Use(self.state.current, state.release)]

    def unusable(self, problem: str) -> list[Step]:
        """Go back to the model before, or to what the device came with: the current one cannot be loaded, at a start.

        Its release is over no more: where the coordinator says it again, it is fetched and tried again.
        """
        state = self.state
        if state.stage == "trying":
            return self._back("unreadable", problem)
        self._keep(current=state.previous, previous=None, ended=None)
        return [Use(self.state.current)]

    def judged(self, reason: str | None, detail: str = "") -> list[Step]:
        """End the trial: well without a `reason`, else the model before comes back."""
        state = self.state
        if state.stage != "trying" or state.release is None:
            return []
        if reason is not None:
            return self._back(reason, detail)
        release = state.release
        self._keep(release=None, stage="idle", boots=0)
        self._end(release, "committed")
        return self._next()

    def _back(self, reason: str, detail: str) -> list[Step]:
        state = self.state
        assert state.release is not None
        release = state.release
        self._keep(current=state.previous, previous=None, release=None, stage="idle", boots=0)
        self._end(release, "rolled-back", reason, detail)
        return [Use(self.state.current), *self._next()]

    def _aborted(self, release: Release) -> list[Step]:
        if not self._under_way(release):
            return []
        if self.state.stage == "trying":
            return self._back("aborted", "the operator ended this release")
        return self._over(release, "rolled-back", "aborted", "the operator ended this release")

    def _updated(self, release: Release) -> list[Step]:
        """Take in the release under way as it is said anew: paused, resumed, in other chunks."""
        known = self.state.release
        if known == release:
            return []
        self._keep(release=release)
        if self.state.stage == "fetching":
            return [Fetch(release)]
        return [Prepare(release)] if self.state.stage == "staged" and release.state == "open" else []

    def _next(self) -> list[Step]:
        """Turn to what was announced during a trial."""
        news, self._news = self._news, None
        return [] if news is None else self.announced(news)

    def _drop(self) -> list[Step]:
        if self.state.release is None or self.state.stage == "trying":
            return []
        self._keep(release=None, stage="idle", boots=0)
        return [Stop()]

    def _over(self, release: Release, phase: Final, reason: str | None = None, detail: str = "") -> list[Step]:
        """End a release that has never answered, and let go of what was under way."""
        steps = self._drop()
        self._end(release, phase, reason, detail)
        return steps

    def _end(self, release: Release, phase: Final, reason: str | None = None, detail: str = "") -> None:
        ended = Ended(
            version=release.version,
            rollback=release.rollback,
            phase=phase,
            reason=reason,
            detail=detail[:500],
        )
        self._keep(ended=ended)

    def _under_way(self, release: Release) -> bool:
        known = self.state.release
        return known is not None and (known.version, known.rollback) == (release.version, release.rollback)

    def _is_done(self, release: Release) -> bool:
        """Whether this very release has ended here: it is not tried again, only another version is, or a way back to it."""
        ended = self.state.ended
        return ended is not None and (ended.version, ended.rollback) == (release.version, release.rollback)

    def _is_for_me(self, release: Release) -> bool:
        return is_for(release, self._device, Report(running=self.state.running, profile=self._profile))

    def _keep(self, **changes: object) -> None:
        self.state = self.state.model_copy(update=changes)
