"""A plan names its participants, and has to fit a manifest; rounds of before have to fit the recipe."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from clip_lora.shapes import Sizes, TowerSize, initial_adapter
from coordinator.collection import Collection
from coordinator.config import CoordinatorConfig
from coordinator.errors import FederationError
from coordinator.learning import NO_LESSON, Knowledge, Learner, stored
from coordinator.planning import Planner, check_size
from coordinator.state.store import Store
from coordinator.summary import summary
from protocol.coordinator_end import CoordinatorEnd
from protocol.messages import TextBank


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


RANKS = {"ann": 4, "bob": 2}


@pytest.fixture
def planner_of(tmp_path):
    """A planner in round 2, whose round 1 is over: ann had rank 4, bob 2."""
    stores = []

    def make(aggregation, ranks):
        bank = TextBank(1, ("cat", "dog"), ("a {}",), np.eye(2, 8, dtype=np.float32), 10.0, "none", "d" * 64)
        recipe = {"name": "fedlora", "rank": 4, "late_rounds": 1, "aggregation": aggregation}
        config = CoordinatorConfig.model_validate({"federation": "lab", "classes": bank.classes, "recipe": recipe})
        store, sizes = Store(tmp_path), Sizes(TowerSize(1, 8), TowerSize(1, 8))
        stores.append(store)
        end = CoordinatorEnd("lab", random.Random(0))
        planner = Planner(config, sizes, Learner(bank, config.recipe, 0), end, store)
        planner.run, planner.start = store.begin(planner.identity(bank))
        known = Knowledge(bank, stored(initial_adapter(planner.shapes(), 0)))
        store.start(known)
        first, _ = planner.plan(1, known, ranks)
        store.open(first.plan, ranks, {client: start.base for client, start in first.starts.items()})
        collection = Collection(first, 1, 0.0)
        store.finish(summary(collection, NO_LESSON, known, 1.0, {}), known)
        return planner, known

    yield make
    for store in stores:
        store.close()


@pytest.mark.parametrize(
    ("aggregation", "ranks", "fits"),
    [
        ("mean_of_products", RANKS, True),
        ("mean_of_factors", RANKS, False),
        ("mean_of_factors", dict.fromkeys(RANKS, 4), True),
    ],
)
def test_a_round_whose_ranks_the_recipe_cannot_average_is_neither_gone_on_with_nor_waited_for(
    planner_of, aggregation, ranks, fits
):
    """The aggregation was changed since."""
    planner, known = planner_of(aggregation, ranks)
    expected, _ = planner.plan(2, known, dict.fromkeys(RANKS, 4))
    assert planner.suits(ranks) == fits
    assert list(planner.late(2, expected, known)) == ([1] if fits else [])
