"""THE LOOP of a device that follows releases, beside the threads that answer."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from edge_client.errors import InferenceError
from edge_client.inference.answering import Answering
from edge_client.inference.model import Model
from edge_client.inference.providers import Runtime
from edge_client.releases.follower import Fetch, Follower, Prepare, Step, Stop, Use
from edge_client.releases.health import Figures, Watch, judge, window_over
from edge_client.releases.slots import Slot, Slots
from edge_client.releases.smoke import smoke_problem
from protocol.codec import decode_bank
from protocol.errors import WireError
from protocol.link import Link
from protocol.messages import BlobRef, TextBank
from protocol.release.follower_end import Announced, Arrived, Damaged, FollowerEnd, FollowerEvent
from protocol.release.manifests import Release, Report
from protocol.storage.large import copy_atomic, file_sha256, room_for

log = logging.getLogger(__name__)

POLL_S, JUDGE_S, AGAIN_S = 0.2, 0.5, 1.0


Loaded = tuple[Slot | None, Model]
"""A slot and its model, which may lend its session."""


class Shelf:
    """Loads models of slots, and of the file `base` that the device came with, if there is one."""

    def __init__(self, slots: Slots, base: Path | None, adapter: Path | None, runtime: Runtime) -> None:
        self._slots = slots
        self._base = base
        self._base_adapter = adapter
        self._runtime = runtime
        self._base_digest = ""

    def digest(self, slot: Slot | None) -> str:
        """Return the hash of a slot's artefact, empty if there is none; of `base` it is made when a release first asks."""
        if slot is not None:
            return slot.artefact
        if self._base is not None and not self._base_digest:
            with contextlib.suppress(OSError):  # it was removed since the start: then it is nobody's twin
                self._base_digest = file_sha256(self._base)
        return self._base_digest

    def open(self, slot: Slot | None, near: Loaded | None = None) -> Model | None:
        """Return a slot's model; None if there is none. One of the artefact of `near` shares its session.

        Raises InferenceError.
        """
        if slot is None:
            return None if self._base is None else Model.open(self._base, self._runtime, adapter=self._base_adapter)
        adapter = None if slot.adapter is None else self._slots.path(slot.adapter)
        classes = None if slot.classes is None else self._bank(slot.classes)
        if near is not None and self.digest(near[0]) == slot.artefact:
            return near[1].with_adapter(adapter, classes)
        return Model.open(self._slots.path(slot.artefact), self._runtime, adapter=adapter, classes=classes)

    def lend(self, ref: BlobRef) -> bool:
        """Copy the file that the device came with to the blobs if it is this one; return whether it is there now."""
        try:
            if self._base is None or self._base.stat().st_size != ref.size or self.digest(None) != ref.sha256:
                return False
            copy_atomic(self._base, self._slots.path(ref.sha256))
        except OSError as error:
            log.warning("%s cannot be copied: %s. The coordinator is asked for it", self._base, error)
            return False
        return True

    def _bank(self, digest: str) -> TextBank:
        path = self._slots.path(digest)
        try:
            return decode_bank(path.read_bytes())
        except (OSError, WireError) as error:
            raise InferenceError(f"{path} cannot be read as classes: {error}") from error


@dataclass
class Trial:
    """A release that is being tried: since when, and the model before, if that could be loaded."""

    release: Release
    since: float
    before: Model | None

    @property
    def is_way_back(self) -> bool:
        """Whether the operator wants it instead of what answered before, which is no measure for it then."""
        return self.release.rollback


