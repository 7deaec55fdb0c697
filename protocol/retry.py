"""When to connect again: full jitter, so that a thousand clients which lost one broker do not come back in chorus."""

from __future__ import annotations

import random

RETRY_FIRST_S = 0.05
RETRY_BASE_S = 1.0
RETRY_CAP_S = 60.0


class Retry:
    """The pauses of one connection's tries: each drawn between almost nothing and a bound that doubles from 1 s to 60 s."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._tries = 0

    def taken_in(self) -> None:
        """Begin anew with the shortest bound: the last try was a success."""
        self._tries = 0

    def pause(self) -> float:
        """Return how many seconds to wait before the next try."""
        bound = min(RETRY_CAP_S, RETRY_BASE_S * 2.0 ** min(self._tries, 32))
        self._tries += 1
        return self._rng.uniform(RETRY_FIRST_S, bound)
