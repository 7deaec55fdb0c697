"""Noise from a key: the same key gives the same normal numbers, and whoever lacks it can tell none from the others."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Vector = NDArray[np.float64]


class Noise:
    """Independent standard normal numbers, without end.

    The bits are AES-256 in counter mode: numpy's generators can be run backwards by someone who knows some of what they
    gave, as one does who knows a part of the pictures. 53 bits make a uniform number, two of these by Box and Muller (1958)
    two normal ones.
    """

    def __init__(self, key: bytes) -> None:
        self._stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def normal(self, size: int) -> Vector:
        """Return the next `size` numbers, (size,) float64."""
        half = -(-size // 2)
        words = np.frombuffer(self._stream.update(bytes(16 * half)), "<u8")
        uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        radius, angle = np.sqrt(-2.0 * np.log(uniform[:half])), 2.0 * np.pi * uniform[half:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
