"""Training waits while a board is too hot or its supply too weak, and goes on by itself."""

from __future__ import annotations

import threading

import pytest

from edge_client.monitor.guard import Guard
from edge_client.monitor.readings import Readings
from hardware_profiles.profile import Thermal
from protocol.messages import Board as BoardTold

ABOUT = BoardTold(platform="jetpack-6.2", l4t="36.4.3")
LIMITS = Thermal(pause_above_c=85, resume_below_c=75, over_current_per_minute=2)


class Board:
    """Answers one reading after another; a stop event whose waiting takes no time."""

    def __init__(self, *readings: Readings, limits: Thermal | None = LIMITS):
        self.readings, self.now, self.asked = list(readings), 0.0, 0
        self.reasons: list[str] = []
        self.stopped = threading.Event()
        self.guard = Guard(limits, self.read, ABOUT, lambda: self.now, every_s=5.0)
        self.stopped.wait = self.wait  # type: ignore[method-assign]

    def read(self) -> Readings:
        self.asked += 1
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]

    def wait(self, timeout: float | None = None) -> bool:
        self.reasons.append(self.guard.reason)
        assert len(self.reasons) < 100, "it waits for ever"
        self.now += timeout or 0.0
        return self.stopped.is_set()


def at(*temperatures: float) -> list[Readings]:
    return [Readings({"cpu": 20.0, "gpu": celsius}) for celsius in temperatures]


def over_current(*counts: int | None) -> list[Readings]:
    return [Readings({"gpu": 50.0}, over_current_events=count) for count in counts]


@pytest.mark.parametrize("readings", [at(85), at(20), [Readings()], over_current(1000), over_current(None)])
def test_a_board_that_is_well_is_not_held(readings):
    board = Board(*readings)
    assert board.guard.hold(board.stopped) is False
    assert board.reasons == []
    assert board.guard.reason == ""


def test_a_hot_board_waits_until_it_is_cool_not_just_less_hot():
    board = Board(*at(86, 84, 76, 75))
    board.guard.hold(board.stopped)
    assert len(board.reasons) == 3
    assert "86 C" in board.reasons[0]
    assert "below 75 C" in board.reasons[0]
    assert board.guard.reason == ""


def test_a_supply_that_cannot_follow_is_named_and_waited_for():
    board = Board(*over_current(100, 103, 103))
    board.guard.hold(board.stopped)
    board.now += 6
    board.guard.hold(board.stopped)
    assert "3 over-current events in a minute" in board.reasons[0]
    assert len(board.reasons) in range(11, 14)  # a minute, 5 s each


def test_a_few_over_current_events_are_let_pass():
    board = Board(*over_current(100, 102, 102))
    board.guard.hold(board.stopped)
    board.now += 6
    board.guard.hold(board.stopped)
    assert board.reasons == []


def test_whoever_is_asked_to_stop_waits_no_longer():
    board = Board(*at(99))
    stopped = board.stopped
    stopped.wait = lambda timeout=None: stopped.set()  # type: ignore[method-assign]
    assert board.guard.hold(stopped) is True
    assert board.guard.reason == ""
    assert board.guard.hold(stopped) is True


def test_the_board_is_not_asked_at_every_step():
    board = Board(*at(50))
    for _ in range(100):
        board.guard.hold(board.stopped)
    assert board.asked == 1
    board.now += 5.0
    board.guard.hold(board.stopped)
    assert board.asked == 2


def test_a_profile_without_limits_holds_nothing():
    board = Board(*at(200), limits=None)
    board.guard.hold(board.stopped)
    assert board.asked == 0


def test_others_see_how_the_board_is_and_that_asks_it_no_more_often():
    board = Board(Readings({"gpu": 51.5}, 5.0, 0.5, memory_available_mib=900, over_current_events=3, power_mode="15W"))
    told = BoardTold(
        platform="jetpack-6.2", l4t="36.4.3", temperature_c=51.5, power_w=5.0, gpu_load=0.5, memory_available_mib=900,
        over_current_events=3, power_mode="15W",
    )  # fmt: skip
    assert [board.guard.board() for _ in range(10)] == [told] * 10
    assert board.asked == 1


def test_being_looked_at_does_not_keep_a_hot_board_from_being_held():
    board = Board(*at(50, 99, 60))
    board.guard.hold(board.stopped)
    board.now += 5.0
    assert board.guard.board().temperature_c == 99
    board.guard.hold(board.stopped)
    assert board.reasons
