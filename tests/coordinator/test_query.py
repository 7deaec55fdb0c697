"""Who listens to whom, against naive twins in plain loops, written from docs/method.md, step 6."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from coordinator.query import Holder, attention, cluster, entropy, keep_share, mean_prototype, queries, together
from protocol.messages import Update

CLASSES, WIDTH = 4, 6
TAUS = [0.07, 0.1, 1.0, math.inf]
TEXT = np.random.default_rng(99).normal(size=(CLASSES, WIDTH)).astype(np.float32)
TEXT /= np.linalg.norm(TEXT, axis=1, keepdims=True)


def direction(rng, width=WIDTH):
    """A unit vector in a cone, as CLIP's features are."""
    vector = rng.normal(size=width) + 2.0
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def holding(table):
    """The holder of {class: (count, prototype)}."""
    counts, prototypes = zip(*table.values(), strict=True)
    return Holder(np.stack(prototypes), np.array(list(table), np.int32), np.array(counts, np.int32))


def random_holder(counts, seed):
    rng = np.random.default_rng(seed)
    return holding({c: (n, direction(rng)) for c, n in counts.items()})


@st.composite
def fleets(draw, least=1, most=5):
    """Holders with any classes in any order, in a narrow cone."""
    held = st.dictionaries(st.integers(0, CLASSES - 1), st.integers(1, 500), min_size=1)
    seed = draw(st.integers(0, 2**31))
    return [random_holder(counts, (seed, k)) for k, counts in enumerate(draw(st.lists(held, min_size=least, max_size=most)))]


# The naive twins: no arrays, no softmax with logarithms, only sums as in the specification.


def table_of(holder):
    rows = zip(holder.classes.tolist(), holder.counts.tolist(), holder.prototypes.tolist(), strict=True)
    return {c: (n, u) for c, n, u in rows}


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(v):
    return [x / math.sqrt(dot(v, v)) for x in v]


def samples_of(holder):
    return sum(n for n, _ in table_of(holder).values())


def naive_mean(holders):
    total = [0.0] * WIDTH
    for holder in holders:
        for n, u in table_of(holder).values():
            total = [t + n * x for t, x in zip(total, u, strict=True)]
    return [t / sum(samples_of(h) for h in holders) for t in total]


def naive_query(holder, mean):
    q = [0.0] * WIDTH
    for n, u in table_of(holder).values():
        q = [x + n / samples_of(holder) * (a - b) for x, a, b in zip(q, u, mean, strict=True)]
    return unit(q)


def shares(scores, sizes, tau):
    """softmax(score / tau + log size) is size * exp(score / tau) over their sum."""
    raw = [size * math.exp(score / tau) for score, size in zip(scores, sizes, strict=True)]
    return [x / sum(raw) for x in raw]


def naive_r1(askers, sources, tau):
    mean = naive_mean(sources)
    sizes = [samples_of(s) for s in sources]
    return [shares([dot(naive_query(k, mean), naive_query(j, mean)) for j in sources], sizes, tau) for k in askers]


def naive_r2(askers, sources, tau):
    rows = []
    for k in askers:
        scores = []
        for j in sources:
            mine, theirs = table_of(k), table_of(j)
            scores.append(sum(n / samples_of(k) * dot(u, theirs[c][1]) for c, (n, u) in mine.items() if c in theirs))
        rows.append(shares(scores, [samples_of(s) for s in sources], tau))
    return rows


def naive_r3(askers, sources, tau):
    rows = []
    for k in askers:
        row = [0.0] * len(sources)
        for c, (n, _) in table_of(k).items():
            holders = [j for j, s in enumerate(sources) if c in table_of(s)]
            scores = [dot(TEXT[c].tolist(), table_of(sources[j])[c][1]) for j in holders]
            sizes = [table_of(sources[j])[c][0] for j in holders]
            for j, share in zip(holders, shares(scores, sizes, tau), strict=True):
                row[j] += n / samples_of(k) * share
        rows.append(row)
    return rows


NAIVE = {"R1": naive_r1, "R2": naive_r2, "R3": naive_r3}


