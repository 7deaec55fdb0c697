"""The algebra of factors against naive twins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from clip_lora.algebra import Adapter, delta, layers, mean_of_factors, mean_of_products, rank_of
from protocol.codec import encode_adapter

LAYERS = ("block.0.q_proj", "block.1.v_proj")


def random_factors(width: int, rank: int, seed: int, out: int | None = None) -> Adapter:
    rng = np.random.default_rng(seed)
    adapter: Adapter = {}
    for layer in LAYERS:
        adapter[layer + ".lora_A"] = rng.normal(size=(rank, width)).astype(np.float32)
        adapter[layer + ".lora_B"] = rng.normal(size=(out or width, rank)).astype(np.float32)
    return adapter


def product(adapter: Adapter, layer: str) -> NDArray[np.float64]:
    """The naive twin of B A: three loops."""
    a, b = adapter[layer + ".lora_A"], adapter[layer + ".lora_B"]
    result = np.zeros((b.shape[0], a.shape[1]))
    for row in range(b.shape[0]):
        for column in range(a.shape[1]):
            for inner in range(a.shape[0]):
                result[row, column] += float(b[row, inner]) * float(a[inner, column])
    return result


def best_part(adapters: list[Adapter], weights: list[float], layer: str, rank: int) -> NDArray[np.float64]:
    """The naive twin of mean_of_products: the full d x d mean, then numpy's SVD."""
    total = sum(weights)
    mean = sum(w / total * product(a, layer) for a, w in zip(adapters, weights, strict=True))
    u, s, vt = np.linalg.svd(np.asarray(mean))
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def test_delta_is_the_scaled_product_of_the_factors():
    adapter = random_factors(width=7, rank=3, seed=0)
    for layer in LAYERS:
        np.testing.assert_allclose(delta(adapter, layer, 2.5), 2.5 * product(adapter, layer), rtol=1e-12, atol=1e-12)


def test_layers_are_named_sorted_and_once():
    assert layers(dict(reversed(random_factors(4, 2, 0).items()))) == sorted(LAYERS)


def test_a_factor_without_its_twin_is_refused():
    adapter = random_factors(4, 2, 0)
    del adapter[LAYERS[0] + ".lora_B"]
    with pytest.raises(ValueError, match=LAYERS[0]):
        layers(adapter)


@settings(deadline=None, max_examples=30)
@given(weights=st.lists(st.integers(0, 1000), min_size=1, max_size=5).filter(any))
def test_mean_of_factors_equals_a_for_loop(weights):
    adapters = [random_factors(5, 2, seed) for seed in range(len(weights))]
    mean = mean_of_factors(adapters, weights)
    assert mean.keys() == adapters[0].keys()
    for name, array in mean.items():
        for index in np.ndindex(array.shape):
            expected = sum(w * float(a[name][index]) for a, w in zip(adapters, weights, strict=True)) / sum(weights)
            assert array[index] == pytest.approx(expected, rel=1e-6, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    rank=st.integers(1, 6),
    weights=st.lists(st.integers(1, 50), min_size=4, max_size=4),
)
def test_mean_of_products_equals_the_svd_of_the_full_mean_for_clients_of_different_ranks(ranks, rank, weights):
    adapters = [random_factors(8, r, seed) for seed, r in enumerate(ranks)]
    used = [float(w) for w in weights[: len(ranks)]]
    mean = mean_of_products(adapters, used, rank)
    for layer in LAYERS:
        assert mean[layer + ".lora_A"].shape == (rank, 8)
        assert mean[layer + ".lora_B"].shape == (8, rank)
        np.testing.assert_allclose(delta(mean, layer, 1.0), best_part(adapters, used, layer, rank), atol=2e-5)


def test_mean_of_products_of_one_client_is_that_client():
    adapter = random_factors(9, 3, 1)
    mean = mean_of_products([adapter], [17.0], rank=3)
    for layer in LAYERS:
        np.testing.assert_allclose(delta(mean, layer, 1.0), delta(adapter, layer, 1.0), atol=1e-5)


