"""Predicted memory beside measured: benchmarks/memory.py's smaller cases, each in a process of its own."""

from __future__ import annotations

import pytest

from benchmarks.memory import measure


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(
    "case",
    [
        ("vit-b-32", 4, 8, False),
        ("vit-b-32", 8, 8, False),
        ("vit-b-32", 32, 8, False),
        ("vit-b-32", 4, 8, True),
        pytest.param(("vit-l-14", 4, 1, False), marks=pytest.mark.slow),
    ],
    ids=lambda case: "-".join(map(str, case)),
)
def test_a_trainings_peak_is_within_a_fifth_of_the_prediction(case, models):
    found = measure(*case, models)
    assert 0.8 <= found["predicted / measured"] <= 1.2, found
