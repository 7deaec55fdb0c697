"""Counts on the wire: 4 significant bits, rounded down."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from protocol.buckets import bucket, bucketed, most
from protocol.codec import decode_update
from protocol.messages import TrainingResult, Update
from protocol.transfer.parcel import pack


def naive(count: int) -> int:
    """The largest number of at most 4 significant bits that is not above the count, by trying."""
    return max((m << s for m in range(16) for s in range(42) if m << s <= count), default=0)


@given(st.integers(0, 2**40))
def test_a_bucket_is_the_largest_number_of_four_significant_bits_below(count):
    assert bucket(count) == naive(count)
    assert bucket(bucket(count)) == bucket(count)
    assert bucket(count) * 9 >= count * 8


@given(st.integers(1, 2**40))
def test_most_is_the_last_count_of_its_bucket(count):
    last = most(bucket(count))
    assert bucket(last) == bucket(count)
    assert bucket(last + 1) > last
    assert last >= count


def test_below_sixteen_counts_are_exact():
    assert [bucket(count) for count in range(20)] == [*range(16), 16, 16, 18, 18]


def an_update(counts: list[int], correct: list[int]) -> Update:
    rows = np.eye(len(counts), 8, dtype=np.float32)
    factors = {"x.lora_A": np.ones((1, 2), np.float32), "x.lora_B": np.ones((2, 1), np.float32)}
    numbers = [np.array(values, np.int32) for values in (range(len(counts)), counts, correct)]
    return Update(factors, rows, *numbers, rows[:0], numbers[0][:0])


@given(st.lists(st.integers(1, 2**20).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=8))
def test_what_travels_is_in_buckets_and_no_more_than_the_samples_explain(pairs):
    counts, correct = (list(values) for values in zip(*pairs, strict=True))
    parcel = pack(TrainingResult(1, "a" * 64, an_update(counts, correct), sum(counts), 1.0, 0.5, 1.0))
    sent = decode_update(parcel.blob)
    assert sent.prototype_counts.tolist() == [naive(count) for count in counts]
    assert sent.prototype_correct.tolist() == [min(c, naive(n)) for n, c in pairs]
    assert parcel.offer.samples == naive(sum(counts))
    assert sent.prototype_counts.sum() <= most(parcel.offer.samples)


def test_counts_that_are_buckets_already_stay_as_they_are():
    update = an_update([15, 16, 18], [15, 0, 17])
    same = bucketed(update)
    assert same.prototype_counts.tolist() == [15, 16, 18]
    assert same.prototype_correct.tolist() == [15, 0, 17]
