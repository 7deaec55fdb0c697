"""The two Gaussian mechanisms of the privacy recipe, without their noise: what is clean, and how far one picture moves it.

Neighbours are two sets of pictures of which one has one picture more (docs/method.md, "Differential privacy"). Whatever
leaves a device is computed from what these functions return once noise is on it, and from nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from edge_client.privacy.noise import Vector
from protocol.messages import Adapter, FloatArray, IntArray

PROTOTYPE_SENSITIVITY = math.sqrt(2.0)
MAX_COUNT = 2**31 - 1


def adapter_sensitivity(clip: float) -> float:
    """Return how far one picture can move `clipped_change`, L2: from one side of the ball to the other."""
    return 2.0 * clip


def clipped_change(start: Adapter, trained: Adapter, names: Collection[str], clip: float) -> Vector:
    """Return how the factors `names` were changed, one after the other in one vector (n,), of L2 norm `clip` at most.

    A change that is not finite, as after a training that diverged, counts as none: to fail would tell of the pictures.
    """
    parts = [(trained[name].astype(np.float64) - start[name]).ravel() for name in sorted(names)]
    change = np.concatenate([np.zeros(0), *parts])
    if not np.all(np.isfinite(change)):
        return np.zeros_like(change)
    norm = math.sqrt(math.fsum(np.square(change)))  # an exact sum: the same bits whatever the order
    return change * min(1.0, clip / norm) if norm > 0.0 else change


def moved(start: Adapter, change: Vector, names: Collection[str]) -> Adapter:
    """Return `start` with a change (n,) of the factors `names`, as `clipped_change` orders it; the others as they were."""
    adapter, place = dict(start), 0
    for name in sorted(names):
        size = start[name].size
        part = change[place : place + size].reshape(start[name].shape)
        adapter[name] = (start[name].astype(np.float64) + part).astype(np.float32)
        place += size
    return adapter


def class_sums(features: FloatArray, labels: NDArray[np.int32], classes: int) -> Vector:
    """Return for every class the sum of its unit features and their number, (classes, D + 1); 0 for a class without any.

    One picture more adds a unit vector and 1 to one row: an L2 sensitivity of sqrt(2). A feature that is not finite adds
    to the number alone.
    """
    rows = np.where(np.isfinite(features).all(axis=1, keepdims=True), features, 0.0).astype(np.float64)
    rows /= np.maximum(np.sqrt(np.square(rows).sum(axis=1, keepdims=True)), 1e-12)
    sums = np.zeros((classes, features.shape[1] + 1))
    np.add.at(sums, labels, np.hstack([rows, np.ones((len(rows), 1))]))
    return sums


def prototypes_of(noisy: Vector, least: int) -> tuple[FloatArray, IntArray, IntArray]:
    """Return unit prototypes (P, D), their classes (P,) and counts (P,), of noisy `class_sums`.

    A class has one if its noisy number, rounded, is at least `least`: whether or not the device has any picture of it.
    """
    counts = np.rint(np.clip(noisy[:, -1], 0, MAX_COUNT)).astype(np.int64)
    shown = np.flatnonzero(counts >= least)
    rows = noisy[shown, :-1]
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit.astype(np.float32), shown.astype(np.int32), counts[shown].astype(np.int32)
