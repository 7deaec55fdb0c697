"""Rings, as a state machine: whatever devices say and whenever, a release only widens, never after it failed, and ends."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages import LargeBlobRef
from protocol.release.manifests import Release, Report, Smoke
from protocol.release.rings import (
    MOST_NAMED,
    Ring,
    Rollout,
    Standing,
    count,
    decide,
    fits,
    is_for,
    parse_rings,
    place,
    resumed,
    stopped,
)

TIMEOUT = 100.0
FINAL = ("committed", "refused", "rolled-back")
SMOKE = Smoke(picture="AAAA", label="fox", embedding="AAAA")


def a_release(version: int = 5, **fields: object) -> Release:
    return Release(version=version, artefact=LargeBlobRef(sha256="ab" * 32, size=10), smoke=SMOKE, **fields)


def a_rollout(rings: str = "1,10%,100%", share: float = 0.2, **fields: object) -> Rollout:
    return Rollout.begin(a_release(**fields), parse_rings(rings), TIMEOUT, share)


def says(phase: str = "idle", release: int | None = 5, **fields: object) -> Report:
    return Report(running=1, release=release if phase != "idle" else None, phase=phase, **fields)


def fleet(**devices: str) -> dict[str, Standing]:
    return {name: Standing(says(phase)) for name, phase in devices.items()}


def names_of(number: int) -> list[str]:
    return [f"device-{index}" for index in range(number)]


def by_place(names: list[str], version: int = 5) -> list[str]:
    return sorted(names, key=lambda name: place(version, name))


def steady(rollout: Rollout, known: dict[str, Standing], now: float) -> Rollout:
    """What a desk makes of the same facts in the end."""
    for _ in range(MOST_NAMED + 10):
        decided = decide(rollout, known, now)
        if decided == rollout:
            return rollout
        rollout = decided
    raise AssertionError("the same facts are decided anew again and again")


def test_a_place_is_what_the_wire_says_it_is() -> None:
    digest = hashlib.sha256(b"7:jetson-1").digest()
    assert place(7, "jetson-1") == int.from_bytes(digest[:8], "big") / 2**64 * 100
    assert place(7, "jetson-1") != place(8, "jetson-1")


def test_places_are_spread_evenly_and_another_way_each_version() -> None:
    names = names_of(4000)
    first, second = ([place(version, name) for name in names] for version in (1, 2))
    assert all(0 <= value < 100 for value in (*first, *second))
    for tenth in range(10):
        share = sum(tenth * 10 <= value < tenth * 10 + 10 for value in first) / len(names)
        assert 0.07 < share < 0.13
    both = sum(a < 10 and b < 10 for a, b in zip(first, second, strict=True))
    assert both < 80  # 40 if the one tells nothing of the other


@pytest.mark.parametrize(
    ("text", "rings"),
    [
        ("100%", (Ring(percent=100),)),
        ("1,10%,100%", (Ring(), Ring(percent=10), Ring(percent=100))),
        (" 2, 32 ,0.5%,100%", (Ring(devices=2), Ring(devices=32), Ring(percent=0.5), Ring(percent=100))),
    ],
)
def test_rings_are_read(text: str, rings: tuple[Ring, ...]) -> None:
    assert parse_rings(text) == rings


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no ring"),
        ("0,100%", "1 to 32 devices"),
        ("33,100%", "1 to 32 devices"),
        ("1,101%", "up to 100%"),
        ("1,10%", "the last ring has to be 100%"),
        ("10%,1,100%", "wider than the one before"),
        ("10%,10%,100%", "wider than the one before"),
        ("-1,100%", "no ring"),
        ("1;100%", "no ring"),
        ("1,,100%", "no ring"),
        ("nan%,100%", "no ring"),
    ],
)
def test_what_are_no_rings_is_said(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_rings(text)


def test_the_first_ring_is_the_device_with_the_lowest_place_that_was_heard_lately() -> None:
    names = by_place(names_of(20))
    known = {name: Standing(says()) for name in names} | {names[0]: Standing(says(), recent=False)}
    rollout = steady(a_rollout(), known, 0.0)
    assert (rollout.ring, rollout.release.devices, rollout.release.percent) == (0, (names[1],), 0.0)


def test_a_ring_of_devices_only_takes_those_of_its_profiles() -> None:
    names = by_place(names_of(9))
    known = {name: Standing(says(profile="nano" if name in names[4:6] else "orin")) for name in names}
    rollout = steady(a_rollout("3,100%", profiles=("nano",)), known, 0.0)
    assert rollout.release.devices == tuple(names[4:6])
    assert [name for name in names if is_for(rollout.release, name, known[name].report)] == names[4:6]


def test_nobody_to_begin_with_is_waited_for() -> None:
    rollout = steady(a_rollout(), {}, 10 * TIMEOUT)
    assert rollout.release.state == "open"
    assert rollout.ring == 0
    assert steady(rollout, fleet(late="idle"), 10 * TIMEOUT).release.devices == ("late",)


def test_all_that_goes_well_goes_through_all_rings() -> None:
    names = names_of(60)
    rollout, seen = a_rollout(), []
    for now in range(10):
        members = [name for name in names if is_for(rollout.release, name, says())]
        known = {name: Standing(says("committed" if name in members else "idle")) for name in names}
        seen.append((rollout.ring, len(members)))
        rollout = decide(rollout, known, float(now))
    assert rollout.complete
    assert dict(seen)[1] == 1 + sum(place(5, name) < 10 for name in names if name not in rollout.release.devices)
    assert dict(seen)[2] == 60


def test_a_device_that_failed_in_the_first_ring_stops_it_at_once() -> None:
    rollout = steady(a_rollout("3,100%"), fleet(a="idle", b="idle", c="idle"), 0.0)
    rollout = steady(rollout, fleet(a="rolled-back", b="fetching", c="committed"), 1.0)
    assert (rollout.release.state, rollout.reason, rollout.ring) == ("paused", "ring-failed", 0)


@pytest.mark.parametrize(("failures", "state"), [(2, "open"), (3, "paused")])
def test_later_rings_stop_above_the_share_of_those_that_are_done(failures: int, state: str) -> None:
    names = names_of(20)
    rollout = a_rollout("1,100%").model_copy(update={"ring": 1, "release": a_release(percent=100.0), "since": 0.0})
    done = {name: Standing(says("refused" if index < failures else "committed")) for index, name in enumerate(names[:10])}
    still = {name: Standing(says("fetching")) for name in names[10:]}
    assert steady(rollout, done | still, 1.0).release.state == state


def test_what_is_said_of_another_version_does_not_count() -> None:
    rollout = steady(a_rollout(), fleet(a="idle"), 0.0)
    other = {"a": Standing(says("rolled-back", release=4))}
    assert steady(rollout, other, 1.0) == rollout
    assert count(rollout, other, 1.0).waiting == ("a",)


def test_a_silent_device_is_left_behind_where_another_went_well() -> None:
    names = ["a", "b", "c"]
    rollout = steady(a_rollout("3,100%"), {name: Standing(says()) for name in names}, 0.0)
    known = fleet(a="committed", b="committed", c="fetching")
    assert steady(rollout, known, TIMEOUT - 1).ring == 0
    assert count(rollout, known, TIMEOUT).silent == ("c",)
    assert steady(rollout, known, TIMEOUT).ring == 1


def test_one_that_still_moves_is_waited_for() -> None:
    rollout = steady(a_rollout("2,100%"), fleet(a="idle", b="idle"), 0.0)
    known = {"a": Standing(says("committed")), "b": Standing(says("fetching"), moved=TIMEOUT / 2)}
    assert count(rollout, known, TIMEOUT).waiting == ("b",)
    assert count(rollout, known, TIMEOUT * 1.5).silent == ("b",)
    chatter = {"a": Standing(says("committed")), "b": Standing(says(), moved=TIMEOUT * 0.9)}  # of no release of ours
    assert count(rollout, chatter, TIMEOUT).silent == ("b",)


def test_where_nobody_answers_another_device_is_named_and_the_ring_is_not_passed() -> None:
    names = by_place(names_of(3))
    known = {name: Standing(says()) for name in names}
    rollout = steady(a_rollout("1,100%"), known, 0.0)
    for turn in range(1, 6):
        rollout = steady(rollout, known, turn * TIMEOUT)
        assert (rollout.ring, rollout.release.state, rollout.release.percent) == (0, "open", 0.0)
        assert rollout.release.devices == tuple(names[: turn + 1])


def test_a_ring_whose_newcomers_are_all_silent_is_not_passed_by_the_success_of_an_earlier_one() -> None:
    names = by_place(names_of(40))
    rollout = steady(a_rollout("1,50%,100%"), {name: Standing(says()) for name in names}, 0.0)
    known = {name: Standing(says("committed" if name == names[0] else "idle")) for name in names}
    rollout = steady(rollout, known, 1.0)
    assert rollout.ring == 1
    assert steady(rollout, known, 100 * TIMEOUT).ring == 1
    known[names[1]] = Standing(says("committed"))
    assert steady(rollout, known, 100 * TIMEOUT).ring == 2


def test_a_share_with_nobody_in_it_gets_a_device_by_name() -> None:
    names = [name for name in names_of(30) if place(5, name) >= 10]
    known = {name: Standing(says()) for name in names}
    rollout = steady(a_rollout("10%,100%"), known, 0.0)
    assert rollout.release.devices == (by_place(names)[0],)
    assert rollout.ring == 0


def test_resumed_it_forgives_who_failed_and_takes_another() -> None:
    names = by_place(names_of(3))
    rollout = steady(a_rollout("1,100%"), {name: Standing(says()) for name in names}, 0.0)
    known = {name: Standing(says("rolled-back" if name == names[0] else "idle")) for name in names}
    rollout = steady(rollout, known, 1.0)
    assert rollout.reason == "ring-failed"
    rollout = steady(resumed(rollout, {name: one.report for name, one in known.items()}), known, 2.0)
    assert (rollout.release.state, rollout.release.devices, rollout.excused) == ("open", tuple(names[:2]), (names[0],))
    known[names[1]] = Standing(says("refused"))
    assert steady(rollout, known, 3.0).reason == "ring-failed"


def test_resumed_it_waits_for_the_silent_once_more() -> None:
    rollout = steady(a_rollout("2,100%"), fleet(a="idle", b="idle"), 0.0)
    known = fleet(a="committed", b="fetching")
    rollout = steady(resumed(stopped(rollout, "paused", "operator"), {}), known, 5 * TIMEOUT)
    assert rollout.ring == 0
    assert steady(rollout, known, 6 * TIMEOUT).ring == 1


def test_without_rings_nothing_stops_it() -> None:
    back = Rollout.begin(a_release(rollback=True), (), TIMEOUT, 0.2)
    assert back.complete
    assert not back.under_way
    assert back.release.percent == 100.0
    assert decide(back, fleet(a="rolled-back"), 1.0) == back


def test_one_that_is_complete_stops_for_late_failures_too() -> None:
    rollout = a_rollout().model_copy(update={"ring": 3, "release": a_release(percent=100.0), "since": 0.0})
    assert steady(rollout, fleet(a="committed"), 1.0) == rollout
    assert steady(rollout, fleet(a="committed", b="rolled-back"), 1.0).reason == "ring-failed"


PHASES = ["idle", "fetching", "staged", "trying", *FINAL]
RINGS = ["1,10%,100%", "100%", "3,100%", "1,5,20%,50%,100%", "30%,100%"]
facts = st.lists(
    st.tuples(st.integers(0, 11), st.sampled_from(PHASES), st.sampled_from([4, 5, 6]), st.floats(0, TIMEOUT), st.booleans()),
    max_size=60,
)


@given(st.sampled_from(RINGS), facts, st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.integers(0, 12))
@settings(deadline=None, max_examples=300)
def test_whatever_is_said_it_only_widens_and_never_after_it_failed(rings, history, share, known_at_first) -> None:
    rollout, now = a_rollout(rings, share), 0.0
    known = {name: Standing(says()) for name in names_of(known_at_first)}
    for index, phase, version, passed, recent in history:
        now += passed
        known[f"device-{index}"] = Standing(says(phase, version), now, recent)
        before, rollout = rollout, decide(rollout, known, now)
        assert rollout.release.percent >= before.release.percent
        assert rollout.release.devices[: len(before.release.devices)] == before.release.devices
        assert len(set(rollout.release.devices)) == len(rollout.release.devices) <= MOST_NAMED
        assert rollout.ring >= before.ring
        assert rollout.release.model_copy(update={"percent": 0.0, "devices": (), "state": "open"}) == a_release(percent=0.0)
        census = count(before, known, now)
        if before.release.state == "paused":
            assert rollout == before
        if rollout.release.state == "paused":
            assert rollout.ring == before.ring
            assert census.failed or before.release.state == "paused"
        if rollout.ring > before.ring:
            done = len(census.committed) + len(census.failed)
            assert census.committed
            assert not census.waiting
            assert len(census.failed) <= (share * done if before.ring else 0)


outcomes = st.lists(
    st.sampled_from(["committed", "committed", "committed", "rolled-back", "refused", "silent"]), max_size=40
)


@given(st.sampled_from(RINGS), outcomes, st.sampled_from([0.0, 0.2, 1.0]))
@settings(deadline=None, max_examples=200)
def test_it_ends_complete_or_stopped_or_with_nobody_who_says_yes(rings, destiny, share) -> None:
    """Each device that it is for ends as it is destined to, or falls silent."""
    will = dict(zip(names_of(len(destiny)), destiny, strict=True))
    known = {name: Standing(says()) for name in will}
    rollout, now = a_rollout(rings, share), 0.0
    for _ in range(len(will) + 2 * len(rollout.rings) + 5):
        rollout = steady(rollout, known, now)
        for name, end in will.items():
            if is_for(rollout.release, name, known[name].report) and fits(rollout.release, known[name].report):
                known[name] = Standing(says("fetching" if end == "silent" else end), known[name].moved)
        rollout, now = steady(rollout, known, now), now + TIMEOUT
    census = count(rollout, known, now)
    if rollout.release.state == "open" and not rollout.complete:
        before = 0.0 if rollout.ring == 0 else rollout.rings[rollout.ring - 1].percent
        newcomers = [will[name] for name in census.newcomers if place(5, name) >= before]
        assert "committed" not in newcomers
        assert not census.waiting or set(newcomers) <= {"silent"}
    elif rollout.complete:
        assert all(end in ("committed", "silent") or share > 0 for end in will.values())
    else:
        assert rollout.reason == "ring-failed"
        assert census.failed


@given(st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_a_fleet_that_is_well_is_reached_whole(number: int) -> None:
    known = {name: Standing(says()) for name in names_of(number)}
    rollout = a_rollout()
    for now in range(12):
        rollout = decide(rollout, known, float(now))
        reached = [name for name in known if is_for(rollout.release, name, known[name].report)]
        known |= {name: Standing(says("committed"), float(now)) for name in reached}
    assert rollout.complete
    assert len(reached) == number
