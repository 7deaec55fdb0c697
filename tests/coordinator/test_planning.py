"""A plan names its participants, and has to fit a manifest."""

from __future__ import annotations

import re

import pytest

from coordinator.errors import FederationError
from coordinator.planning import check_size


@pytest.mark.parametrize("length", [3, 16, 40])
def test_a_plan_that_is_too_long_says_how_many_clients_fit(plan, length):
    names = [f"{number:0{length}d}" for number in range(3000)]
    check_size("lab", plan.model_copy(update={"participants": tuple(names[:200])}))
    long = plan.model_copy(update={"participants": tuple(names[:2500])})
    with pytest.raises(FederationError, match="set clients_per_round to at most") as caught:
        check_size("lab", long)
    fits = int(re.search(r"at most (\d+)", str(caught.value))[1])
    check_size("lab", plan.model_copy(update={"participants": tuple(names[:fits])}))
    with pytest.raises(FederationError):
        check_size("lab", plan.model_copy(update={"participants": tuple(names[: fits + fits // 4])}))