def has_queries(holders):
    """Whether nobody sits at the mean, where rounding would decide the direction."""
    mean = mean_prototype(holders)
    return all(np.linalg.norm(h.counts / h.samples @ (h.prototypes - mean)) > 1e-3 for h in holders)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("reading", NAIVE)
@settings(deadline=None, max_examples=25)
@given(fleet=fleets(least=2))
def test_attention_equals_plain_loops_over_the_specification(reading, tau, fleet):
    assume(has_queries(fleet))
    np.testing.assert_allclose(attention(reading, fleet, fleet, tau, TEXT), NAIVE[reading](fleet, fleet, tau), atol=1e-5)


@pytest.mark.parametrize("reading", NAIVE)
@settings(deadline=None, max_examples=15)
@given(fleet=fleets(least=4, most=6))
def test_attention_to_clusters_of_clients_equals_the_same_loops(reading, fleet):
    sources = [together(fleet[:2]), together(fleet[2:])]
    assume(has_queries(sources) and has_queries(fleet))
    result = attention(reading, fleet, sources, 0.1, TEXT)
    assert result.shape == (len(fleet), 2)
    np.testing.assert_allclose(result, NAIVE[reading](fleet, sources, 0.1), atol=1e-5)


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("reading", [*NAIVE, "identity"])
@settings(deadline=None, max_examples=15)
@given(fleet=fleets())
def test_every_row_of_the_attention_shares_out_exactly_one(reading, tau, fleet):
    result = attention(reading, fleet, fleet, tau, TEXT)
    assert (result >= 0).all()
    np.testing.assert_allclose(result.sum(axis=1), 1.0, atol=1e-12)


@pytest.mark.parametrize("reading", ["R1", "R2"])
@settings(deadline=None, max_examples=20)
@given(fleet=fleets())
def test_without_a_temperature_everybody_gets_the_sample_weighted_mean(reading, fleet):
    n = [samples_of(h) for h in fleet]
    np.testing.assert_allclose(
        attention(reading, fleet, fleet, math.inf, TEXT), [[x / sum(n) for x in n]] * len(n), rtol=1e-12
    )


@settings(deadline=None, max_examples=20)
@given(fleet=fleets())
def test_without_a_temperature_r3_shares_out_each_class_by_its_counts(fleet):
    result = attention("R3", fleet, fleet, math.inf, TEXT)
    for k, asker in enumerate(fleet):
        for j, source in enumerate(fleet):
            expected = 0.0
            for c, (n, _) in table_of(asker).items():
                total = sum(table_of(other)[c][0] for other in fleet if c in table_of(other))
                expected += n / samples_of(asker) * table_of(source).get(c, (0, None))[0] / total
            assert result[k, j] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("reading", [*NAIVE, "identity"])
@settings(deadline=None, max_examples=15)
@given(fleet=fleets(least=2), random=st.randoms(use_true_random=False))
def test_clients_in_another_order_give_the_same_attention_in_that_order(reading, fleet, random):
    assume(has_queries(fleet))
    order = list(range(len(fleet)))
    random.shuffle(order)
    moved = [fleet[k] for k in order]
    straight = attention(reading, fleet, fleet, 0.1, TEXT)
    np.testing.assert_allclose(attention(reading, moved, moved, 0.1, TEXT), straight[np.ix_(order, order)], atol=1e-9)


def test_identity_listens_to_nobody_else():
    fleet = [random_holder({0: 5}, seed) for seed in range(3)]
    assert np.array_equal(attention("identity", fleet, fleet, 0.1, TEXT), np.eye(3))


def test_r1_finds_the_alike_among_clients_that_share_no_class():
    rng = np.random.default_rng(3)
    near, far = direction(rng), direction(rng)
    twin = near + rng.normal(0.0, 0.01, WIDTH)
    fleet = [
        holding({0: (10, near)}),
        holding({1: (10, (twin / np.linalg.norm(twin)).astype(np.float32))}),
        holding({2: (10, far)}),
    ]
    result = attention("R1", fleet, fleet, 0.1, TEXT)
    assert result[0, 1] > 0.45
    assert result[1, 0] > 0.45
    assert result[2, 2] > 0.95
    # R2 and R3 compare class by class: here they say nothing of the others.
    np.testing.assert_allclose(attention("R2", fleet, fleet, math.inf, TEXT), 1 / 3)
    assert np.array_equal(attention("R3", fleet, fleet, 0.1, TEXT), np.eye(3))


