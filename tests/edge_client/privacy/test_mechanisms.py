"""What the two mechanisms compute before their noise: against loops, and how far one picture can move it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from edge_client.privacy.budget import Budget
from edge_client.privacy.mechanisms import (
    PROTOTYPE_SENSITIVITY,
    adapter_sensitivity,
    class_sums,
    clipped_change,
    moved,
    prototypes_of,
)
from protocol.messages import Privacy

SHAPES = {"x.lora_A": (2, 5), "x.lora_B": (3, 2), "y.lora_A": (2, 4), "y.lora_B": (4, 2)}
NAMES = sorted(SHAPES)
seeds = st.integers(0, 2**32)


def adapter(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def unit_rows(seed, rows, width=6):
    array = np.random.default_rng(seed).normal(size=(rows, width))
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)


@given(seeds, st.sampled_from([1e-3, 0.1, 1.0, 100.0]), st.sampled_from([1e-6, 0.01, 1.0, 1e6]))
def test_a_change_is_clipped_as_one_vector_over_all_factors(seed, clip, scale):
    start, trained = adapter(seed), adapter(seed + 1, scale)
    numbers = []
    for name in NAMES:
        for one, other in zip(trained[name].ravel().tolist(), start[name].ravel().tolist(), strict=True):
            numbers.append(one - other)
    norm = math.sqrt(sum(number * number for number in numbers))
    expected = [number * min(1.0, clip / norm) for number in numbers]
    change = clipped_change(start, trained, reversed(NAMES), clip)
    np.testing.assert_allclose(change, expected, rtol=1e-12)
    assert math.sqrt(math.fsum(change**2)) <= clip * (1 + 1e-12)


@given(seeds, seeds, st.sampled_from([0.01, 1.0, 10.0]))
def test_no_two_trainings_are_farther_apart_than_the_sensitivity(one, other, clip):
    start = adapter(0)
    apart = clipped_change(start, adapter(one, 100.0), NAMES, clip) - clipped_change(
        start, adapter(other, 100.0), NAMES, clip
    )
    assert np.linalg.norm(apart) <= adapter_sensitivity(clip) * (1 + 1e-12)


def test_opposite_trainings_are_as_far_apart_as_the_sensitivity():
    start = adapter(0)
    there, back = ({name: start[name] + sign * 1000 for name in NAMES} for sign in (1, -1))
    apart = clipped_change(start, there, NAMES, 3.0) - clipped_change(start, back, NAMES, 3.0)
    assert np.linalg.norm(apart) == pytest.approx(adapter_sensitivity(3.0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_training_that_diverged_counts_as_none(value):
    trained = adapter(1)
    trained["y.lora_A"][0, 0] = value
    assert not clipped_change(adapter(0), trained, NAMES, 1.0).any()


def test_a_training_that_changed_nothing_changes_nothing():
    assert not clipped_change(adapter(0), adapter(0), NAMES, 1.0).any()


@given(seeds, st.sets(st.sampled_from(NAMES)))
def test_only_the_factors_that_are_trained_move(seed, names):
    start = adapter(seed)
    change = clipped_change(start, adapter(seed + 1), names, 1e9)
    assert len(change) == sum(math.prod(SHAPES[name]) for name in names)
    after = moved(start, change, names)
    assert after.keys() == start.keys()
    for name in NAMES:
        np.testing.assert_allclose(after[name], adapter(seed + 1)[name] if name in names else start[name], atol=1e-6)
        assert name in names or after[name] is start[name]


def test_sums_and_numbers_by_class_are_those_of_a_loop():
    features, labels = unit_rows(0, 20), np.random.default_rng(1).integers(0, 3, 20).astype(np.int32)
    sums = class_sums(features, labels, 5)
    assert sums.shape == (5, 7)
    for c in range(5):
        total, number = np.zeros(6), 0
        for row, label in zip(features, labels, strict=True):
            if label == c:
                total += row.astype(np.float64) / np.linalg.norm(row.astype(np.float64))
                number += 1
        np.testing.assert_allclose(sums[c], [*total, number], atol=1e-12)


@given(seeds, st.integers(0, 12), st.integers(0, 12), st.sampled_from([1.0, 1e-3, 1e3, np.nan, np.inf, 0.0]))
def test_one_picture_more_moves_the_sums_by_no_more_than_the_sensitivity(seed, pictures, place, length):
    """Also one whose feature is not of unit length, or no number."""
    features = unit_rows(seed, pictures + 1) * np.float32(1.0)
    features[min(place, pictures)] *= np.float32(length)
    labels = np.random.default_rng(seed).integers(0, 4, pictures + 1).astype(np.int32)
    fewer = np.delete(np.arange(pictures + 1), min(place, pictures))
    apart = class_sums(features, labels, 4) - class_sums(features[fewer], labels[fewer], 4)
    assert np.isfinite(apart).all()
    assert np.linalg.norm(apart) <= PROTOTYPE_SENSITIVITY * (1 + 1e-9)


def test_prototypes_are_unit_sums_of_the_classes_whose_number_reaches_the_least():
    noisy = np.array([[3.0, 4.0, 4.4], [0.0, -2.0, 4.5], [1.0, 1.0, 1e12], [5.0, 0.0, -3.0], [0.0, 0.0, 5.51]])
    prototypes, classes, counts = prototypes_of(noisy, 5)
    assert (classes.tolist(), counts.tolist()) == ([2, 4], [2**31 - 1, 6])
    np.testing.assert_allclose(prototypes, [[math.sqrt(0.5)] * 2, [0.0, 0.0]], atol=1e-6)
    assert prototypes_of(noisy, 4)[1].tolist() == [0, 1, 2, 4]
    none, classes, counts = prototypes_of(noisy[:1], 6)
    assert (none.shape, none.dtype, classes.dtype, counts.dtype) == ((0, 2), np.float32, np.int32, np.int32)


@settings(deadline=None)
@given(st.sampled_from([0.5, 2.0]), st.sampled_from([0.01, 3.0]))
def test_noise_is_normal_with_the_multiplier_times_the_sensitivity_on_every_entry(multiplier, sensitivity):
    """5,000 devices with the same clean result: each entry's mean and variance over them."""
    privacy = Privacy(clip=1.0, noise_multiplier=multiplier, delta=1e-5, epsilon=1e9)
    clean, devices = np.array([[0.5, -2.0], [0.0, 7.0]]), 5000
    draws = np.stack(
        [
            Budget(secret=number.to_bytes(32, "big")).noised(privacy, "a" * 64, "prototypes", clean, sensitivity)
            for number in range(devices)
        ]
    )
    std = multiplier * sensitivity
    assert np.all(np.abs(draws.mean(axis=0) - clean) < 5 * std / math.sqrt(devices))
    assert np.all(np.abs(draws.var(axis=0) / std**2 - 1) < 5 * math.sqrt(2 / devices))
    together = np.corrcoef(((draws - clean) / std).reshape(devices, 4).T)
    assert np.all(np.abs(together - np.eye(4)) < 5 / math.sqrt(devices))


