"""The score itself: what does not pass fails its test."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def test_a_missed_target_fails(score: Callable[..., None], full: bool) -> None:
    if full:
        pytest.skip("it would stand in the results")
    with pytest.raises(AssertionError, match=r"T0 nothing: 1 pieces, target 0"):
        score("T0", "nothing", 1, "pieces", "0", passed=False)
