"""Accepted updates -> the next global adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clip_lora.algebra import mean_of_factors, mean_of_products
from coordinator.recipe import Aggregation
from protocol.messages import Adapter, Offer, Update


@dataclass(frozen=True)
class Contribution:
    """An accepted update with its offer. `discount` multiplies its weight: below 1 if it is of an earlier round."""

    offer: Offer
    update: Update
    discount: float = 1.0


def aggregate(contributions: Mapping[str, Contribution], method: Aggregation, rank: int, current: Adapter) -> Adapter:
    """Return the sample-weighted mean adapter, weights n_k / sum n (docs/method.md, step 5); `current` for method "none".

    What came late weighs less, by its discount.

    Clients are taken in sorted order, so that the order of arrival leaves no trace in the bits.
    """
    ordered = [contributions[client] for client in sorted(contributions)]
    adapters = [contribution.update.adapter for contribution in ordered]
    weights = [contribution.discount * contribution.offer.samples for contribution in ordered]
    if method == "none":
        return current
    if method == "mean_of_products":
        return mean_of_products(adapters, weights, rank)
    return mean_of_factors(adapters, weights)
