"""What the text side learns from, and how that went (docs/method.md, step 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregate import Contribution
from coordinator.recipe import TextTraining
from protocol.messages import FloatArray, IntArray


@dataclass(frozen=True)
class TextSamples:
    """What the text side learns from: unit features (N, D), labels (N,), weights (N,) summing to 1."""

    features: FloatArray
    labels: IntArray
    weights: NDArray[np.float64]

    @classmethod
    def gather(cls, contributions: Mapping[str, Contribution], how: TextTraining) -> TextSamples:
        """Collect all uploaded features, clients in sorted order.

        With `prototypes_for_missing`, a class of which nobody sent a feature is represented by its prototypes, weighted
        by their counts: otherwise its embedding would only ever be pushed away. With `balance_classes` all classes weigh
        the same, otherwise all rows do.
        """
        updates = [contributions[client].update for client in sorted(contributions)]
        # An empty array may have any width.
        width = max((rows.shape[1] for u in updates for rows in (u.features, u.prototypes) if len(rows)), default=0)
        none = np.zeros((0, width), np.float32)
        features = np.concatenate([none, *(u.features for u in updates if len(u.features))])
        labels = np.concatenate([u.labels for u in updates])
        weights = np.ones(len(labels))
        if how.prototypes_for_missing:
            rows = np.concatenate([none, *(u.prototypes for u in updates if len(u.prototypes))])
            classes = np.concatenate([u.prototype_classes for u in updates])
            counts = np.concatenate([u.prototype_counts for u in updates]).astype(np.float64)
            for c in np.setdiff1d(classes, labels):
                counts[classes == c] /= counts[classes == c].mean()
            missing = ~np.isin(classes, labels)
            features = np.concatenate([features, rows[missing]])
            labels = np.concatenate([labels, classes[missing]])
            weights = np.concatenate([weights, counts[missing]])
        if how.balance_classes:
            for c in np.unique(labels):
                weights[labels == c] /= weights[labels == c].sum()
        lengths = np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)  # int8 on the wire: nearly unit
        return cls((features / lengths).astype(np.float32), labels, weights / max(weights.sum(), 1e-12))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TextLoss:
    """Weighted mean CE over the gathered samples before and after training, and how many samples there were."""

    before: float
    after: float
    samples: int
