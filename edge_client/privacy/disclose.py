"""What leaves a device after a round under differential privacy (docs/method.md, "Differential privacy")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clip_lora.lora import adapter_state, load_adapter, trained_names
from edge_client.data import Dataset
from edge_client.encoder import ImageEncoder, encode
from edge_client.privacy.budget import Budget
from edge_client.privacy.ledger import Part
from edge_client.privacy.mechanisms import (
    PROTOTYPE_SENSITIVITY,
    adapter_sensitivity,
    class_sums,
    clipped_change,
    moved,
    prototypes_of,
)
from protocol.messages import Adapter, Recipe, Update


@dataclass(frozen=True)
class Disclosed:
    """An update, what its counts sum to, at least 1, and epsilon of all that the device has disclosed up to it."""

    update: Update
    samples: int
    epsilon: float


def parts_of(recipe: Recipe) -> tuple[Part, ...]:
    """Return what a round discloses: without local steps the adapter is the one that the coordinator sent."""
    return ("adapter", "prototypes") if recipe.local_steps else ("prototypes",)


def disclose(
    encoder: ImageEncoder, data: Dataset, classes: int, recipe: Recipe, start: Adapter, budget: Budget, work: str
) -> Disclosed:
    """Return the update with noise on all of it; raises PlanRefusedError if the budget does not allow it.

    Prototypes are as the noisy adapter sees the pictures: seen by the trained one, they would depend on them twice.
    """
    privacy = recipe.privacy
    assert privacy is not None  # who calls has asked
    adapter = start
    if recipe.local_steps:
        names = trained_names(encoder.model)
        change = clipped_change(start, adapter_state(encoder.model), names, privacy.clip)
        noisy = budget.noised(privacy, work, "adapter", change, adapter_sensitivity(privacy.clip))
        adapter = moved(start, noisy, names)
        load_adapter(encoder.model, adapter)
    # One by one: an 8-bit layer on a GPU picks the columns that it does not quantise over the whole batch, so that one
    # picture more would change the embeddings of others, and a sum by more than its own.
    alone = np.concatenate([encode(encoder, data, [index]) for index in range(len(data))])
    sums = class_sums(alone, data.labels, classes)
    noisy = budget.noised(privacy, work, "prototypes", sums, PROTOTYPE_SENSITIVITY)
    prototypes, shown, counts = prototypes_of(noisy, recipe.min_prototype_count)
    none = np.zeros(0, np.int32)
    update = Update(adapter, prototypes, shown, counts, none, prototypes[:0], none)
    return Disclosed(update, max(1, int(counts.sum())), budget.epsilon(privacy.delta))
