"""What a few bad adapters among many cannot move far: sizes and distances of products, and averages that leave out extremes.

(c B, A / c) is the same adapter for every c: sizes and distances are of the products B A, from the factors by Gram matrices
of rank x rank, never as matrices of a layer's size. Coordinates can be compared one by one only if all have the same A.
float64 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clip_lora.algebra import A, Adapter, B, Matrix, layers


def product_norm(adapter: Adapter) -> float:
    """Return ||B A||_F over all layers, without alpha / rank: sum of tr(A^T B^T B A) = sum of (B^T B) * (A A^T)."""
    total = 0.0
    for layer in layers(adapter):
        a, b = adapter[layer + A].astype(np.float64), adapter[layer + B].astype(np.float64)
        total += float(((b.T @ b) * (a @ a.T)).sum())
    return float(np.sqrt(max(total, 0.0)))


def factor_norm(adapter: Adapter, end: str) -> float:
    """Return the Frobenius norm of all factors of one kind, A or B, over all layers."""
    parts = (adapter[layer + end].astype(np.float64) for layer in layers(adapter))
    return float(np.sqrt(sum(float((part * part).sum()) for part in parts)))


def product_distances(adapters: Sequence[Adapter]) -> Matrix:
    """Return ||B_i A_i - B_j A_j||_F^2 over all layers, (n, n).

    By the polarisation of the norm, with <B_i A_i, B_j A_j> = tr(A_i^T B_i^T B_j A_j) = sum of (B_i^T B_j) * (A_i A_j^T).
    """
    inner = np.zeros((len(adapters), len(adapters)))
    for layer in layers(adapters[0]):
        a = [adapter[layer + A].astype(np.float64) for adapter in adapters]
        b = [adapter[layer + B].astype(np.float64) for adapter in adapters]
        starts = np.cumsum([0, *(len(factor) for factor in a)])[:-1]
        all_a, all_b = np.vstack(a), np.hstack(b)
        for i, (a_i, b_i) in enumerate(zip(a, b, strict=True)):
            inner[i] += np.add.reduceat(((b_i.T @ all_b) * (a_i @ all_a.T)).sum(axis=0), starts)
    squares = np.diag(inner)
    distances: Matrix = np.maximum(squares[:, None] + squares[None, :] - inner - inner.T, 0.0)
    return distances


def median_of_factors(adapters: Sequence[Adapter]) -> Adapter:
    """Return the coordinate-wise median, unweighted (Yin et al., arXiv 1803.01498): for adapters that share A."""
    return {name: np.median(_stack(adapters, name), axis=0).astype(np.float32) for name in sorted(adapters[0])}


def trimmed_mean_of_factors(adapters: Sequence[Adapter], trimmed: int) -> Adapter:
    """Return the coordinate-wise mean without the `trimmed` largest and smallest, unweighted (Yin et al., arXiv 1803.01498).

    For adapters that share A. Raises ValueError if nothing would be left.
    """
    if 2 * trimmed >= len(adapters):
        raise ValueError(f"of {len(adapters)} adapters {trimmed} at each end cannot be left out")
    kept = slice(trimmed, len(adapters) - trimmed)
    return {
        name: np.sort(_stack(adapters, name), axis=0)[kept].mean(axis=0).astype(np.float32) for name in sorted(adapters[0])
    }


def multi_krum(distances: Matrix, malicious: int) -> list[int]:
    """Return the n - f that are nearest to their n - f nearest, themselves included, in ascending order; f = `malicious`.

    Multi-Krum of Blanchard et al. (arXiv 1703.02757), with the number of neighbours of Allouah et al. (arXiv 2302.01772).
    Equal scores go to the first. Raises ValueError unless n >= 2f + 3.
    """
    n = len(distances)
    if n < 2 * malicious + 3:
        raise ValueError(f"multi-Krum against {malicious} of {n} needs at least {2 * malicious + 3}")
    scores = np.sort(distances, axis=1)[:, 1 : n - malicious].sum(axis=1)
    # The last bits of a product depend on where arrays lie in memory: scores that agree to nine digits are equal.
    digits = np.array([float(f"{score:.9g}") for score in scores])
    return sorted(np.argsort(digits, kind="stable")[: n - malicious].tolist())


def _stack(adapters: Sequence[Adapter], name: str) -> NDArray[np.float64]:
    return np.stack([adapter[name].astype(np.float64) for adapter in adapters])
