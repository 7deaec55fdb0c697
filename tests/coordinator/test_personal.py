"""Each client's own adapter against naive twins: for-loops over factors, and the SVD of the full mean product."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_lora.algebra import Adapter
from coordinator.aggregate import Contribution, aggregate
from coordinator.personal import at_rank, below, personalise
from coordinator.query import Holder, attention
from coordinator.recipe import FederationRecipe
from protocol.codec import reference
from protocol.messages import Offer, Update

BLOCKS, SIDE, WIDTH, CLASSES = 4, 12, 6, 3
LAYERS = [f"vision_model.encoder.layers.{b}.self_attn.{p}" for b in range(BLOCKS) for p in ("q_proj", "v_proj")]
TEXT = np.eye(CLASSES, WIDTH, dtype=np.float32)
ALGEBRAS = ["mean_of_factors", "mean_of_products"]


def random_adapter(seed, rank=2) -> Adapter:
    rng = np.random.default_rng(seed)
    adapter: Adapter = {}
    for layer in LAYERS:
        adapter[layer + ".lora_A"] = rng.normal(size=(rank, SIDE)).astype(np.float32)
        adapter[layer + ".lora_B"] = rng.normal(size=(SIDE, rank)).astype(np.float32)
    return adapter


def contribution(seed, counts, rank=2, prototypes=None):
    """What a client with {class: count} sends; prototypes lie in a narrow cone unless given as {class: direction}."""
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.normal(size=WIDTH) + 2.0 if prototypes is None else prototypes[c] for c in counts])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    numbers = np.array(list(counts.values()), np.int32)
    update = Update(
        random_adapter(seed, rank),
        rows.astype(np.float32),
        np.array(list(counts), np.int32),
        numbers,
        numbers,
        np.zeros((0, WIDTH), np.float32),
        np.zeros(0, np.int32),
    )
    offer = Offer(
        round=1,
        base="0" * 64,
        blob=reference(b"update"),
        samples=int(numbers.sum()),
        loss=1.0,
        accuracy=1.0,
        train_seconds=1.0,
        bytes_received=0,
    )
    return Contribution(offer, update)


def recipe(algebra="mean_of_factors", rank=2, **personal):
    return FederationRecipe.model_validate({"aggregation": algebra, "rank": rank, "personal": {"query": "R1", **personal}})


@pytest.fixture
def fleet():
    """Three clients with many and few samples, out of order."""
    return {"bob": contribution(1, {0: 20, 1: 10}), "ann": contribution(2, {1: 3, 2: 4}), "cid": contribution(3, {2: 60})}


@pytest.fixture
def mixed():
    """Three clients of ranks 2, 4 and 8."""
    counts = ({0: 20, 1: 10}, {1: 13, 2: 4}, {2: 25})
    return {f"rank-{2**k}": contribution(k, counts[k - 1], rank=2**k) for k in (1, 2, 3)}


def product(adapter, layer):
    return np.asarray(adapter[layer + ".lora_B"].astype(float) @ adapter[layer + ".lora_A"].astype(float))


def best(matrix, rank):
    """The best approximation of that rank: Eckart and Young."""
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def naive_factors(adapters, weights):
    """The weighted mean of every number apart."""
    mean = {}
    for name in adapters[0]:
        mean[name] = np.zeros(adapters[0][name].shape)
        for adapter, weight in zip(adapters, weights, strict=True):
            mean[name] += weight * adapter[name].astype(float)
    return mean


def naive_product(adapters, weights, layer):
    """The exact weighted mean of B A, (SIDE, SIDE)."""
    mean = np.zeros((SIDE, SIDE))
    for adapter, weight in zip(adapters, weights, strict=True):
        mean += weight * product(adapter, layer)
    return mean


def assert_same_factors(ours, expected):
    assert ours.keys() == expected.keys()
    for name, factor in expected.items():
        np.testing.assert_allclose(ours[name], factor, atol=2e-6)


def assert_blend(algebra, ours, adapters, weights, rank):
    """The result is the weighted mean of these adapters in that algebra."""
    assert {f.shape for n, f in ours.items() if n.endswith("A")} == {(rank, SIDE)}
    if algebra == "mean_of_factors":
        assert_same_factors(ours, naive_factors(adapters, weights))
    else:
        for layer in LAYERS:
            np.testing.assert_allclose(product(ours, layer), best(naive_product(adapters, weights, layer), rank), atol=2e-5)


def sent(fleet):
    return [fleet[client].update.adapter for client in sorted(fleet)]


@pytest.mark.parametrize("algebra", ALGEBRAS)
@pytest.mark.parametrize("query", ["R1", "R2", "R3"])
def test_each_client_gets_the_sum_of_all_adapters_by_its_row_of_the_attention(fleet, algebra, query):
    own, heard = personalise(fleet, recipe(algebra, query=query), TEXT, random_adapter(0))
    assert heard.clients == heard.sources == ("ann", "bob", "cid")
    assert sorted(own) == ["ann", "bob", "cid"]
    for client, row in zip(heard.clients, heard.weights.tolist(), strict=True):
        assert_blend(algebra, own[client], sent(fleet), row, 2)
    rows = heard.weights.tolist()
    assert heard.entropy == pytest.approx([-sum(p * math.log(p) for p in row if p > 0) for row in rows])


@pytest.mark.parametrize("query", ["R1", "R2", "R3"])
def test_the_attention_is_that_of_the_recipes_reading_temperature_and_class_bank(fleet, query):
    _, result = personalise(fleet, recipe(query=query, tau_q=0.35), TEXT, random_adapter(0))
    holders = [Holder.of(fleet[client].update) for client in ("ann", "bob", "cid")]
    np.testing.assert_allclose(result.weights, attention(query, holders, holders, 0.35, TEXT), atol=1e-12)


def test_attention_belongs_to_the_clients_that_sent_the_prototypes(fleet):
    # bob and eve see the same pictures, cid others.
    fleet["eve"] = Contribution(fleet["bob"].offer, fleet["bob"].update)
    _, heard = personalise(fleet, recipe(), TEXT, random_adapter(0))
    row = dict(zip(heard.sources, heard.weights[heard.clients.index("bob")], strict=True))
    assert row["eve"] == pytest.approx(row["bob"], rel=1e-9)
    assert row["eve"] > 0.4 > row["cid"]


@pytest.mark.parametrize("algebra", ALGEBRAS)
@pytest.mark.parametrize("query", ["R1", "R2"])
@pytest.mark.parametrize("clusters", [0, 2])
def test_without_a_temperature_everybody_gets_the_global_adapter(fleet, algebra, query, clusters):
    # Cluster means of the full rank lose nothing, so that two steps of averaging are one.
    rank = 6 if algebra == "mean_of_products" else 2
    how = recipe(algebra, rank, query=query, tau_q=math.inf, clusters=clusters)
    common = aggregate(fleet, algebra, 2, {})
    own, _ = personalise(fleet, how, TEXT, random_adapter(0))
    for adapter in own.values():
        if algebra == "mean_of_factors":
            assert_same_factors(adapter, common)
        for layer in LAYERS:
            np.testing.assert_allclose(product(adapter, layer), product(common, layer), atol=2e-5)


@pytest.mark.parametrize("algebra", ALGEBRAS)
@pytest.mark.parametrize("clusters", [0, 2])
@pytest.mark.parametrize("own_share", [0.0, 0.3])
def test_identity_returns_exactly_what_each_client_sent(mixed, algebra, clusters, own_share):
    how = recipe(algebra, 8, query="identity", clusters=clusters, own_share=own_share)
    own, heard = personalise(mixed, how, TEXT, random_adapter(0, 8))
    for client, adapter in own.items():
        assert adapter.keys() == mixed[client].update.adapter.keys()
        assert all(np.array_equal(adapter[name], factor) for name, factor in mixed[client].update.adapter.items())
    np.testing.assert_allclose(heard.weights, np.eye(3), atol=1e-15)
    assert heard.entropy == pytest.approx([0.0] * 3)


@pytest.mark.parametrize("algebra", ALGEBRAS)
def test_r3_among_clients_that_share_no_class_leaves_everyone_exactly_their_own(algebra):
    fleet = {name: contribution(k, {k: 10}) for k, name in enumerate(("ann", "bob", "cid"))}
    own, _ = personalise(fleet, recipe(algebra, query="R3"), TEXT, random_adapter(0))
    for client, adapter in own.items():
        assert all(np.array_equal(adapter[name], factor) for name, factor in fleet[client].update.adapter.items())


@pytest.mark.parametrize("cut", range(BLOCKS + 2))
@pytest.mark.parametrize("algebra", ALGEBRAS)
def test_blocks_below_the_cut_are_the_global_adapters_and_the_others_the_clients_own(fleet, algebra, cut):
    common = random_adapter(77)
    uncut, _ = personalise(fleet, recipe(algebra), TEXT, common)
    own, _ = personalise(fleet, recipe(algebra, cut=cut), TEXT, common)
    for client, adapter in own.items():
        assert adapter.keys() == common.keys()
        for layer in LAYERS:
            source = common if int(layer.split(".")[3]) < cut else uncut[client]
            for name in (layer + ".lora_A", layer + ".lora_B"):
                assert np.array_equal(adapter[name], source[name])


def test_a_cut_counts_blocks_and_not_letters():
    names = [f"vision_model.encoder.layers.{b}.self_attn.q_proj.lora_A" for b in (2, 9, 10, 11)]
    zero, one = ({name: np.full((1, 1), x, np.float32) for name in names} for x in (0.0, 1.0))
    assert [float(factor[0, 0]) for factor in below(10, zero, one).values()] == [0.0, 0.0, 1.0, 1.0]


def test_clients_of_different_ranks_each_get_the_best_approximation_of_their_own_rank(mixed):
    own, heard = personalise(mixed, recipe("mean_of_products", 8), TEXT, random_adapter(0, 8))
    for client, row in zip(heard.clients, heard.weights.tolist(), strict=True):
        rank = int(client.split("-")[1])
        assert_blend("mean_of_products", own[client], sent(mixed), row, rank)
        for layer in LAYERS:
            assert own[client][layer + ".lora_A"].shape == (rank, SIDE)
            assert own[client][layer + ".lora_B"].shape == (SIDE, rank)


def test_below_the_cut_a_client_of_lower_rank_gets_the_best_part_of_the_global_adapter(mixed):
    common = random_adapter(5, 8)
    own, _ = personalise(mixed, recipe("mean_of_products", 8, cut=2), TEXT, common)
    for client, adapter in own.items():
        rank = int(client.split("-")[1])
        for layer in LAYERS[:4]:
            assert adapter[layer + ".lora_A"].shape == (rank, SIDE)
            np.testing.assert_allclose(product(adapter, layer), best(product(common, layer), rank), atol=2e-5)


def test_an_adapter_at_its_own_rank_is_itself_and_at_a_higher_one_the_same_product():
    adapter = random_adapter(1, 4)
    assert at_rank(adapter, 4) is adapter
    for rank in (2, 7):
        other = at_rank(adapter, rank)
        for layer in LAYERS:
            assert other[layer + ".lora_A"].shape == (rank, SIDE)
            np.testing.assert_allclose(product(other, layer), best(product(adapter, layer), min(rank, 4)), atol=1e-5)


# Groups that nobody can mistake: the clients of a letter have the same class, near the letter's direction.
GROUPS = {"a": ["a-1", "a-2", "a-3"], "b": ["b-1", "b-2"], "c": ["c-1"]}


@pytest.fixture
def grouped():
    rng = np.random.default_rng(4)
    fleet = {}
    for c, members in enumerate(GROUPS.values()):
        centre = np.eye(WIDTH)[c] + 1.0
        for k, client in enumerate(members):
            near = {c: centre + rng.normal(0.0, 0.02, WIDTH)}
            fleet[client] = contribution((c, k), {c: 5 + 7 * k + 3 * c}, prototypes=near)
    return fleet


def cluster_means(fleet, algebra, rank):
    """The sample-weighted mean of each group's adapters, and what R1 makes of the groups for each client: all naive."""
    means, sizes, centres = [], [], []
    for members in GROUPS.values():
        counts = [int(fleet[client].update.prototype_counts[0]) for client in members]
        shares = [n / sum(counts) for n in counts]
        adapters = [fleet[client].update.adapter for client in members]
        if algebra == "mean_of_factors":
            means.append(naive_factors(adapters, shares))
        else:
            means.append({layer: best(naive_product(adapters, shares, layer), rank) for layer in LAYERS})
        centre = sum(n * fleet[client].update.prototypes[0].astype(float) for n, client in zip(counts, members, strict=True))
        centres.append(centre / np.linalg.norm(centre))
        sizes.append(sum(counts))
    mean = sum(n * u for n, u in zip(sizes, centres, strict=True)) / sum(sizes)

    def row(client, tau):
        query = fleet[client].update.prototypes[0] - mean
        raw = []
        for n, centre in zip(sizes, centres, strict=True):
            cosine = query @ (centre - mean) / np.linalg.norm(query) / np.linalg.norm(centre - mean)
            raw.append(n * math.exp(cosine / tau))
        return [x / sum(raw) for x in raw]

    return means, row