def test_a_class_that_a_device_lacks_is_not_told_from_one_that_it_has_by_presence_alone():
    """How often a class of 0, 1, 5 and 9 pictures has a prototype, over 4,000 devices, is what normal noise makes of it."""
    privacy, devices, least = Privacy(clip=1.0, noise_multiplier=3.0, delta=1e-5, epsilon=1e9), 4000, 5
    held = np.array([0, 1, 5, 9])
    clean = class_sums(unit_rows(0, held.sum()), np.repeat(np.arange(4), held).astype(np.int32), 4)
    seen = np.zeros(4)
    for number in range(devices):
        budget = Budget(secret=number.to_bytes(32, "big"))
        noisy = budget.noised(privacy, "a" * 64, "prototypes", clean, PROTOTYPE_SENSITIVITY)
        prototypes, classes, counts = prototypes_of(noisy, least)
        assert np.all(counts >= least)
        np.testing.assert_allclose(np.linalg.norm(prototypes, axis=1), 1.0, atol=1e-5)
        seen[classes] += 1
    expected = stats.norm.sf((least - 0.5 - held) / (3.0 * math.sqrt(2)))
    assert np.all(np.abs(seen / devices - expected) < 4 * np.sqrt(expected * (1 - expected) / devices))
    assert seen[0] > 0.1 * devices
    assert seen[2] < 0.9 * devices
