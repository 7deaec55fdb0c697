"""Two processes under one name: told from one that is restarted, whatever is said twice, late or by somebody else."""

from __future__ import annotations

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import Refused
from protocol.trust.instances import KEPT, RETURNS, Instances
from protocol.trust.notices import EVERY_S, REPLAYS, Notices

lives = st.lists(st.integers(1, 5), min_size=1, max_size=3 * KEPT)


def heard(*said: tuple[str, int]) -> Instances:
    instances = Instances()
    for instance, number in said:
        instances.hear(instance, number)
    return instances


def of_one_device(lives: list[int]) -> list[tuple[str, int]]:
    """What a device says that is restarted after so many messages, again and again."""
    numbers = count(1)
    return [(f"start {life}", next(numbers)) for life, messages in enumerate(lives) for _ in range(messages)]


@given(lives, st.randoms(use_true_random=False))
def test_a_device_that_is_restarted_is_one_whatever_is_said_again(lives, rng):
    instances, said = Instances(), of_one_device(lives)
    for position, (instance, number) in enumerate(said):
        instances.hear(instance, number)
        for _ in range(3):  # recorded, and said again by a broker
            instances.hear(*said[rng.randint(max(0, position - 10), position)])
    assert not instances.two_alive


@given(lives, st.data())
def test_one_message_that_is_held_up_does_not_make_two_of_a_device(lives, data):
    said = of_one_device(lives)
    late = said.pop(data.draw(st.integers(0, len(said) - 1)))
    said.insert(data.draw(st.integers(0, len(said))), late)
    assert not heard(*said).two_alive


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.lists(st.booleans(), max_size=40))
def test_two_that_come_back_after_each_other_are_two(first, second, turns):
    """Whichever numbers they use: a copied state begins with the same, an older copy far behind."""
    numbers = {True: count(first), False: count(second)}
    instances = Instances()
    for turn in turns:
        instances.hear(f"device {turn}", next(numbers[turn]))
    runs = [turn for i, turn in enumerate(turns) if i == 0 or turns[i - 1] != turn]
    assert instances.two_alive == (min(runs.count(True), runs.count(False)) > RETURNS)


def told(notices: Notices, now: float, *refused: tuple[str, str]) -> list[tuple[str, str]]:
    for client, verdict in refused:
        notices.note(client, Refused(verdict, "why"))
    return [(client, notice.reason) for client, notice in notices.due(now)]


def test_a_client_is_told_once_in_a_while_and_at_the_end_of_it_the_newest():
    notices = Notices()
    assert told(notices, 0.0, ("ann", "unknown-device")) == [("ann", "unknown-device")]
    assert told(notices, 1.0, ("ann", "unknown-device"), ("bob", "wrong-key")) == [("bob", "wrong-key")]
    assert told(notices, EVERY_S - 0.1, ("ann", "cloned")) == []
    assert told(notices, EVERY_S) == [("ann", "cloned")]
    assert told(notices, 100.0) == []


def test_what_may_be_chance_is_not_told():
    notices = Notices()
    assert told(notices, 0.0, ("cid", "bad-signature"), ("cid", "malformed")) == []
    assert [told(notices, 0.0, ("dan", "replayed")) for _ in range(REPLAYS)] == [[]] * (REPLAYS - 1) + [
        [("dan", "replayed")]
    ]


def test_names_that_a_stranger_makes_up_cost_no_memory():
    notices = Notices()
    for number in range(5000):
        notices.note(f"n{number}", Refused("unknown-device", "why"))
        notices.note(f"n{number}", Refused("replayed", "why"))
    assert len(notices.due(0.0)) == len(notices._last) == len(notices._replays) == 1000
