"""Who may upload now."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protocol.transfer.turns import Turns

CLIENTS = ("a", "b", "c", "d", "e")


def test_so_many_at_a_time_in_the_order_of_asking():
    turns = Turns(2)
    for client in ("c", "a", "b", "a"):
        turns.ask(client)
    assert turns.now(0.0) == ["c", "a"]
    turns.end("c")
    assert turns.now(1.0) == ["a", "b"]


def test_who_stalls_makes_way_for_one_who_waits_and_comes_again():
    turns = Turns(1, stalled_s=20.0)
    turns.ask("a")
    assert turns.now(0.0) == ["a"]
    assert turns.now(100.0) == ["a"]  # nobody waits
    turns.ask("b")
    turns.progress("a", 100.0)
    assert turns.now(120.0) == ["a"]
    assert turns.now(120.1) == ["b"]
    turns.end("b")
    assert turns.now(121.0) == ["a"]


class Line(RuleBasedStateMachine):
    """Whatever happens, no more than the limit have a turn, and whoever asked and did not end is somewhere."""

    def __init__(self):
        super().__init__()
        self.turns, self.now, self.wanting = Turns(2), 0.0, set()

    @rule(client=st.sampled_from(CLIENTS))
    def ask(self, client):
        self.turns.ask(client)
        self.wanting.add(client)

    @rule(client=st.sampled_from(CLIENTS))
    def end(self, client):
        self.turns.end(client)
        self.wanting.discard(client)

    @rule(client=st.sampled_from(CLIENTS))
    def progress(self, client):
        self.turns.progress(client, self.now)

    @rule(seconds=st.floats(0, 60))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def everybody_gets_a_turn_in_the_end(self):
        served = set()
        for _ in range(2 * len(CLIENTS)):
            served |= set(self.turns.now(self.now))
            self.now += 30.0
        assert served == self.wanting

    @invariant()
    def at_most_the_limit(self):
        turns = self.turns.now(self.now)
        assert len(set(turns)) == len(turns) == min(2, len(self.wanting))
        assert set(turns) <= self.wanting


TestLine = Line.TestCase
