"""Query-based aggregation: how much each client takes from each other (docs/method.md, step 6). Pure numpy, float64.

The paper states that there is one adapter per client, balanced by sample counts; its formula is not public, R1 to R3 are
our readings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from protocol.messages import FloatArray, IntArray, Update

Matrix = NDArray[np.float64]
KMEANS_STEPS = 50
AT_THE_MEAN = 1e-6  # of unit length: below that, a direction is rounding
DIGITS = 9  # cosines that agree so far are equal: where arrays lie in memory shows in the last bits of their products


@dataclass(frozen=True)
class Holder:
    """Who holds samples, a client or a cluster of clients: unit prototypes (P, D) of `classes` (P,) with `counts` (P,)."""

    prototypes: FloatArray
    classes: IntArray
    counts: NDArray[np.integer[Any]]

    @classmethod
    def of(cls, update: Update) -> Holder:
        """Return what an update says of its sender."""
        return cls(update.prototypes, update.prototype_classes, update.prototype_counts)

    @property
    def samples(self) -> float:
        """n_k, over the classes that have a prototype."""
        return float(self.counts.sum())


def attention(
    reading: Literal["R1", "R2", "R3", "identity"],
    askers: Sequence[Holder],
    sources: Sequence[Holder],
    tau: float,
    text: FloatArray,
) -> Matrix:
    """Return a (askers, sources), rows summing to 1; `text` (C, D) are the class embeddings, used by R3.

    R1  q_k = unit(sum_c (n_kc / n_k)(u_kc - u_mean));  a_kj = softmax_j(q_k.q_j / tau + log n_j / n)
    R2  s_kj = sum_{c in both} (n_kc / n_k) u_kc.u_jc;  a_kj = softmax_j(s_kj / tau + log n_j / n)
    R3  a_kj = sum_c (n_kc / n_k) softmax_{j with c}(t_c.u_jc / tau + log n_jc)
    tau = inf is the sample-weighted mean for R1 and R2. `identity` needs sources = askers.
    """
    if reading == "identity":
        return np.eye(len(askers))
    if reading == "R3":
        return _attend_by_text(askers, sources, tau, text)
    if reading == "R1":
        mean = mean_prototype(sources)
        scores = queries(askers, mean) @ queries(sources, mean).T
    else:
        scores = np.array([[_class_matched(asker, source) for source in sources] for asker in askers])
    samples = np.array([source.samples for source in sources])
    return _softmax(scores.round(DIGITS) / tau + np.log(samples / samples.sum()))


def mean_prototype(holders: Sequence[Holder]) -> Matrix:
    """Return the count-weighted mean of all prototypes, (D,): CLIP features lie in a narrow cone around it."""
    total = sum(h.counts.astype(np.float64) @ h.prototypes.astype(np.float64) for h in holders)
    mean: Matrix = np.asarray(total) / sum(h.samples for h in holders)
    return mean


def queries(holders: Sequence[Holder], mean: Matrix) -> Matrix:
    """Return q_k of R1, (K, D): unit, or 0 for a holder that sits exactly at the mean."""
    centred = np.stack([h.counts / h.samples @ (h.prototypes.astype(np.float64) - mean) for h in holders])
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.where(norms > AT_THE_MEAN, centred / np.maximum(norms, AT_THE_MEAN), 0.0)


def keep_share(matrix: Matrix, share: float) -> Matrix:
    """Return share * I + (1 - share) * a: every client keeps a share of its own adapter. Square matrices only."""
    return share * np.eye(len(matrix)) + (1.0 - share) * matrix


def entropy(matrix: Matrix) -> Matrix:
    """Return each row's entropy in nats, (K,): 0 listens to one source, log J to all alike."""
    logs = np.log(matrix, where=matrix > 0, out=np.zeros_like(matrix))
    return np.asarray(-(matrix * logs).sum(axis=1))


def cluster(holders: Sequence[Holder], number: int) -> NDArray[np.int64]:
    """Return each holder's cluster, (K,) in 0..M-1, M at most `number`: spherical k-means over the queries of R1.

    No randomness: the first centre is the heaviest holder, each next one the holder least like all centres so far.
    """
    q = queries(holders, mean_prototype(holders))
    chosen = [int(np.argmax([h.samples for h in holders]))]
    while len(chosen) < min(number, len(holders)):
        nearest = (q @ q[chosen].T).round(DIGITS).max(axis=1)
        nearest[chosen] = np.inf
        chosen.append(int(nearest.argmin()))
    centres, labels = q[chosen], np.full(len(q), -1)
    for _ in range(KMEANS_STEPS):
        new = (q @ centres.T).round(DIGITS).argmax(axis=1)
        if np.array_equal(new, labels):
            break
        labels = new
        for index in np.unique(labels):
            total = q[labels == index].sum(axis=0)
            centres[index] = total / max(float(np.linalg.norm(total)), 1e-12)
    _, dense = np.unique(labels, return_inverse=True)
    return np.asarray(dense, np.int64)


def together(holders: Sequence[Holder]) -> Holder:
    """Return the holder of all their samples: prototypes are the unit count-weighted means of their members'."""
    classes = np.unique(np.concatenate([h.classes for h in holders]))
    sums = np.zeros((len(classes), holders[0].prototypes.shape[1]))
    counts = np.zeros(len(classes), np.int64)
    for holder in holders:
        rows = np.searchsorted(classes, holder.classes)
        sums[rows] += holder.counts[:, None] * holder.prototypes.astype(np.float64)
        counts[rows] += holder.counts
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    unit = sums / np.where(norms > 0, norms, 1.0)
    return Holder(unit.astype(np.float32), classes.astype(np.int32), counts)


def _class_matched(asker: Holder, source: Holder) -> float:
    _, mine, theirs = np.intersect1d(asker.classes, source.classes, return_indices=True)
    cosines = np.einsum("pd,pd->p", asker.prototypes[mine].astype(np.float64), source.prototypes[theirs])
    return float(asker.counts[mine] / asker.samples @ cosines)


def _attend_by_text(askers: Sequence[Holder], sources: Sequence[Holder], tau: float, text: FloatArray) -> Matrix:
    scores = np.full((len(text), len(sources)), -np.inf)
    for j, source in enumerate(sources):
        cosines = np.einsum("pd,pd->p", text[source.classes].astype(np.float64), source.prototypes)
        scores[source.classes, j] = cosines.round(DIGITS) / tau + np.log(source.counts)
    held = np.isfinite(scores).any(axis=1)
    by_class = np.zeros_like(scores)
    by_class[held] = _softmax(scores[held])
    return np.stack([asker.counts / asker.samples @ by_class[asker.classes] for asker in askers])


def _softmax(scores: Matrix) -> Matrix:
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))
