"""The LoRA algebra, written once, in numpy and float64.

A layer's change is delta W = scale * B A, with A (rank, in), B (out, rank) and scale = alpha / rank (Hu et al., LoRA,
arXiv 2106.09685, section 4.1). Averaging factors is not averaging products: `mean_of_factors` and `mean_of_products`
say which of the two they do. Sums run in the order given, so equal inputs in equal order give equal bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Adapter = Mapping[str, NDArray[np.float32]]
Matrix = NDArray[np.float64]
A, B = ".lora_A", ".lora_B"
NEGLIGIBLE = 1e-12  # of the largest singular value: rounding, not a direction


def layers(adapter: Adapter) -> list[str]:
    """Return the adapted layers' names, sorted; raises ValueError if a factor lacks its twin."""
    names = {name.removesuffix(A).removesuffix(B) for name in adapter}
    for name in names:
        if name + A not in adapter or name + B not in adapter:
            raise ValueError(f"adapter holds one factor of layer {name} without the other")
    return sorted(names)


def rank_of(adapter: Adapter) -> int:
    """Return the adapter's rank, 0 if it adapts nothing; raises ValueError if its layers differ in rank."""
    ranks = {adapter[layer + A].shape[0] for layer in layers(adapter)}
    if len(ranks) > 1:
        raise ValueError(f"adapter mixes ranks {sorted(ranks)}")
    return ranks.pop() if ranks else 0


def delta(adapter: Adapter, layer: str, scale: float) -> Matrix:
    """Return scale * B A of one layer, (out, in)."""
    return scale * (adapter[layer + B].astype(np.float64) @ adapter[layer + A].astype(np.float64))


def mean_of_factors(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Average A and B apart, weighted: what FedAvg does to LoRA parameters. Raises ValueError if shapes differ."""
    shares = _shares(weights)
    mean: dict[str, NDArray[np.float32]] = {}
    for name in sorted(adapters[0]):
        total: NDArray[Any] = np.zeros(adapters[0][name].shape, np.float64)
        for adapter, share in zip(adapters, shares, strict=True):
            factor = adapter[name].astype(np.float64)
            if factor.shape != total.shape:  # numpy would stretch what is 1 wide
                raise ValueError(
                    f"{name} is {factor.shape} and {total.shape}: factors of other shapes have no mean, products have"
                )
            total += share * factor
        mean[name] = total.astype(np.float32)
    return mean


def mean_of_products(adapters: Sequence[Adapter], weights: Sequence[float], rank: int) -> Adapter:
    """Average B A exactly, weighted, then keep its best rank-`rank` part (truncated SVD, Eckart-Young).

    The mean is never formed as an (out, in) matrix: with the factors of all clients stacked, sum_k w_k B_k A_k =
    [w_k B_k] [A_k], thin QR of both stacks leaves a core of (sum of ranks) squared. Ranks of the adapters may differ.
    """
    shares = _shares(weights)
    mean: dict[str, NDArray[np.float32]] = {}
    for layer in layers(adapters[0]):
        left = np.hstack([s * a[layer + B].astype(np.float64) for a, s in zip(adapters, shares, strict=True)])
        right = np.vstack([a[layer + A].astype(np.float64) for a in adapters])
        mean[layer + A], mean[layer + B] = _truncate(left, right, rank)
    return mean


def _truncate(left: Matrix, right: Matrix, rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return factors A (rank, in), B (out, rank) of the best approximation of left @ right, singular values split evenly.

    A direction that carries nothing has B = 0 and a fixed random A, as before training: with both at 0 no gradient flows.
    """
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    # SVD leaves signs open: the largest entry of each left vector is made positive so that equal inputs give equal bits.
    signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(u.shape[1])])
    kept = int(np.count_nonzero(s[:rank] > NEGLIGIBLE * s[0]))
    root = np.sqrt(s[:kept])
    b = np.zeros((len(left), rank))
    b[:, :kept] = (q_left @ (u * signs)[:, :kept]) * root
    bound = 1.0 / np.sqrt(right.shape[1])
    a = np.random.default_rng(0).uniform(-bound, bound, (rank, right.shape[1]))
    a[:kept] = (root[:, None] * (vt * signs[:, None])[:kept]) @ q_right.T
    return a.astype(np.float32), b.astype(np.float32)


def _shares(weights: Sequence[float]) -> list[float]:
    total = float(sum(weights))
    if not (0.0 < total < float("inf")) or min(weights) < 0:
        raise ValueError("a weighted mean needs weights that are finite, not negative, and at least one positive weight")
    return [float(weight) / total for weight in weights]
