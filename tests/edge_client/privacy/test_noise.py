"""Normal numbers from a key: against a twin in plain Python, and against the normal distribution."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from edge_client.privacy.noise import Noise

KEY = bytes(range(32))


def twin(key, size):
    """AES of 0, 1, 2 ..., one block after the other; Box and Muller's formula number by number."""
    half = (size + 1) // 2
    cipher = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    blocks = b"".join(cipher.update(number.to_bytes(16, "big")) for number in range(half))
    uniform = [((word >> 11) + 0.5) / 2**53 for (word,) in struct.iter_unpack("<Q", blocks)]
    pairs = list(zip(uniform[:half], uniform[half:], strict=True))
    one = [math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v) for u, v in pairs]
    other = [math.sqrt(-2 * math.log(u)) * math.sin(2 * math.pi * v) for u, v in pairs]
    return (one + other)[:size]


@pytest.mark.parametrize("size", [0, 1, 2, 7, 1000])
def test_the_numbers_are_the_twins(size):
    np.testing.assert_allclose(Noise(KEY).normal(size), twin(KEY, size), rtol=1e-12, atol=1e-12)


def test_the_same_key_gives_the_same_bits_and_another_key_or_place_others():
    first = Noise(KEY).normal(1000)
    assert first.tobytes() == Noise(KEY).normal(1000).tobytes()
    stream = Noise(KEY)
    assert stream.normal(1000).tobytes() == first.tobytes()
    assert not np.isin(stream.normal(1000), first).any()
    assert not np.isin(Noise(KEY[::-1]).normal(1000), first).any()


def test_the_numbers_are_standard_normal_and_independent():
    """Each check fails for one honest sample in 10,000; these keys are not such."""
    numbers = Noise(KEY).normal(400_000)
    assert stats.kstest(numbers, "norm").pvalue > 1e-4
    assert abs(numbers.mean()) < 4 / math.sqrt(len(numbers))
    assert abs(numbers.var() - 1) < 4 * math.sqrt(2 / len(numbers))
    for lag in (1, 2, len(numbers) // 2):
        correlation = np.corrcoef(numbers[:-lag], numbers[lag:])[0, 1]
        assert abs(correlation) < 4 / math.sqrt(len(numbers) - lag)
    tail = (np.abs(numbers) > 3).sum()
    expected = len(numbers) * 2 * stats.norm.sf(3)
    assert abs(tail - expected) < 4 * math.sqrt(expected)