def test_a_small_temperature_listens_to_oneself_and_many_samples_are_heard_further():
    fleet = [random_holder({k: 10}, k) for k in range(3)]
    np.testing.assert_allclose(attention("R1", fleet, fleet, 1e-3, TEXT), np.eye(3), atol=1e-9)
    loud = [*fleet[:2], Holder(fleet[2].prototypes, fleet[2].classes, fleet[2].counts * 50)]
    assert (attention("R2", loud, loud, 0.1, TEXT)[:2, 2] > attention("R2", fleet, fleet, 0.1, TEXT)[:2, 2]).all()


@settings(deadline=None, max_examples=20)
@given(fleet=fleets(least=2))
def test_queries_are_unit_and_the_mean_is_that_of_all_samples(fleet):
    assume(has_queries(fleet))
    mean = mean_prototype(fleet)
    np.testing.assert_allclose(mean, naive_mean(fleet), atol=1e-9)
    np.testing.assert_allclose(queries(fleet, mean), [naive_query(h, naive_mean(fleet)) for h in fleet], atol=1e-6)


def test_one_client_alone_has_only_itself_to_listen_to():
    alone = [random_holder({1: 3, 2: 9}, 0)]
    for reading in (*NAIVE, "identity"):
        assert np.array_equal(attention(reading, alone, alone, 0.1, TEXT), [[1.0]])


def test_a_holder_at_the_mean_has_no_query_so_its_row_is_the_sample_weighted_mean():
    # The third holds both classes in the proportion of all: its query is 0, not the direction of a rounding error.
    rng = np.random.default_rng(8)
    p, q = direction(rng), direction(rng)
    for n in range(2, 40):
        fleet = [holding({0: (10, p)}), holding({1: (n, q)}), holding({0: (70, p), 1: (7 * n, q)})]
        sizes = np.array([10, n, 70 + 7 * n])
        np.testing.assert_allclose(attention("R1", fleet, fleet, 0.1, TEXT)[2], sizes / sizes.sum(), atol=1e-6)


def test_a_holder_says_of_an_update_what_its_prototypes_say():
    update = Update(
        {},
        np.eye(2, WIDTH, dtype=np.float32),
        np.array([3, 1], np.int32),
        np.array([7, 2], np.int32),
        np.array([0, 1], np.int32),
        np.ones((1, WIDTH), np.float32),
        np.array([0], np.int32),
    )
    holder = Holder.of(update)
    assert (holder.classes.tolist(), holder.counts.tolist(), holder.samples) == ([3, 1], [7, 2], 9.0)
    assert np.array_equal(holder.prototypes, update.prototypes)


MATRICES = st.integers(1, 5).flatmap(
    lambda size: st.lists(
        st.lists(st.integers(0, 100), min_size=size, max_size=size).filter(any).map(lambda r: [x / sum(r) for x in r]),
        min_size=size,
        max_size=size,
    )
)


@settings(deadline=None)
@given(rows=MATRICES, share=st.floats(0, 1))
def test_an_own_share_is_taken_off_the_top(rows, share):
    kept = keep_share(np.array(rows), share)
    for k, row in enumerate(rows):
        for j, x in enumerate(row):
            assert kept[k, j] == pytest.approx((share if j == k else 0.0) + (1 - share) * x, abs=1e-12)
        assert kept[k].sum() == pytest.approx(1.0)


def test_all_of_the_own_share_is_identity_and_none_changes_nothing():
    matrix = np.array([[0.25, 0.75], [0.5, 0.5]])
    assert np.array_equal(keep_share(matrix, 1.0), np.eye(2))
    assert np.array_equal(keep_share(matrix, 0.0), matrix)


@settings(deadline=None)
@given(rows=MATRICES)
def test_entropy_equals_a_loop_and_lies_between_one_source_and_all_alike(rows):
    result = entropy(np.array(rows))
    for h, row in zip(result, rows, strict=True):
        assert h == pytest.approx(-sum(p * math.log(p) for p in row if p > 0), abs=1e-12)
        assert -1e-12 <= h <= math.log(len(row)) + 1e-12


