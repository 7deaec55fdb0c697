"""What the text side learns from: all features, whatever the others left empty."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregate import Contribution
from coordinator.recipe import TextTraining
from coordinator.text_samples import TextSamples

NOTHING = {"labels": np.zeros(0, np.int32)}
NO_PROTOTYPES = {
    "prototype_classes": np.zeros(0, np.int32),
    "prototype_counts": np.zeros(0, np.int32),
    "prototype_correct": np.zeros(0, np.int32),
}


@pytest.mark.parametrize("width", [0, 3, 8, 9999])
def test_an_empty_array_may_have_any_width(make_update, make_offer, width):
    empty = np.zeros((0, width), np.float32)
    full = make_update(1)
    bare = make_update(2, features=empty, prototypes=empty, **NOTHING, **NO_PROTOTYPES)
    parts = {name: Contribution(make_offer(update), update) for name, update in (("ann", full), ("bob", bare))}
    alone = TextSamples.gather({"ann": parts["ann"]}, TextTraining())
    both = TextSamples.gather(parts, TextTraining())
    assert np.array_equal(both.features, alone.features)
    assert np.array_equal(both.labels, alone.labels)
    assert len(TextSamples.gather({"bob": parts["bob"]}, TextTraining())) == 0