def test_a_rank_above_the_sum_of_ranks_pads_with_directions_that_carry_nothing_and_loses_nothing():
    adapters = [random_factors(12, 2, seed) for seed in range(2)]
    mean = mean_of_products(adapters, [1.0, 3.0], rank=7)
    for layer in LAYERS:
        np.testing.assert_allclose(delta(mean, layer, 1.0), best_part(adapters, [1.0, 3.0], layer, 12), atol=1e-5)
        assert not mean[layer + ".lora_B"][:, 4:].any()
        spare = mean[layer + ".lora_A"][4:]
        assert np.abs(spare).max() <= 1 / np.sqrt(12)
        assert np.linalg.matrix_rank(spare) == 3, "directions that equal each other learn the same"
        assert np.abs(mean[layer + ".lora_B"][:, :4]).max(axis=0).all()


def test_directions_that_carry_nothing_can_be_trained():
    """The gradient of a loss by B is G A^T: nothing flows into a direction whose A is 0."""
    untrained = random_factors(6, 2, 0)
    for layer in LAYERS:
        untrained[layer + ".lora_B"][:] = 0.0
    for adapter, kept in ((untrained, 0), (random_factors(6, 2, 0), 2)):
        mean = mean_of_products([adapter], [1.0], rank=5)
        for layer in LAYERS:
            gradient = np.random.default_rng(3).normal(size=(6, 6)) @ mean[layer + ".lora_A"].T
            assert (np.linalg.norm(gradient, axis=0) > 0.01).all()
            assert not mean[layer + ".lora_B"][:, kept:].any()
            assert np.linalg.matrix_rank(mean[layer + ".lora_A"]) == 5


def test_a_direction_at_the_level_of_rounding_is_dropped_and_one_above_it_is_kept():
    for size, kept in ((1e-6, 2), (1e-20, 1)):
        adapter = {layer + ".lora_A": np.eye(2, 4, dtype=np.float32) for layer in LAYERS}
        adapter |= {layer + ".lora_B": np.diag([1.0, size, 0, 0]).astype(np.float32)[:, :2] for layer in LAYERS}
        mean = mean_of_products([adapter], [1.0], rank=2)
        for layer in LAYERS:
            assert np.count_nonzero(mean[layer + ".lora_B"].any(axis=0)) == kept


def test_the_rank_of_an_adapter_is_that_of_all_its_layers():
    assert rank_of(random_factors(5, 3, 0)) == 3
    assert rank_of({}) == 0
    mixed = random_factors(5, 3, 0) | {name: a for name, a in random_factors(5, 2, 0).items() if name.startswith(LAYERS[0])}
    with pytest.raises(ValueError, match=r"mixes ranks \[2, 3\]"):
        rank_of(mixed)


def test_a_sum_of_ranks_above_the_width_keeps_the_exact_mean():
    adapters = [random_factors(4, 3, seed) for seed in range(3)]
    mean = mean_of_products(adapters, [1.0, 1.0, 1.0], rank=4)
    for layer in LAYERS:
        np.testing.assert_allclose(delta(mean, layer, 1.0), best_part(adapters, [1.0] * 3, layer, 4), atol=1e-5)


@pytest.mark.parametrize(("out", "width"), [(3, 9), (9, 3)], ids=["wide", "tall"])
def test_a_sum_of_ranks_above_one_side_of_a_rectangular_layer_keeps_the_exact_mean(out, width):
    adapters = [random_factors(width, 4, seed, out) for seed in range(2)]
    mean = mean_of_products(adapters, [1.0, 1.0], rank=3)
    for layer in LAYERS:
        np.testing.assert_allclose(delta(mean, layer, 1.0), best_part(adapters, [1.0] * 2, layer, 3), atol=1e-5)


