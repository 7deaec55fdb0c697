"""How often to speak of what happens again and again."""

from __future__ import annotations


def worth_telling(count: int) -> bool:
    """Whether the `count`-th time deserves a line in a log: the 1st, 2nd, 4th, 8th ..., so that a flood fills no disk."""
    return count & (count - 1) == 0
