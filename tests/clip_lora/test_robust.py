"""Sizes, distances and robust averages against naive twins, and against byzfl where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_lora.algebra import A, B, delta
from clip_lora.robust import (
    factor_norm,
    median_of_factors,
    multi_krum,
    product_distances,
    product_norm,
    trimmed_mean_of_factors,
)

LAYERS = ("block.0.q_proj", "block.1.v_proj")


def random_adapter(seed, rank=2, width=9, out=5, size=1.0):
    rng = np.random.default_rng(seed)
    adapter = {}
    for layer in LAYERS:
        adapter[layer + A] = rng.normal(size=(rank, width)).astype(np.float32)
        adapter[layer + B] = (size * rng.normal(size=(out, rank))).astype(np.float32)
    return adapter


def flat(adapter):
    """All products B A of an adapter as one vector, formed as they never are outside of tests."""
    return np.concatenate([delta(adapter, layer, 1.0).ravel() for layer in LAYERS])


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_the_norm_of_the_product_is_that_of_the_whole_matrix(rank):
    adapter = random_adapter(rank, rank)
    assert product_norm(adapter) == pytest.approx(np.linalg.norm(flat(adapter)), rel=1e-12)


def test_the_norm_does_not_see_how_a_product_is_shared_out_among_its_factors():
    adapter = random_adapter(1)
    other = {name: factor * np.float32(1024.0 if name.endswith(A) else 1 / 1024) for name, factor in adapter.items()}
    assert product_norm(other) == pytest.approx(product_norm(adapter), rel=1e-9)
    assert factor_norm(other, A) == pytest.approx(1024 * factor_norm(adapter, A), rel=1e-9)


@pytest.mark.parametrize("end", [A, B])
def test_the_norm_of_factors_is_that_of_all_their_numbers(end):
    adapter = random_adapter(3)
    numbers = np.concatenate([adapter[layer + end].ravel() for layer in LAYERS]).astype(float)
    assert factor_norm(adapter, end) == pytest.approx(np.linalg.norm(numbers), rel=1e-12)


def test_the_norm_of_the_largest_values_that_travel_is_finite():
    adapter = {name: np.full_like(factor, 65504.0) for name, factor in random_adapter(0, 64, 512, 512).items()}
    assert np.isfinite(product_norm(adapter))


@pytest.mark.parametrize("ranks", [(2, 2, 2, 2), (1, 3, 2, 5)], ids=["equal", "mixed"])
def test_distances_are_those_of_the_whole_matrices(ranks):
    adapters = [random_adapter(seed, rank) for seed, rank in enumerate(ranks)]
    distances = product_distances(adapters)
    for i, one in enumerate(adapters):
        for j, other in enumerate(adapters):
            assert distances[i, j] == pytest.approx(((flat(one) - flat(other)) ** 2).sum(), rel=1e-9, abs=1e-9)


def test_the_median_is_that_of_every_number_apart():
    for count in (1, 2, 5, 6):
        adapters = [random_adapter(seed) for seed in range(count)]
        median = median_of_factors(adapters)
        for name, factor in median.items():
            for index in np.ndindex(factor.shape):
                values = sorted(float(adapter[name][index]) for adapter in adapters)
                middle = (values[(count - 1) // 2] + values[count // 2]) / 2
                assert factor[index] == pytest.approx(middle, rel=1e-6)


@settings(deadline=None, max_examples=20)
@given(count=st.integers(1, 8), trimmed=st.integers(0, 3))
def test_the_trimmed_mean_leaves_out_so_many_at_each_end_of_every_number(count, trimmed):
    adapters = [random_adapter(seed) for seed in range(count)]
    if 2 * trimmed >= count:
        with pytest.raises(ValueError, match="cannot be left out"):
            trimmed_mean_of_factors(adapters, trimmed)
        return
    mean = trimmed_mean_of_factors(adapters, trimmed)
    for name, factor in mean.items():
        for index in np.ndindex(factor.shape):
            values = sorted(float(adapter[name][index]) for adapter in adapters)[trimmed : count - trimmed]
            assert factor[index] == pytest.approx(sum(values) / len(values), rel=1e-5, abs=1e-6)


def naive_krum(adapters, malicious):
    """By for-loops over whole matrices."""
    n = len(adapters)
    scores = []
    for one in adapters:
        others = sorted(float(((flat(one) - flat(other)) ** 2).sum()) for other in adapters)
        scores.append(sum(others[: n - malicious]))
    return sorted(sorted(range(n), key=lambda i: (scores[i], i))[: n - malicious])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), malicious=st.integers(0, 3), more=st.integers(0, 4))
def test_multi_krum_chooses_those_that_are_nearest_to_most(seed, malicious, more):
    n = 2 * malicious + 3 + more
    adapters = [random_adapter(100 * seed + k, size=1 + k % 3) for k in range(n)]
    assert multi_krum(product_distances(adapters), malicious) == naive_krum(adapters, malicious)


def test_multi_krum_leaves_out_who_is_far_away_and_refuses_too_few():
    adapters = [random_adapter(0, size=1 + k / 100) for k in range(7)]
    for bad in (2, 5):
        adapters[bad] = random_adapter(bad, size=50.0)
    assert multi_krum(product_distances(adapters), 2) == [0, 1, 3, 4, 6]
    with pytest.raises(ValueError, match="needs at least 7"):
        multi_krum(product_distances(adapters[:6]), 2)


def test_of_equal_adapters_multi_krum_takes_the_first():
    assert multi_krum(product_distances([random_adapter(0)] * 6), 1) == [0, 1, 2, 3, 4]


@pytest.fixture
def byzfl(monkeypatch):
    """byzfl's aggregators alone: its front page imports torchvision, which is not needed for them."""
    spec = importlib.util.find_spec("byzfl")
    if spec is None:
        pytest.skip("byzfl is not installed: pip install --no-deps byzfl")
    package = types.ModuleType("byzfl")
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "byzfl", package)
    yield importlib.import_module("byzfl.aggregators")
    for name in [name for name in sys.modules if name.startswith("byzfl")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("count", [5, 8])
@pytest.mark.parametrize("malicious", [0, 1])
def test_byzfl_says_the_same(byzfl, count, malicious):
    # With equal A = I, B is the product: what byzfl does to vectors is what we do to factors.
    adapters = [
        {layer + A: np.eye(6, dtype=np.float32) for layer in LAYERS}
        | {layer + B: random_adapter(k, 6, 6, 6)[layer + B] for layer in LAYERS}
        for k in range(count)
    ]
    vectors = np.stack([flat(adapter) for adapter in adapters])
    np.testing.assert_allclose(flat(median_of_factors(adapters)), byzfl.Median()(vectors), atol=1e-6)
    trimmed = trimmed_mean_of_factors(adapters, malicious)
    np.testing.assert_allclose(flat(trimmed), byzfl.TrMean(malicious)(vectors), atol=1e-6)
    chosen = multi_krum(product_distances(adapters), malicious)
    np.testing.assert_allclose(vectors[chosen].mean(axis=0), byzfl.MultiKrum(malicious)(vectors), atol=1e-6)
