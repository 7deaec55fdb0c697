"""The device's state of affairs, through every order of events, and cut off at every write."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_client.releases.follower import MOST_BOOTS, Fetch, Follower, Prepare, Step, Stop, Use
from edge_client.releases.slots import Slot, State
from protocol.messages import LargeBlobRef
from protocol.release.manifests import Release, Smoke

SMOKE = Smoke(picture="AAAA", label="fox", embedding="AAAA")


def a_release(version: int, **fields: object) -> Release:
    artefact = LargeBlobRef(sha256=f"{version:064x}", size=10)
    return Release(version=version, artefact=artefact, smoke=SMOKE, **fields)  # type: ignore[arg-type]


def a_follower(state: State | None = None) -> Follower:
    return Follower("one", "generic-cpu", state or State())


def installed(follower: Follower, release: Release) -> None:
    """Let a release go all the way."""
    assert follower.announced(release) == [Fetch(release)]
    assert follower.fetched() == [Prepare(release)]
    assert follower.prepared() == [Use(Slot.of(release), release)]
    assert follower.judged(None) == []


def told(follower: Follower) -> tuple[int, int | None, str, str | None]:
    report = follower.report()
    return report.running, report.release, report.phase, report.reason


def test_a_release_goes_through_its_phases() -> None:
    follower, release = a_follower(), a_release(3)
    assert told(follower) == (0, None, "idle", None)
    follower.announced(release)
    assert told(follower) == (0, 3, "fetching", None)
    assert follower.announced(release) == []  # said again
    follower.fetched()
    assert told(follower) == (0, 3, "staged", None)
    follower.prepared()
    assert told(follower) == (3, 3, "trying", None)
    assert follower.announced(release) == []
    follower.judged(None)
    assert told(follower) == (3, 3, "committed", None)
    assert follower.announced(release) == []
    assert follower.state.previous is None


def test_a_bad_trial_brings_the_model_before_back_and_is_not_repeated() -> None:
    follower = a_follower()
    installed(follower, a_release(1))
    for step in (lambda: follower.announced(a_release(2)), follower.fetched, follower.prepared):
        step()
    assert follower.judged("slow", "twice as long") == [Use(Slot.of(a_release(1)))]
    assert told(follower) == (1, 2, "rolled-back", "slow")
    assert follower.announced(a_release(2)) == []
    installed(follower, a_release(3))


@pytest.mark.parametrize("reason", ["smoke-differs", "wrong-hash", "no-space", "unreadable"])
def test_what_is_not_as_it_should_be_is_refused_before_it_answers(reason: str) -> None:
    follower = a_follower()
    installed(follower, a_release(1))
    follower.announced(a_release(2))
    assert follower.failed(reason, "because") == [Stop()]
    assert told(follower) == (1, 2, "refused", reason)
    assert follower.announced(a_release(2)) == []


def test_an_older_version_is_refused_unless_it_is_a_way_back() -> None:
    follower = a_follower()
    installed(follower, a_release(5))
    assert follower.announced(a_release(4)) == []
    assert told(follower) == (5, 4, "refused", "older-version")
    back = a_release(4, rollback=True)
    installed(follower, back)
    assert told(follower) == (4, 4, "committed", None)
    assert follower.announced(back) == []


def test_what_is_for_others_is_left_alone_and_what_no_longer_is_for_us_is_dropped() -> None:
    follower = a_follower()
    assert follower.announced(a_release(1, profiles=("jetson-nano",))) == []
    assert follower.announced(a_release(1, percent=0.0)) == []
    assert follower.announced(a_release(1, percent=0.0, devices=("one",))) != []
    assert follower.announced(a_release(1, percent=0.0)) == [Stop()]
    assert told(follower) == (0, None, "idle", None)


def test_a_paused_release_begins_nowhere_waits_where_it_is_and_goes_on() -> None:
    follower, paused = a_follower(), a_release(1, state="paused")
    assert follower.announced(paused) == []
    assert told(follower)[2] == "idle"
    follower.announced(a_release(1))
    follower.announced(paused)
    assert follower.fetched() == [Prepare(paused)]
    assert follower.prepared() == []
    assert told(follower)[2] == "staged"
    assert follower.announced(a_release(1)) == [Prepare(a_release(1))]
    assert follower.prepared() == [Use(Slot.of(a_release(1)), a_release(1))]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_aborted_release_ends_wherever_it_is(steps: int) -> None:
    follower = a_follower()
    for step in (lambda: follower.announced(a_release(1)), follower.fetched, follower.prepared)[:steps]:
        step()
    assert follower.announced(a_release(1, state="aborted")) == ([Use(None)] if steps == 3 else [Stop()])
    assert told(follower) == (0, 1, "rolled-back", "aborted")
    committed = a_follower()
    installed(committed, a_release(1))
    assert committed.announced(a_release(1, state="aborted")) == []
    assert told(committed) == (1, 1, "committed", None)


def test_a_newer_release_waits_for_the_end_of_a_trial_and_a_way_back_does_not() -> None:
    follower = a_follower()
    installed(follower, a_release(1))
    for step in (lambda: follower.announced(a_release(2)), follower.fetched, follower.prepared):
        step()
    assert follower.announced(a_release(3)) == []
    assert follower.judged(None) == [Fetch(a_release(3))]
    for step in (follower.fetched, follower.prepared):
        step()
    back = a_release(1, rollback=True)
    assert follower.announced(back) == [Use(Slot.of(a_release(2))), Fetch(back)]


def test_a_process_that_dies_again_and_again_during_a_trial_goes_back() -> None:
    follower = a_follower()
    for step in (lambda: follower.announced(a_release(1)), follower.fetched, follower.prepared):
        step()
    for _ in range(MOST_BOOTS):
        follower = a_follower(follower.state)
        assert follower.started() == [Use(Slot.of(a_release(1)), a_release(1))]
    follower = a_follower(follower.state)
    assert follower.started() == [Use(None)]
    assert told(follower) == (0, 1, "rolled-back", "crashed")


def test_a_model_that_kills_the_process_while_it_is_loaded_is_refused_in_the_end() -> None:
    follower = a_follower()
    installed(follower, a_release(1))
    follower.announced(a_release(2))
    follower.fetched()
    for _ in range(MOST_BOOTS):
        follower = a_follower(follower.state)
        assert follower.started() == [Use(Slot.of(a_release(1))), Prepare(a_release(2))]
    follower = a_follower(follower.state)
    assert follower.started() == [Use(Slot.of(a_release(1))), Stop()]
    assert told(follower) == (1, 2, "refused", "crashed")


def test_a_process_that_is_told_to_end_has_not_crashed() -> None:
    follower = a_follower()
    follower.announced(a_release(1))
    for step in (Follower.fetched, Follower.prepared):
        step(follower)
        for _ in range(2 * MOST_BOOTS):
            follower = a_follower(follower.state)
            follower.started()
            follower.left()
    assert told(follower) == (1, 1, "trying", None)


def test_a_paused_release_that_could_be_loaded_is_not_counted_against_it() -> None:
    follower, paused = a_follower(), a_release(1, state="paused")
    follower.announced(a_release(1))
    follower.announced(paused)
    follower.fetched()
    for _ in range(2 * MOST_BOOTS):
        follower = a_follower(follower.state)
        assert follower.started() == [Use(None), Prepare(paused)]
        assert follower.prepared() == []
    assert told(follower)[2] == "staged"


@pytest.mark.parametrize(
    "later", [{"percent": 0.0}, {"state": "aborted"}, {"profiles": ("jetson-nano",)}, {"state": "paused"}]
)
@pytest.mark.parametrize("steps", [1, 2])
def test_what_the_coordinator_no_longer_speaks_of_is_let_go(steps: int, later: dict[str, object]) -> None:
    follower = a_follower()
    for step in (lambda: follower.announced(a_release(1)), follower.fetched)[:steps]:
        step()
    assert follower.announced(a_release(2, **later)) == [Stop()]
    assert follower.fetched() == follower.prepared() == []
    assert told(follower) == (0, None, "idle", None)


def test_what_is_under_way_is_begun_again_when_it_was_lost() -> None:
    follower = a_follower()
    assert follower.under_way() == []
    follower.announced(a_release(1))
    assert follower.under_way() == [Fetch(a_release(1))]
    follower.fetched()
    assert follower.under_way() == [Prepare(a_release(1))]
    follower.prepared()
    assert follower.under_way() == []


def test_a_model_that_cannot_be_loaded_at_a_start_gives_way_to_the_one_before() -> None:
    follower = a_follower()
    installed(follower, a_release(1))
    installed(follower, a_release(2))
    again = a_follower(follower.state)
    assert again.started() == [Use(Slot.of(a_release(2)))]
    assert again.unusable("damaged") == [Use(Slot.of(a_release(1)))]
    assert again.unusable("damaged too") == [Use(None)]
    assert told(again) == (0, None, "idle", None)
    installed(again, a_release(2))  # it is here no more, so it is fetched again when it is said again


@given(st.integers(1, 3))
@settings(max_examples=10)
def test_the_state_is_the_same_after_it_was_written_and_read(version: int) -> None:
    follower = a_follower()
    follower.announced(a_release(version))
    assert State.model_validate_json(follower.state.model_dump_json()) == follower.state


@dataclass
class Disk:
    """What a power cut leaves: the state that was written last, and blobs by hash."""

    state: State = field(default_factory=State)
    blobs: set[str] = field(default_factory=set)


class Device(RuleBasedStateMachine):
    """A device whose steps are carried out one by one, and which may be cut off between any two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk()
        self.answers: Slot | None = None
        self.announced: list[Release] = []
        self.refused: set[tuple[int, bool]] = set()
        self.boot()

    def boot(self) -> None:
        self.follower = a_follower(self.disk.state)
        self.todo: list[Step] = []
        self.act(self.follower.started())

    def act(self, steps: list[Step]) -> None:
        """As the loop does it: the state first, then the first step; the others are left for later."""
        before = self.disk.state
        self.disk.state = self.follower.state
        if self.disk.state.running < before.running:
            went_back = before.stage == "trying" and self.disk.state.current == before.previous
            assert went_back or (self.disk.state.release is not None and self.disk.state.release.rollback)
        self.todo = [*steps, *self.todo]
        while self.todo and isinstance(self.todo[0], Use | Stop):
            step = self.todo.pop(0)
            if isinstance(step, Use):
                self.answers = step.slot

    @rule(
        version=st.integers(1, 4),
        state=st.sampled_from(["open", "open", "paused", "aborted"]),
        rollback=st.booleans(),
        percent=st.sampled_from([100.0, 0.0]),
    )
    def announce(self, version: int, state: str, rollback: bool, percent: float) -> None:
        release = a_release(version, state=state, rollback=rollback, percent=percent)
        self.announced.append(release)
        self.act(self.follower.announced(release))

    @precondition(lambda self: self.announced)
    @rule()
    def say_again(self) -> None:
        self.act(self.follower.announced(self.announced[-1]))

    @precondition(lambda self: self.todo)
    @rule(good=st.booleans())
    def go_on(self, good: bool) -> None:
        step = self.todo.pop(0)
        if isinstance(step, Fetch):
            if good:
                self.disk.blobs |= Slot.of(step.release).blobs
                self.act(self.follower.fetched())
            else:
                self.act(self.follower.failed("wrong-hash", ""))
        elif isinstance(step, Prepare):
            if good:
                self.act(self.follower.prepared())
            else:
                self.refused.add((step.release.version, step.release.rollback))
                self.act(self.follower.failed("smoke-differs", ""))

    @rule(reason=st.sampled_from([None, "slow", "errors"]))
    def judge(self, reason: str | None) -> None:
        self.act(self.follower.judged(reason))

    @rule()
    def cut_off(self) -> None:
        self.boot()

    @invariant()
    def answers_with_what_the_disk_says_and_has(self) -> None:
        assert self.answers == self.disk.state.current
        if self.answers is not None:
            assert self.answers.blobs <= self.disk.blobs
        assert self.disk.state == self.follower.state

    @invariant()
    def a_trial_is_of_the_current_model(self) -> None:
        state = self.disk.state
        if state.stage == "trying":
            assert state.release is not None
            assert state.current == Slot.of(state.release)
        assert (state.stage == "idle") == (state.release is None)

    @invariant()
    def the_report_is_one(self) -> None:
        self.follower.report()


TestDevice = Device.TestCase
TestDevice.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