def test_entropy_is_nothing_for_one_source_and_log_j_for_all_alike():
    assert entropy(np.array([[0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])) == pytest.approx([0.0, math.log(3)])


@settings(deadline=None, max_examples=40)
@given(fleet=fleets(least=1, most=7), number=st.integers(1, 9))
def test_clusters_are_repeatable_dense_and_at_most_so_many(fleet, number):
    labels = cluster(fleet, number)
    assert labels.shape == (len(fleet),)
    assert set(labels.tolist()) == set(range(max(labels) + 1))
    assert max(labels) < number
    assert np.array_equal(cluster(fleet, number), labels)


@settings(deadline=None, max_examples=30)
@given(fleet=fleets(least=2, most=6), more=st.integers(0, 3))
def test_as_many_clusters_as_distinct_clients_keep_everyone_apart(fleet, more):
    assume(has_queries(fleet))
    mean = mean_prototype(fleet)
    q = queries(fleet, mean)
    assume((q @ q.T)[~np.eye(len(q), dtype=bool)].max() < 0.999)
    assert sorted(cluster(fleet, len(fleet) + more).tolist()) == list(range(len(fleet)))


@pytest.mark.parametrize("width", [6, 100, 512])
@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_identical_clients_land_in_the_same_cluster(width, number):
    # Also where there are more clusters than distinct clients: equal scores must not be told apart by their last bits.
    for seed in range(12):
        rng = np.random.default_rng(seed)
        distinct = [
            holding({int(c): (int(rng.integers(1, 50)), direction(rng, width)) for c in rng.permutation(6)[:size]})
            for size in (1, 2, 3)
        ]
        order = rng.permutation(6)
        labels = cluster([distinct[k % 3] for k in order], number)
        for kind in range(3):
            assert len({int(label) for label, k in zip(labels, order, strict=True) if k % 3 == kind}) == 1


def test_clusters_are_the_groups_of_alike_clients():
    rng = np.random.default_rng(0)
    centres = [direction(rng) for _ in range(3)]
    groups = [0, 2, 1, 0, 0, 2, 1, 2]
    fleet = []
    for k, group in enumerate(groups):
        near = centres[group] + rng.normal(0.0, 0.02, WIDTH)
        fleet.append(holding({group: (10 + k, (near / np.linalg.norm(near)).astype(np.float32))}))
    labels = cluster(fleet, 3)
    assert len(set(labels.tolist())) == 3
    for k, group in enumerate(groups):
        assert [bool(x) for x in labels == labels[k]] == [other == group for other in groups]


def test_one_cluster_holds_everybody():
    assert cluster([random_holder({k: 5}, k) for k in range(4)], 1).tolist() == [0, 0, 0, 0]


@settings(deadline=None, max_examples=30)
@given(fleet=fleets())
def test_a_cluster_holds_the_count_weighted_unit_means_of_its_members(fleet):
    joined = table_of(together(fleet))
    assert sorted(joined) == sorted({c for h in fleet for c in table_of(h)})
    for c, (count, prototype) in joined.items():
        members = [table_of(h)[c] for h in fleet if c in table_of(h)]
        total = [sum(n * u[d] for n, u in members) for d in range(WIDTH)]
        assert count == sum(n for n, _ in members)
        assert prototype == pytest.approx(unit(total), abs=1e-6)


def test_a_cluster_of_one_is_that_client():
    alone = random_holder({2: 7, 0: 3}, 4)
    joined = together([alone])
    assert (joined.classes.tolist(), joined.counts.tolist()) == ([0, 2], [3, 7])
    np.testing.assert_allclose(joined.prototypes, alone.prototypes[[1, 0]], atol=1e-7)


def test_the_counts_of_a_large_cluster_do_not_overflow():
    # A count travels as int32; the sum of two need not fit into one.
    most = np.iinfo(np.int32).max
    fleet = [random_holder({0: most}, seed) for seed in range(2)]
    assert together(fleet).counts.tolist() == [2 * most]
    assert together(fleet).samples == 2.0 * most