def test_initial_adapters_with_b_zero_average_to_no_change_in_both_algebras():
    adapters = [random_factors(6, 2, seed) for seed in range(3)]
    for adapter in adapters:
        for layer in LAYERS:
            adapter[layer + ".lora_B"][:] = 0.0
    for mean in (mean_of_factors(adapters, [1, 2, 3]), mean_of_products(adapters, [1, 2, 3], 2)):
        for layer in LAYERS:
            assert not delta(mean, layer, 1.0).any()


def test_the_two_algebras_differ_where_clients_disagree():
    adapters = [random_factors(6, 2, seed) for seed in range(2)]
    factors, products = mean_of_factors(adapters, [1, 1]), mean_of_products(adapters, [1, 1], 4)
    gap = np.abs(delta(factors, LAYERS[0], 1.0) - delta(products, LAYERS[0], 1.0)).max()
    assert gap > 0.1


@pytest.mark.parametrize("mean", [mean_of_factors, lambda a, w: mean_of_products(a, w, 3)], ids=["factors", "products"])
def test_equal_inputs_give_equal_bits_and_leave_the_inputs_alone(mean):
    adapters = [random_factors(10, 2, seed) for seed in range(4)]
    before = [encode_adapter(adapter) for adapter in adapters]
    first = mean(adapters, [3, 1, 4, 1])
    second = mean([{name: array.copy() for name, array in a.items()} for a in adapters], [3, 1, 4, 1])
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert all(array.dtype == np.float32 for array in first.values())
    assert [encode_adapter(adapter) for adapter in adapters] == before


@pytest.mark.parametrize("mean", [mean_of_factors, lambda a, w: mean_of_products(a, w, 2)], ids=["factors", "products"])
@pytest.mark.parametrize("weights", [[0.0, 0.0], [0, 0]])
def test_weights_that_are_all_zero_are_refused(mean, weights):
    with pytest.raises(ValueError, match="positive weight"):
        mean([random_factors(4, 2, 0), random_factors(4, 2, 1)], weights)


@pytest.mark.parametrize("mean", [mean_of_factors, lambda a, w: mean_of_products(a, w, 2)], ids=["factors", "products"])
def test_more_weights_than_adapters_are_refused(mean):
    with pytest.raises(ValueError, match="zip"):
        mean([random_factors(4, 2, 0)], [1.0, 2.0])


@pytest.mark.parametrize("weights", [[2.0, -1.0], [1.0, float("nan")]], ids=["negative", "nan"])
def test_a_negative_or_nan_weight_is_refused(weights):
    with pytest.raises(ValueError, match="weight"):
        mean_of_factors([random_factors(4, 2, 0), random_factors(4, 2, 1)], weights)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)], ids=["one", "three"])
def test_a_product_of_zero_stays_zero_at_any_rank_and_its_a_stays_alive(rank, seeds):
    # As a client of another rank gets round 0's adapter.
    untrained = [{n: f * np.float32(n.endswith("A")) for n, f in random_factors(9, 2, seed).items()} for seed in seeds]
    mean = mean_of_products(untrained, [1.0] * len(seeds), rank)
    for layer in LAYERS:
        assert mean[layer + ".lora_A"].shape == (rank, 9)
        assert not mean[layer + ".lora_B"].any()
        assert not delta(mean, layer, 1.0).any()
        assert (np.linalg.norm(mean[layer + ".lora_A"], axis=1) > 0.01).all()
    assert encode_adapter(mean) == encode_adapter(mean_of_products(untrained, [1.0] * len(seeds), rank))


@pytest.mark.parametrize(("one", "other"), [((4, 4), (4, 1)), ((4, 1), (4, 4)), ((4, 4), (4, 2)), ((5, 2), (1, 2))])
def test_factors_of_unequal_shapes_have_no_mean(one, other):
    """Numpy would stretch what is 1 wide, without a word."""
    with pytest.raises(ValueError, match="factors of other shapes"):
        mean_of_factors([random_factors(*one, 0), random_factors(*other, 1)], [1, 1])
