"""Is an update any good? The answer is a verdict, never an exception. Cheapest checks first."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from clip_lora.algebra import A
from protocol.buckets import bucket, most
from protocol.codec import largest_update
from protocol.messages import Adapter, Offer, RoundPlan, Update, Verdict
from protocol.trust.sealing import SEALING_BYTES

ACCEPTED = Verdict(accepted=True)
UNIT_TOLERANCE = 0.05


@dataclass(frozen=True)
class Start:
    """What a client starts a round from: the hash of its adapter, the factors' shapes, and the adapter if A is frozen."""

    base: str
    shapes: dict[str, tuple[int, int]]
    frozen: Adapter | None = None


@dataclass(frozen=True)
class Expectation:
    """What updates of this round must look like: the plan, each participant's start, width and number of classes."""

    plan: RoundPlan
    starts: Mapping[str, Start]
    width: int
    classes: int

    def most_bytes(self, client: str) -> int:
        """Return how many bytes this participant's update can have at most, sealed or not."""
        features = self.plan.recipe.features_per_class
        return largest_update(self.starts[client].shapes, self.width, self.classes, features) + SEALING_BYTES


@dataclass(frozen=True)
class Late:
    """What updates of an earlier round must look like that come now, who has delivered then, and what those weigh."""

    expected: Expectation
    counted: Collection[str]
    discount: float


def rejected(reason: str, detail: str) -> Verdict:
    """Return a rejection; reasons are listed in docs/operations.md."""
    return Verdict(accepted=False, reason=reason, detail=detail)


def check_offer(client: str, offer: Offer, expected: Expectation | None, counted: Collection[str]) -> Verdict:
    """Check what the offer says about itself."""
    if expected is None or offer.round != expected.plan.round:
        current = "no round is open" if expected is None else f"round {expected.plan.round} is open"
        return rejected("stale-round", f"the update is for round {offer.round}, {current}")
    if offer.run not in (None, expected.plan.run):
        return rejected("stale-round", f"the update is for run {offer.run} of the federation, this is {expected.plan.run}")
    start = expected.starts.get(client)
    if start is None:
        return rejected("not-invited", "this client was not drawn for the round")
    if offer.base != start.base:
        return rejected(
            "wrong-base", f"trained from adapter {offer.base[:12]}, the round began with {start.base[:12]} for this client"
        )
    if offer.samples != bucket(offer.samples):
        return rejected("bad-counts", f"{offer.samples} samples: counts are told to 4 significant bits")
    if client in counted:
        return rejected("already-counted", "another update of this client was accepted in this round")
    largest = expected.most_bytes(client)
    if offer.blob.size > largest:
        return rejected("too-large", f"{offer.blob.size} bytes, an update of this round has at most {largest}")
    return ACCEPTED


def check_update(client: str, update: Update, expected: Expectation) -> Verdict:
    """Check the arrays: names, shapes, finite values, and that prototypes and features are what they claim to be."""
    start = expected.starts[client]
    return (
        _check_adapter(update, start.shapes)
        or _check_frozen(update, start.frozen)
        or _check_features(update, expected)
        or ACCEPTED
    )


def check_counts(offer: Offer, update: Update) -> Verdict:
    """Check that prototypes' counts are in buckets (protocol/buckets.py), and no more in all than samples were told."""
    counts = [int(count) for count in update.prototype_counts]
    odd = [count for count in counts if count != bucket(count)]
    if odd:
        return rejected("bad-counts", f"a prototype of {odd[0]} samples: counts are told to 4 significant bits")
    if sum(counts) > most(offer.samples):
        return rejected("bad-counts", f"prototypes of {sum(counts)} samples, the offer told {offer.samples}")
    return ACCEPTED


def _check_adapter(update: Update, shapes: dict[str, tuple[int, int]]) -> Verdict | None:
    if update.adapter.keys() != shapes.keys():
        odd = sorted(update.adapter.keys() ^ shapes.keys())
        return rejected("wrong-names", f"{len(odd)} factors are missing or unknown, first {odd[0]}"[:300])
    for name, shape in shapes.items():
        if update.adapter[name].shape != shape:
            return rejected("wrong-shapes", f"{name} is {update.adapter[name].shape}, the round trains {shape}")
    for name, factor in update.adapter.items():
        if not np.all(np.isfinite(factor)):
            return rejected("not-finite", f"{name} holds NaN or infinity")
    return None


def _check_frozen(update: Update, start: Adapter | None) -> Verdict | None:
    for name, factor in (start or {}).items():
        if name.endswith(A) and not np.array_equal(update.adapter[name], factor.astype(np.float16)):
            return rejected("frozen-factor-changed", f"{name} is not what the round started from")
    return None


def _check_features(update: Update, expected: Expectation) -> Verdict | None:
    for name, rows, indices in (
        ("prototypes", update.prototypes, update.prototype_classes),
        ("features", update.features, update.labels),
    ):
        if rows.shape[1] != expected.width and len(rows):
            return rejected("wrong-shapes", f"{name} are {rows.shape[1]} wide, the model's are {expected.width}")
        if not np.all(np.isfinite(rows)):
            return rejected("not-finite", f"{name} hold NaN or infinity")
        if np.any(indices < 0) or np.any(indices >= expected.classes):
            return rejected("unknown-class", f"{name} name a class outside 0 to {expected.classes - 1}")
        if np.any(np.abs(np.linalg.norm(rows, axis=1) - 1.0) > UNIT_TOLERANCE):
            return rejected("not-unit", f"{name} are not of unit length")
    least = expected.plan.recipe.min_prototype_count
    if np.any(update.prototype_counts < least) or len(set(update.prototype_classes.tolist())) != len(update.prototypes):
        return rejected("bad-counts", f"every prototype needs its own class and a count of at least {least}")
    told = update.prototype_counts[: len(update.prototype_correct)]  # all, or none
    if np.any(update.prototype_correct < 0) or np.any(update.prototype_correct > told):
        return rejected("bad-counts", "of a class's samples, 0 to all can be predicted correctly")
    most = np.bincount(update.labels, minlength=1).max(initial=0)
    if most > expected.plan.recipe.features_per_class:
        return rejected(
            "too-many-features", f"{most} features of one class, {expected.plan.recipe.features_per_class} allowed"
        )
    return None
