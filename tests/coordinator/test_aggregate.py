"""The weights of the global adapter are the clients' shares of samples."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregate import Contribution, aggregate

SAMPLES = {"bob": 30, "ann": 10, "cid": 60}


@pytest.fixture
def contributions(make_update, make_offer):
    updates = {client: make_update(seed) for seed, client in enumerate(SAMPLES)}
    return {c: Contribution(make_offer(u, samples=SAMPLES[c]), u) for c, u in updates.items()}


def test_the_mean_of_factors_weighs_clients_by_their_samples(contributions):
    mean = aggregate(contributions, "mean_of_factors", 2)
    for name, array in mean.items():
        expected = sum(SAMPLES[c] / 100 * part.update.adapter[name].astype(float) for c, part in contributions.items())
        np.testing.assert_allclose(array, expected, atol=1e-6)


@pytest.mark.parametrize("rank", [2, 6])
def test_the_mean_of_products_weighs_clients_by_their_samples_and_has_the_asked_rank(contributions, rank):
    mean = aggregate(contributions, "mean_of_products", rank)
    for layer in ("layer.0", "layer.1"):
        full = sum(
            SAMPLES[c] / 100 * part.update.adapter[layer + ".lora_B"].astype(float) @ part.update.adapter[layer + ".lora_A"]
            for c, part in contributions.items()
        )
        u, s, vt = np.linalg.svd(full)
        assert mean[layer + ".lora_A"].shape == (rank, 6)
        product = mean[layer + ".lora_B"].astype(float) @ mean[layer + ".lora_A"]
        np.testing.assert_allclose(product, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-5)


def test_one_contribution_is_its_own_mean(contributions):
    alone = {"bob": contributions["bob"]}
    mean = aggregate(alone, "mean_of_factors", 2)
    for name, array in mean.items():
        assert np.array_equal(array, contributions["bob"].update.adapter[name])


def test_a_client_with_all_but_one_of_a_million_samples_decides(make_update, make_offer):
    big, small = make_update(1), make_update(2)
    mean = aggregate(
        {"a": Contribution(make_offer(big, samples=999_999), big), "b": Contribution(make_offer(small, samples=1), small)},
        "mean_of_factors",
        2,
    )
    for name, array in mean.items():
        np.testing.assert_allclose(array, big.adapter[name], atol=1e-5)
