"""When to connect again: jittered, doubling, bounded, and anew after a success."""

from __future__ import annotations

import random
import statistics

from protocol.retry import RETRY_BASE_S, RETRY_CAP_S, RETRY_FIRST_S, Retry


def test_pauses_are_drawn_below_a_bound_that_doubles_up_to_a_minute() -> None:
    fleet = [Retry(random.Random(seed)) for seed in range(400)]
    for tries in range(12):
        pauses = [retry.pause() for retry in fleet]
        bound = min(RETRY_CAP_S, RETRY_BASE_S * 2**tries)
        assert RETRY_FIRST_S <= min(pauses) < 0.1 * bound + RETRY_FIRST_S
        assert 0.9 * bound < max(pauses) <= bound
        assert 0.4 * bound < statistics.mean(pauses) < 0.6 * bound + RETRY_FIRST_S


def test_after_a_success_the_pauses_are_short_again() -> None:
    retry = Retry(random.Random(0))
    for _ in range(1000):
        assert retry.pause() <= RETRY_CAP_S
    retry.taken_in()
    assert retry.pause() <= RETRY_BASE_S
