"""Client adapters: attention over clients or cluster means -> one adapter each, of each client's own rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clip_lora.algebra import A, B, layers, mean_of_factors, mean_of_products, rank_of
from clip_lora.shapes import block_of
from coordinator.aggregate import Contribution
from coordinator.on_demand import OnDemand
from coordinator.query import Holder, Matrix, attention, cluster, entropy, keep_share, together
from coordinator.recipe import FederationRecipe
from protocol.messages import Adapter, FloatArray

TOGETHER_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class Attention:
    """Who listened to whom: weights (clients, sources), rows summing to 1, and each row's entropy in nats.

    `sources` are the clients themselves, or `cluster-0` and so on.
    """

    clients: tuple[str, ...]
    sources: tuple[str, ...]
    weights: Matrix
    entropy: Matrix


def personalise(
    contributions: Mapping[str, Contribution], recipe: FederationRecipe, text: FloatArray, common: Adapter
) -> tuple[Mapping[str, Adapter], Attention | None]:
    """Return each contributor's adapter, made when it is asked for, and the attention.

    `common` is the global adapter, used in blocks below the cut.

    client adapter_k = sum_j a_kj adapter_j, by the recipe's algebra (docs/method.md, step 6). Who sent no prototypes can
    neither ask nor be found: such a client is left out. The attention is None if that leaves nobody.
    """
    how = recipe.personal
    assert how.query != "none"  # who calls has asked
    clients = sorted(c for c in contributions if contributions[c].update.prototype_counts.sum() > 0)
    if not clients:
        return {}, None
    updates = [contributions[client].update for client in clients]
    holders = [Holder.of(update) for update in updates]
    adapters = sent = [update.adapter for update in updates]
    sources, names = list(holders), list(clients)
    clustered = bool(how.clusters) and how.query != "identity"
    if clustered:
        labels = cluster(holders, how.clusters)
        members = [np.flatnonzero(labels == m).tolist() for m in range(labels.max() + 1)]
        sources = [together([holders[k] for k in group]) for group in members]
        adapters = [
            blend([adapters[k] for k in group], [holders[k].samples for k in group], recipe, recipe.rank)
            for group in members
        ]
        names = [f"cluster-{m}" for m in range(len(members))]
    weights = attention(how.query, holders, sources, how.tau_q, text)
    if not clustered:
        weights = keep_share(weights, how.own_share)
    rows = dict(zip(clients, weights.tolist(), strict=True))
    ranks = dict(zip(clients, map(rank_of, sent), strict=True))

    def make(group: Sequence[str]) -> Sequence[Adapter]:
        """Go layer by layer, so that each source's is read once for all of the group."""
        own: list[dict[str, FloatArray]] = [{} for _ in group]
        for layer in layers(common):
            parts, base = [_part(adapter, layer) for adapter in adapters], _part(common, layer)
            for client, done in zip(group, own, strict=True):
                mine = blend(parts, rows[client], recipe, ranks[client])
                if clustered and how.own_share:
                    both = [_part(contributions[client].update.adapter, layer), mine]
                    mine = blend(both, [how.own_share, 1.0 - how.own_share], recipe, ranks[client])
                done.update(below(how.cut, at_rank(base, ranks[client]), mine))
        return own

    at_once = max(1, TOGETHER_BYTES // max(1, sum(factor.nbytes for factor in common.values())))
    return OnDemand(clients, make, at_once), Attention(tuple(clients), tuple(names), weights, entropy(weights))


def blend(adapters: Sequence[Adapter], weights: Sequence[float], recipe: FederationRecipe, rank: int) -> Adapter:
    """Return the weighted mean of adapters by the recipe's algebra; sources without weight are left out."""
    kept = [(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if weight > 0.0]
    chosen, shares = [adapter for adapter, _ in kept], [weight for _, weight in kept]
    if len(kept) == 1 and rank_of(chosen[0]) == rank:
        return chosen[0]
    if recipe.aggregation == "mean_of_products":
        return mean_of_products(chosen, shares, rank)
    return mean_of_factors(chosen, shares)


def at_rank(adapter: Adapter, rank: int) -> Adapter:
    """Return the adapter at another rank: the best approximation of its B A, or the same product padded with zeros."""
    return adapter if rank_of(adapter) == rank else mean_of_products([adapter], [1.0], rank)


def _part(adapter: Adapter, layer: str) -> Adapter:
    return {name: adapter[name] for name in (layer + A, layer + B)}


def below(cut: int, common: Adapter, own: Adapter) -> Adapter:
    """Return `common` in blocks below the cut, `own` in the others."""
    return {name: common[name] if block_of(name) < cut else factor for name, factor in own.items()}
