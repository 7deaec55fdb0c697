"""Who may be drawn: whoever is there, but for those that let the last rounds down."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.roster import LONGEST_REST, SILENCE_S, Roster
from protocol.messages import Status
from tests.coordinator.conftest import a_record

ONLINE = Status(state="online")
NAMES = tuple("abcdefgh")


def record(number, accepted=(), silent=(), failed=(), outcome=None):
    outcome = outcome or ("aggregated" if accepted else "quorum-missed")
    return a_record(number, outcome=outcome, accepted=list(accepted), silent=list(silent), failed=list(failed))


@pytest.fixture
def roster():
    made = Roster()
    for name in NAMES[:4]:
        made.hear(name, ONLINE, 0.0)
    return made


def test_the_draw_is_by_seed_and_round_and_not_by_who_came_first(roster):
    other = Roster()
    for name in reversed(NAMES[:4]):
        other.hear(name, ONLINE, 0.0)
    draws = [roster.draw(number, 2, 7) for number in range(1, 20)]
    assert draws == [other.draw(number, 2, 7) for number in range(1, 20)]
    assert {name for drawn in draws for name in drawn} == set(NAMES[:4])
    assert draws != [roster.draw(number, 2, 8) for number in range(1, 20)]


def test_who_fails_sits_out_longer_and_longer_and_is_back_after_an_update(roster):
    rests = []
    number = 1
    for _ in range(3):
        roster.learn(record(number, silent=["a", "b"], failed=["a"]))
        rest = 0
        while "a" not in roster.draw(number + rest + 1, 4 - 1, 0) and rest < 99:
            rest += 1
            roster.learn(record(number + rest, accepted=["b", "c", "d"]))
        draws = [roster.draw(n, 3, 0) for n in range(number + rest + 1, number + rest + 9)]
        assert any("a" in drawn for drawn in draws)
        rests.append(rest)
        number += rest + 1
    assert rests[0] >= 1
    assert rests[1] >= 2
    assert rests[2] >= 4
    roster.learn(record(number, accepted=["a"]))
    assert roster.misses() == {}


def test_who_was_slower_than_the_quorum_is_not_to_blame(roster):
    roster.learn(record(1, accepted=["a"], silent=["b"]))
    roster.learn(record(2, silent=["c", "d"]))
    assert roster.misses() == {"c": (1, 2), "d": (1, 2)}
    assert roster.draw(3, 2, 0) == ["a", "b"]


def test_if_the_others_are_too_few_those_that_failed_least_are_drawn(roster):
    roster.learn(record(1, silent=["a", "b"], failed=["a"]))
    roster.learn(record(2, silent=["a", "b"], failed=["a", "b"]))
    assert roster.draw(3, 3, 0) == ["b", "c", "d"]
    assert roster.draw(3, 4, 0) == ["a", "b", "c", "d"]


def test_nobody_rests_for_ever(roster):
    for number in range(1, 30):
        roster.learn(record(number, silent=["a"]))
    drawn = [n for n in range(30, 200) if "a" in roster.draw(n, 3, 0)]
    assert drawn
    assert drawn[0] > 29 + LONGEST_REST


def test_who_says_nothing_for_long_is_gone_unless_our_own_link_was_down(roster):
    roster.hear("a", ONLINE, SILENCE_S)
    assert roster.expire(SILENCE_S) == []
    roster.reconnected(SILENCE_S + 1.0)
    assert roster.expire(2 * SILENCE_S) == []
    roster.hear("b", ONLINE, 2 * SILENCE_S)
    assert roster.expire(2 * SILENCE_S + 2.0) == ["a", "c", "d"]
    assert list(roster) == ["b"]
    roster.hear("b", Status(state="offline"), 2 * SILENCE_S)
    assert len(roster) == 0


@given(
    st.lists(st.tuples(st.sets(st.sampled_from(NAMES)), st.booleans(), st.sets(st.sampled_from(NAMES))), max_size=20),
    st.sets(st.sampled_from(NAMES), min_size=1),
    st.integers(1, 8),
)
def test_whatever_happened_as_many_are_drawn_as_there_are(rounds, online, wanted):
    roster = Roster()
    for name in online:
        roster.hear(name, ONLINE, 0.0)
    for number, (silent, quorum, failed) in enumerate(rounds, start=1):
        accepted = sorted(set(NAMES) - silent) if quorum else []
        roster.learn(
            record(number, accepted, sorted(silent), sorted(failed & silent), "aggregated" if quorum else "quorum-missed")
        )
    drawn = roster.draw(len(rounds) + 1, wanted, 3)
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= online
    assert len(drawn) == min(wanted, len(online))