@pytest.mark.parametrize("own_share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("algebra", ALGEBRAS)
def test_with_clusters_every_client_takes_from_so_many_means_and_not_from_every_client(grouped, algebra, own_share):
    how = recipe(algebra, tau_q=0.7, clusters=3, own_share=own_share)
    own, heard = personalise(grouped, how, TEXT, random_adapter(0))
    assert heard.clients == tuple(sorted(grouped))
    assert sorted(heard.sources) == ["cluster-0", "cluster-1", "cluster-2"]
    assert heard.weights.shape == (6, 3)
    means, row = cluster_means(grouped, algebra, 2)
    for client, adapter in own.items():
        weights, sender = row(client, 0.7), grouped[client].update.adapter
        listened = heard.weights[heard.clients.index(client)]
        np.testing.assert_allclose(sorted(listened), sorted(weights), atol=1e-5)
        if algebra == "mean_of_factors":
            mixture = naive_factors(means, weights)
            expected = {name: own_share * sender[name] + (1 - own_share) * mixture[name] for name in sender}
            assert_same_factors(adapter, expected)
        else:
            for layer in LAYERS:
                part = best(sum(w * mean[layer] for w, mean in zip(weights, means, strict=True)), 2)
                part = own_share * product(sender, layer) + (1 - own_share) * part
                np.testing.assert_allclose(product(adapter, layer), best(part, 2), atol=5e-5)


def test_clients_of_a_cluster_of_one_kind_with_equal_prototypes_get_the_same_adapter(grouped):
    # a-1 and a-2 send different adapters: both get the mean, not their own.
    update = grouped["a-2"].update
    twin = Update(**{**update.__dict__, "prototypes": grouped["a-1"].update.prototypes})
    fleet = {**grouped, "a-2": Contribution(grouped["a-2"].offer, twin)}
    own, _ = personalise(fleet, recipe(clusters=3), TEXT, random_adapter(0))
    assert all(np.array_equal(own["a-1"][name], own["a-2"][name]) for name in own["a-1"])


@pytest.mark.parametrize("algebra", ALGEBRAS)
def test_as_many_clusters_as_clients_are_no_clusters(fleet, algebra):
    plain, _ = personalise(fleet, recipe(algebra), TEXT, random_adapter(0))
    clustered, _ = personalise(fleet, recipe(algebra, clusters=5), TEXT, random_adapter(0))
    for client, adapter in clustered.items():
        for layer in LAYERS:
            np.testing.assert_allclose(product(adapter, layer), product(plain[client], layer), atol=2e-5)


def test_ranks_may_differ_with_clusters_too(mixed):
    own, heard = personalise(mixed, recipe("mean_of_products", 8, clusters=2, cut=1), TEXT, random_adapter(0, 8))
    assert heard.weights.shape == (3, 2)
    for client, adapter in own.items():
        assert {f.shape for n, f in adapter.items() if n.endswith("A")} == {(int(client.split("-")[1]), SIDE)}


@pytest.mark.parametrize("algebra", ALGEBRAS)
@pytest.mark.parametrize("own_share", [0.3, 1.0])
def test_an_own_share_of_the_attention_stays_with_the_client(fleet, algebra, own_share):
    _, without = personalise(fleet, recipe(algebra), TEXT, random_adapter(0))
    own, heard = personalise(fleet, recipe(algebra, own_share=own_share), TEXT, random_adapter(0))
    for k, client in enumerate(heard.clients):
        row = [(own_share if j == k else 0.0) + (1 - own_share) * without.weights[k, j] for j in range(3)]
        assert heard.weights[k] == pytest.approx(row)
        assert_blend(algebra, own[client], sent(fleet), row, 2)


def test_a_client_that_is_called_like_a_cluster_keeps_its_own_share(fleet):
    # Names are the clients' choice.
    renamed = {f"cluster-{k}": fleet[client] for k, client in enumerate(("ann", "bob", "cid"))}
    how = recipe(own_share=1.0, clusters=3)
    own, _ = personalise(renamed, how, TEXT, random_adapter(0))
    for client, adapter in own.items():
        assert_same_factors(adapter, renamed[client].update.adapter)


@settings(deadline=None, max_examples=15)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    tau=st.sampled_from([0.1, 1.0, math.inf]),
    own_share=st.sampled_from([0.0, 0.5]),
)
def test_any_mixture_of_ranks_is_served_at_those_ranks(ranks, tau, own_share):
    fleet = {f"c{k}": contribution(k, {k % CLASSES: 10 + k, 1: 5}, rank) for k, rank in enumerate(ranks)}
    how = recipe("mean_of_products", max(ranks), tau_q=tau, own_share=own_share)
    own, heard = personalise(fleet, how, TEXT, random_adapter(0, max(ranks)))
    for k, rank in enumerate(ranks):
        assert_blend("mean_of_products", own[f"c{k}"], sent(fleet), heard.weights[k].tolist(), rank)


def test_the_order_of_the_contributions_leaves_no_trace_and_what_was_sent_is_left_alone(mixed):
    before = {client: {n: f.copy() for n, f in c.update.adapter.items()} for client, c in mixed.items()}
    how, common = recipe("mean_of_products", 8, clusters=2, cut=1, own_share=0.2), random_adapter(0, 8)
    first, _ = personalise(mixed, how, TEXT, common)
    second, _ = personalise(dict(reversed(mixed.items())), how, TEXT, common)
    for client, adapter in first.items():
        assert all(factor.tobytes() == second[client][name].tobytes() for name, factor in adapter.items())
        assert all(np.array_equal(mixed[client].update.adapter[n], f) for n, f in before[client].items())