class Live:
    """One device at work. `begin` makes it answer; `run` is the loop."""

    def __init__(self, follower: Follower, slots: Slots, shelf: Shelf, clock: Callable[[], float] = time.monotonic) -> None:
        self._follower = follower
        self._slots = slots
        self._shelf = shelf
        self._clock = clock
        self._kept = follower.state
        self._watch = Watch()
        self._candidate: tuple[Slot, Model] | None = None
        self._current: Loaded | None = None
        self._trial: Trial | None = None
        self._judged = 0.0
        self._unkept: float | None = None
        self._figures: Figures | None = None
        self._link: Link[FollowerEvent] | None = None
        self._end: FollowerEnd | None = None
        self.answering: Answering | None = None

    def begin(self) -> Answering:
        """Load the model that answers, the one before it where it cannot be loaded; raises InferenceError if none can."""
        self._take(self._follower.started())
        if self.answering is None:  # the disk takes no state, not even that of this start: it answers all the same
            self._carry_out(self._follower.using())
            self._follower.state = self._kept
        if self.answering is None:
            raise InferenceError("the current model cannot be loaded, and no other be chosen: see above, and make room")
        return self.answering

    def run(self, link: Link[FollowerEvent], end: FollowerEnd, stop: threading.Event) -> None:
        """Follow releases until `stop` is set."""
        self._link, self._end = link, end
        self._take(self._follower.under_way())
        while not stop.is_set():
            for event in [*link.poll(POLL_S), *end.settle()]:
                self._take(self._on(event))
            if self._unkept is not None and self._clock() - self._unkept >= AGAIN_S:
                self._unkept = None
                self._take(self._follower.under_way())
            if self._trial is not None and self._clock() - self._judged >= JUDGE_S:
                self._take(self._judge(self._trial))
            link.do(end.report(self._report()))

    def _on(self, event: FollowerEvent) -> list[Step]:
        match event:
            case Announced(release=release):
                return self._follower.announced(release)
            case Arrived():
                wanted = self._follower.state.release
                here = wanted is not None and all(self._slots.has(ref.sha256) for ref in wanted.blobs)
                return self._follower.fetched() if here else []
            case Damaged(reason=reason, problem=problem):
                return self._follower.failed(reason, problem)
            case _:
                return []

    def leave(self) -> None:
        """Say that the process ends in good order; `run` has ended."""
        self._follower.left()
        self._keep()

    def _take(self, steps: list[Step]) -> None:
        """Keep the state, then carry out the steps, and those that follow from them.

        Without a link only what answers is seen to: `run` begins with the rest.
        """
        while self._keep() and steps:
            step, *steps = steps
            if self._end is not None or isinstance(step, Use):
                steps = [*self._carry_out(step), *steps]

    def _keep(self) -> bool:
        """Write the state down if it has changed; False, and all is as before, if the disk does not take it.

        What is under way then is taken up again a little later.
        """
        if self._follower.state == self._kept:
            return True
        try:
            self._slots.save(self._follower.state)
        except OSError as error:
            log.error("the state of releases cannot be kept: %s. Make room", error)  # noqa: TRY400 - no bug
            self._follower.state = self._kept
            self._unkept = self._clock()
            return False
        self._kept = self._follower.state
        return True

    def _carry_out(self, step: Step) -> list[Step]:
        match step:
            case Fetch(release=release):
                return self._fetch(release)
            case Prepare(release=release):
                return self._prepare(release)
            case Use(slot=slot, watch=watch):
                return self._use(slot, watch)
            case Stop():
                self._candidate = None
                return self._fetch(None)

    def _fetch(self, release: Release | None) -> list[Step]:
        assert self._end is not None
        assert self._link is not None
        self._slots.sweep(self._follower.state)
        self._figures = None
        refs = () if release is None else release.blobs
        missing = [ref for ref in refs if not self._slots.has(ref.sha256)]
        size = self._slots.missing_bytes(missing)
        if missing and not room_for(size, self._slots.path("")):
            return self._follower.failed("no-space", f"{size / 1e6:.0f} MB and some to spare are needed")
        missing = [ref for ref in missing if not self._shelf.lend(ref)]
        self._link.do(self._end.fetch(missing))
        if release is None or missing:
            return []
        return self._follower.fetched()

    def _prepare(self, release: Release) -> list[Step]:
        slot = Slot.of(release)
        if self._candidate is not None and self._candidate[0] == slot:
            return self._follower.prepared()
        try:
            model = self._shelf.open(slot, self._current)
        except InferenceError as error:
            return self._follower.failed("unreadable", str(error))
        assert model is not None
        problem = smoke_problem(model, release.smoke)
        if problem:
            return self._follower.failed("smoke-differs", problem)
        self._candidate = slot, model
        return self._follower.prepared()

    def _use(self, slot: Slot | None, watch: Release | None) -> list[Step]:
        before = None if self._current is None else self._current[1]
        try:
            model = self._model(slot)
        except InferenceError as error:
            if slot is None:
                raise
            log.error("release %d cannot be loaded: %s", slot.version, error)  # noqa: TRY400 - no bug, no traceback
            self._slots.discard_damaged(slot)
            return self._follower.unusable(str(error))
        version = 0 if slot is None else slot.version
        self._current = None if model is None else (slot, model)
        self._candidate = self._trial = None
        if watch is not None:
            self._watch.begin(version)
            self._trial = Trial(watch, self._clock(), before or self._previous())
        else:
            self._watch.back()
        if self.answering is None:
            self.answering = Answering(model, version)
            self.answering.observe(self._watch.note)
        else:
            self.answering.switch(model, version)
        what = f"release {version}" if version else "no model yet" if model is None else "the model of the command line"
        log.info("%s%s", what, " answers, on trial" if watch else "" if model is None else " answers")
        return []

    def _model(self, slot: Slot | None) -> Model | None:
        if self._candidate is not None and self._candidate[0] == slot:
            return self._candidate[1]
        if self._trial is not None and self._trial.before is not None:
            return self._trial.before  # it goes back to what it has just been compared with
        return self._shelf.open(slot, self._current)

    def _previous(self) -> Model | None:
        """Return the model before that a trial is compared with, after a restart; it may be gone."""
        try:
            return self._shelf.open(self._follower.state.previous, self._current)
        except InferenceError as error:
            log.warning("the model before cannot be loaded, nothing is compared with it: %s", error)
            return None

    def _judge(self, trial: Trial) -> list[Step]:
        self._judged = self._clock()
        assert self._current is not None
        health, found = trial.release.health, self._watch.figures(self._clock() - trial.since)
        if trial.is_way_back:
            found = replace(found, latency_before=None)
        elif trial.before is not None and window_over(health, found):
            found = replace(found, agreement=self._watch.compare(self._current[1], trial.before))
        self._figures = found
        over, reason, detail = judge(health, found)
        if not over:
            return []
        steps = self._follower.judged(reason, detail)
        if not self._keep():
            return []  # the trial goes on, and is judged again
        if reason is None:
            log.info("release %d stays", trial.release.version)
            self._trial = None
            self._watch.end()
        else:
            log.warning("release %d goes: %s", trial.release.version, detail)
        return steps

    def _report(self) -> Report:
        """Return the follower's report, with what was measured once a trial is over."""
        report, found = self._follower.report(), self._figures
        if found is None or report.phase not in ("committed", "rolled-back"):
            return report
        figures = {
            "answers": found.answers,
            "errors": found.errors,
            "latency_ms": None if found.latency is None else round(1000 * found.latency, 3),
            "agreement": found.agreement,
        }
        return report.model_copy(update=figures)
