"""The naive twin of a federation: from who was accepted in which round, what every round must have made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from clip_lora.shapes import adapter_shapes, initial_adapter
from clip_lora.towers import load_sizes
from coordinator.aggregate import Contribution
from coordinator.config import CoordinatorConfig
from coordinator.learning import Knowledge, Learner, stored
from coordinator.records import RoundRecord
from edge_client.checkpoint import Checkpoint
from protocol.codec import decode_update, encode_adapter, sha256
from protocol.events import PlanReady
from protocol.messages import RoundPlan
from protocol.transfer.parcel import pack
from tests.faults.machines import a_bank
from tests.faults.training import finish, training


def hashes(
    config: CoordinatorConfig, records: Sequence[RoundRecord], plans: Mapping[int, RoundPlan], folder: Path
) -> list[str]:
    """Return the hash of the initial global adapter, and of the one after each round, computed without any wire or store."""
    model = load_sizes(config.model)
    shapes = adapter_shapes(model, "vision", config.recipe.training(model.vision.blocks))
    learner = Learner(a_bank(), config.recipe, config.seed)
    known = Knowledge(a_bank(), stored(initial_adapter(shapes, config.seed)))
    found = [sha256(encode_adapter(known.adapter))]
    for record in records:
        if record.outcome == "aggregated":
            plan = plans[record.round]
            known, _ = learner.learn({c: _contribution(c, plan, known, folder) for c in record.accepted}, known)
        found.append(sha256(encode_adapter(known.adapter)))
    return found


def _contribution(client: str, plan: RoundPlan, known: Knowledge, folder: Path) -> Contribution:
    start = known.start_of(client, plan.recipe.rank) if plan.individual else known.adapter
    ready = PlanReady(plan, known.bank, start, sha256(encode_adapter(start)))
    parcel = pack(finish(training(ready, client, Checkpoint(folder / "none"))), plan.run)
    return Contribution(parcel.offer, decode_update(parcel.blob))
