"""Which processes speak under one name: one after the other, as a device that is restarted, or two at the same time."""

from __future__ import annotations

from collections import Counter

RETURNS = 2
KEPT = 16


class Instances:
    """The processes of one sender, by the `instance` that each has drawn at its start.

    A restarted device is a new instance, and the old one is heard no more. Two that are alive, as after a state folder was
    copied, come back after each other. A message that is held up between two others of a new instance makes each of
    them come back once: `RETURNS` of both are no accident.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}  # the highest of each instance, the one heard last at the end
        self._returns: Counter[str] = Counter()

    @property
    def two_alive(self) -> bool:
        """Whether two instances have been alive at the same time."""
        return sum(count >= RETURNS for count in self._returns.values()) > 1

    def hear(self, instance: str, number: int) -> None:
        """Take in a signed message's instance and number. What was said before, said again by anybody, tells nothing."""
        if number <= self._numbers.get(instance, -1):
            return
        if instance in self._numbers and instance != next(reversed(self._numbers)):
            self._returns[instance] += 1
        self._numbers.pop(instance, None)
        self._numbers[instance] = number
        while len(self._numbers) > KEPT:
            oldest = next(iter(self._numbers))
            del self._numbers[oldest], self._returns[oldest]
