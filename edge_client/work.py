"""What identifies a training: two with equal keys have equal results, bit for bit, on one device."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from protocol.events import PlanReady
from protocol.transfer.parcel import Parcel


@dataclass(frozen=True)
class Work:
    """A finished training: its update, and the hash of all that it was made from."""

    key: str
    parcel: Parcel


def work_of(ready: PlanReady, *more: object) -> str:
    """Return the hash of all that a training depends on besides the device and its pictures, and of `more`."""
    plan = ready.plan
    # With another key to seal to, what was sealed before is of no use: it counts as another training.
    parts = [plan.run, plan.round, plan.classes, ready.base, plan.seed, plan.recipe.model_dump(mode="json"), plan.seal_to]
    return hashlib.sha256(json.dumps([*parts, *more], sort_keys=True).encode()).hexdigest()
