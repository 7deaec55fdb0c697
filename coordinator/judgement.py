"""Who counts for how much in a round: adapters that are too large, and counts that are too high.

A device that lies can say any number of samples, and make its adapter any size: both are measured against the round's
median, which a minority cannot move far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from clip_lora.algebra import A, B
from clip_lora.robust import factor_norm, product_norm
from coordinator.aggregate import Contribution
from coordinator.checks import rejected
from coordinator.defence import Defence
from coordinator.recipe import FederationRecipe
from protocol.buckets import with_counts
from protocol.messages import Adapter, FloatArray, Verdict

ENOUGH = 3


@dataclass(frozen=True)
class Yardstick:
    """By what an update is too large: `limit` times the round's median of ||B A||_F; if `factors`, also of ||A|| and ||B||.

    Where factors are averaged apart their sizes count too: 1000 A with B / 1000 has the product of A with B, and
    would be most of the mean of A.
    """

    limit: float
    factors: bool

    @classmethod
    def of(cls, recipe: FederationRecipe) -> Yardstick:
        """Return the recipe's."""
        return cls(recipe.defence.norm_limit, not recipe.mixes_ranks)

    def sizes(self, adapter: Adapter) -> tuple[float, ...]:
        """Return the norms of an adapter that are compared."""
        product = product_norm(adapter)
        return (product, factor_norm(adapter, A), factor_norm(adapter, B)) if self.factors else (product,)

    def excess(self, sizes: Mapping[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        """Return by client who is above the limit: its norms in medians, to nine digits. With fewer than 3 nobody is."""
        if len(sizes) < ENOUGH or self.limit == float("inf"):
            return {}
        medians = np.median(np.array([sizes[client] for client in sorted(sizes)]), axis=0)
        ratios = {client: _ratios(sizes[client], medians.tolist()) for client in sorted(sizes)}
        return {client: several for client, several in ratios.items() if max(several) > self.limit}


def too_large(ratios: tuple[float, ...]) -> Verdict:
    """Return why an adapter of these norms, in the round's medians, is set aside."""
    told = ", ".join(f"{name} {ratio:.3g}" for name, ratio in zip(("|B A|", "|A|", "|B|"), ratios, strict=False))
    return rejected("norm-too-large", f"in medians of the round: {told}")


def defended(
    contributions: Mapping[str, Contribution], how: Defence, yardstick: Yardstick
) -> tuple[dict[str, Contribution], list[str]]:
    """Return the contributions as they may count, and the names of those whose adapters were scaled down.

    Counts above `sample_cap` times the median of the round's are lowered to it: a client's samples, and its prototypes'
    counts together, in proportion. With "clip", adapters above the limit are scaled down to it.
    """
    counted = _capped(contributions, how.sample_cap)
    if how.over_limit != "clip":
        return counted, []
    over = yardstick.excess({client: yardstick.sizes(c.update.adapter) for client, c in counted.items()})
    for client, ratios in over.items():
        adapter = counted[client].update.adapter
        clipped = _Scaled(adapter, _scales(ratios, yardstick.limit))
        counted[client] = replace(counted[client], update=replace(counted[client].update, adapter=clipped))
    return counted, sorted(over)


def _capped(contributions: Mapping[str, Contribution], cap: float) -> dict[str, Contribution]:
    samples = [contributions[client].offer.samples for client in sorted(contributions)]
    limit = cap * float(np.median(samples))
    return {client: _lower(contributions[client], limit) for client in sorted(contributions)}


def _lower(contribution: Contribution, limit: float) -> Contribution:
    offer, update = contribution.offer, contribution.update
    total = int(update.prototype_counts.sum(dtype=np.int64))
    if offer.samples > limit:
        offer = offer.model_copy(update={"samples": int(limit)})
    if total > limit:
        counts = np.maximum(update.prototype_counts * (limit / total), 1.0).astype(np.int32)
        update = with_counts(update, counts)
    return replace(contribution, offer=offer, update=update)


def _ratios(sizes: tuple[float, ...], medians: list[float]) -> tuple[float, ...]:
    """Return sizes in medians; the last bits of a norm depend on where arrays lie in memory."""
    return tuple(
        float(f"{size / median:.9g}") if median > 0 else (float("inf") if size > 0 else 0.0)
        for size, median in zip(sizes, medians, strict=True)
    )


def _scales(ratios: tuple[float, ...], limit: float) -> dict[str, float]:
    """Return by what A and B are multiplied so that no norm is above the limit."""
    product, *factors = (min(1.0, limit / ratio) if ratio > 0 else 1.0 for ratio in ratios)
    a, b = factors or (1.0, 1.0)
    return {A: a, B: min(b, product / a)}


class _Scaled(Mapping[str, FloatArray]):
    """An adapter whose factors are multiplied when they are read."""

    def __init__(self, adapter: Adapter, scales: Mapping[str, float]) -> None:
        self._adapter = adapter
        self._scales = scales

    def __getitem__(self, name: str) -> FloatArray:
        scale = self._scales[A if name.endswith(A) else B]
        factor = self._adapter[name]
        return factor if scale == 1.0 else (factor.astype(np.float64) * scale).astype(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapter)

    def __len__(self) -> int:
        return len(self._adapter)
