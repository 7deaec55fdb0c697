"""The weights of the global adapter are the clients' shares of samples."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregate import Choice, Contribution, aggregate, choose

SAMPLES = {"bob": 30, "ann": 10, "cid": 60}
CURRENT = {"layer.0.lora_A": np.full((2, 6), 1e3, np.float32)}  # the round's own start, of which a mean holds no trace


@pytest.fixture
def contributions(make_update, make_offer):
    updates = {client: make_update(seed) for seed, client in enumerate(SAMPLES)}
    return {c: Contribution(make_offer(u, samples=SAMPLES[c]), u) for c, u in updates.items()}


def test_the_mean_of_factors_weighs_clients_by_their_samples(contributions):
    mean = aggregate(contributions, "mean_of_factors", 2, CURRENT)
    for name, array in mean.items():
        expected = sum(SAMPLES[c] / 100 * part.update.adapter[name].astype(float) for c, part in contributions.items())
        np.testing.assert_allclose(array, expected, atol=1e-6)


@pytest.mark.parametrize("rank", [2, 6])
def test_the_mean_of_products_weighs_clients_by_their_samples_and_has_the_asked_rank(contributions, rank):
    mean = aggregate(contributions, "mean_of_products", rank, CURRENT)
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
    mean = aggregate(alone, "mean_of_factors", 2, CURRENT)
    for name, array in mean.items():
        assert np.array_equal(array, contributions["bob"].update.adapter[name])


def test_a_client_with_all_but_one_of_a_million_samples_decides(make_update, make_offer):
    big, small = make_update(1), make_update(2)
    mean = aggregate(
        {"a": Contribution(make_offer(big, samples=999_999), big), "b": Contribution(make_offer(small, samples=1), small)},
        "mean_of_factors",
        2,
        CURRENT,
    )
    for name, array in mean.items():
        np.testing.assert_allclose(array, big.adapter[name], atol=1e-5)


def test_without_aggregation_the_global_adapter_stays_as_it_is(contributions):
    kept = aggregate(contributions, "none", 2, CURRENT)
    assert kept.keys() == CURRENT.keys()
    assert all(kept[name].tobytes() == array.tobytes() for name, array in CURRENT.items())


def test_the_mean_of_products_takes_clients_of_different_ranks(contributions, make_update, make_offer):
    shapes = {"lora_A": (1, 6), "lora_B": (6, 1)}
    rng = np.random.default_rng(8)
    narrow = make_update(
        8,
        adapter={
            f"layer.{block}.{factor}": rng.normal(size=shape).astype(np.float32)
            for block in (0, 1)
            for factor, shape in shapes.items()
        },
    )
    mixed = {"ann": contributions["ann"], "eve": Contribution(make_offer(narrow, samples=30), narrow)}
    mean = aggregate(mixed, "mean_of_products", 3, CURRENT)
    for layer in ("layer.0", "layer.1"):
        full = sum(
            share * part.update.adapter[layer + ".lora_B"].astype(float) @ part.update.adapter[layer + ".lora_A"]
            for share, part in ((0.25, mixed["ann"]), (0.75, mixed["eve"]))
        )
        product = mean[layer + ".lora_B"].astype(float) @ mean[layer + ".lora_A"]
        np.testing.assert_allclose(product, full, atol=1e-5)


@pytest.fixture
def seven(make_update, make_offer):
    """Seven clients that are alike but for the second, which is far away and says most."""
    updates = {f"client-{k}": make_update(0) for k in range(7)}
    updates["client-1"] = make_update(1, adapter={name: 30 * a for name, a in make_update(1).adapter.items()})
    samples = {client: 60 if client == "client-1" else 6 for client in updates}
    return {client: Contribution(make_offer(u, samples=samples[client]), u) for client, u in updates.items()}


@pytest.mark.parametrize("method", ["median", "trimmed_mean"])
def test_robust_averages_do_not_ask_how_many_samples_a_client_says_it_has(seven, method):
    mean = aggregate(seven, method, 2, CURRENT, malicious=1)
    for name, factor in mean.items():
        np.testing.assert_allclose(factor, seven["client-0"].update.adapter[name], rtol=1e-6)


def test_multi_krum_leaves_out_the_farthest_and_the_others_are_averaged_by_samples(seven):
    assert choose(seven, "multi_krum", 1) == Choice("mean_of_factors", ("client-1",))
    assert choose(dict(reversed(seven.items())), "multi_krum", 1) == Choice("mean_of_factors", ("client-1",))


def test_multi_krum_with_too_few_updates_says_so_and_takes_the_mean_of_all(seven):
    choice = choose(seven, "multi_krum", 3)
    assert (choice.method, choice.left_out) == ("mean_of_factors", ())
    assert choice.note == "multi_krum against 3 needs 9 updates, here are 7: mean of all"


@pytest.mark.parametrize("method", ["mean_of_factors", "mean_of_products", "median", "trimmed_mean", "none"])
def test_every_other_method_takes_all(seven, method):
    assert choose(seven, method, 1) == Choice(method)
