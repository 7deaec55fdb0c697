"""What the nouns promise beyond their fields."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages import Recipe

ranks = st.integers(1, 256)


@settings(deadline=None)
@given(ranks, ranks, st.floats(1e-6, 1e6))
def test_a_recipe_at_another_rank_keeps_alpha_over_rank_and_all_else(rank, other, alpha):
    recipe = Recipe(rank=rank, alpha=alpha, projections=("v_proj",), first_block=2, local_steps=3, mu=0.3)
    moved = recipe.at_rank(other)
    assert moved.rank == other
    assert moved.alpha / moved.rank == pytest.approx(alpha / rank, rel=1e-12)
    assert moved.model_dump(exclude={"rank", "alpha"}) == recipe.model_dump(exclude={"rank", "alpha"})
    assert (recipe.rank, recipe.alpha) == (rank, alpha)


@settings(deadline=None)
@given(ranks, st.floats(1e-6, 1e6))
def test_a_recipe_at_its_own_rank_is_itself_to_the_last_bit(rank, alpha):
    recipe = Recipe(rank=rank, alpha=alpha)
    assert recipe.at_rank(rank) == recipe
