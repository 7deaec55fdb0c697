"""Counts in buckets: how many pictures a device has is told to 4 significant bits, so that it identifies less."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from protocol.messages import IntArray, Update

BITS = 4


def bucket(count: int) -> int:
    """Return the count rounded down to 4 significant bits: exact below 16, at most an eighth less above."""
    shift = max(0, count.bit_length() - BITS)
    return count >> shift << shift


def most(value: int) -> int:
    """Return the largest count of the bucket `value`."""
    return value + (1 << max(0, value.bit_length() - BITS)) - 1


def bucketed(update: Update) -> Update:
    """Return an update whose prototypes tell their counts in buckets, and no more correct ones than that."""
    counts = np.array([bucket(int(count)) for count in update.prototype_counts], np.int32)
    return with_counts(update, counts)


def with_counts(update: Update, counts: IntArray) -> Update:
    """Return an update whose prototypes have other counts (P,), and no more correct ones than that, where they are told."""
    correct = update.prototype_correct
    return replace(
        update, prototype_counts=counts, prototype_correct=np.minimum(correct, counts) if len(correct) else correct
    )
