"""Metrics (a), (b) and (c) of docs/method.md, on pictures that nobody trained on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from clip_lora.algebra import rank_of
from clip_lora.lora import load_adapter
from coordinator.learning import Knowledge
from edge_client.data import Dataset
from edge_client.encoder import encode
from edge_client.encoders import Encoders
from protocol.codec import encode_adapter, sha256
from protocol.messages import Adapter, Recipe

Shares = NDArray[np.float64]


@dataclass
class Judge:
    """Answers the test pictures with any adapter; an adapter is encoded once a class bank."""

    encoders: Encoders
    test: Dataset
    model: str
    bits: int
    device: str
    _known: dict[tuple[str, str], Shares] = field(default_factory=dict)

    def by_class(self, known: Knowledge, adapter: Adapter, recipe: Recipe) -> Shares:
        """Return the share of each class's test pictures that are answered correctly, (C,); NaN for a class without any."""
        key = (sha256(encode_adapter(adapter)), sha256(known.bank.embeddings.tobytes()))
        if key not in self._known:
            encoder = self.encoders.get(self.model, self.bits, self.device, recipe.at_rank(rank_of(adapter)))
            load_adapter(encoder.model, adapter)
            answers = (encode(encoder, self.test) @ known.bank.embeddings.T).argmax(axis=1)
            labels, classes = self.test.labels, len(known.bank.classes)
            correct = np.bincount(labels[answers == labels], minlength=classes)
            with np.errstate(invalid="ignore"):
                self._known[key] = correct / np.bincount(labels, minlength=classes)
        return self._known[key]

    def overall(self, shares: Shares) -> float:
        """Return the accuracy on all test pictures: metrics (a) and (c)."""
        return own_accuracy(shares, self.test.labels)


def own_accuracy(shares: Shares, labels: NDArray[np.int32]) -> float:
    """Return the expected accuracy on test pictures in the proportions of `labels` (N,): for a client's, metric (b)."""
    counts = np.bincount(labels, minlength=len(shares)).astype(np.float64)
    tested = ~np.isnan(shares)
    return float((counts[tested] * shares[tested]).sum() / max(counts[tested].sum(), 1.0))
