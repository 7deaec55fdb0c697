"""Accepted updates -> the next global adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clip_lora.algebra import mean_of_factors, mean_of_products
from clip_lora.robust import median_of_factors, multi_krum, product_distances, trimmed_mean_of_factors
from coordinator.recipe import Aggregation
from protocol.messages import Adapter, Offer, Update


@dataclass(frozen=True)
class Contribution:
    """An accepted update with its offer. `discount` multiplies its weight: below 1 if it is of an earlier round."""

    offer: Offer
    update: Update
    discount: float = 1.0


@dataclass(frozen=True)
class Choice:
    """How a round is averaged in the end: the method, and whom it leaves out. `note` says why it is not the recipe's."""

    method: Aggregation
    left_out: tuple[str, ...] = ()
    note: str = ""


def choose(contributions: Mapping[str, Contribution], method: Aggregation, malicious: int) -> Choice:
    """Return the method itself; for "multi_krum" the mean of factors over those whom it chooses, of all if they are too few.

    `malicious` is f, the number of clients that may be.
    """
    if method != "multi_krum":
        return Choice(method)
    clients = sorted(contributions)
    if len(clients) < 2 * malicious + 3:
        return Choice(
            "mean_of_factors",
            note=f"multi_krum against {malicious} needs {2 * malicious + 3} updates, here are {len(clients)}: mean of all",
        )
    chosen = multi_krum(product_distances([contributions[client].update.adapter for client in clients]), malicious)
    return Choice("mean_of_factors", tuple(client for i, client in enumerate(clients) if i not in chosen))


def aggregate(
    contributions: Mapping[str, Contribution], method: Aggregation, rank: int, current: Adapter, malicious: int = 0
) -> Adapter:
    """Return the next global adapter (docs/method.md, step 5); `current` for method "none".

    Means are weighted by samples, n_k / sum n; what came late weighs less, by its discount. The median and the trimmed mean,
    which leaves out the `malicious` smallest and largest, are not: a weight is what its client says. Clients are taken in
    sorted order, so that the order of arrival leaves no trace in the bits. Multi-Krum has to `choose` first.
    """
    assert method != "multi_krum"
    ordered = [contributions[client] for client in sorted(contributions)]
    adapters = [contribution.update.adapter for contribution in ordered]
    weights = [contribution.discount * contribution.offer.samples for contribution in ordered]
    if method == "none":
        return current
    if method == "median":
        return median_of_factors(adapters)
    if method == "trimmed_mean":
        return trimmed_mean_of_factors(adapters, malicious)
    if method == "mean_of_products":
        return mean_of_products(adapters, weights, rank)
    return mean_of_factors(adapters, weights)
