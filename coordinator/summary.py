"""A round summed up: what was collected and what was learned of it, as its record."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from coordinator.aggregate import Contribution
from coordinator.collection import Collection
from coordinator.learning import Knowledge, Lesson
from coordinator.records import AggregationRecord, AttentionRecord, Refusal, RoundRecord, TextRecord, mean_told
from protocol.codec import encode_adapter, sha256
from protocol.messages import Adapter


def summary(
    collection: Collection,
    lesson: Lesson,
    known: Knowledge,
    seconds: float,
    bytes_up: Mapping[str, int],
    problem: str = "",
) -> RoundRecord:
    """Return the record of a round that is over; `problem` says why nothing came of it though it had its quorum."""
    offers = {client: c.offer for client, c in sorted(collection.counted.items())}
    heard = {*collection.plan.participants, *collection.contributions}  # others may have said whatever, under any name
    samples = sum(offer.samples for offer in offers.values())
    refused = [(answer.client, answer.verdict, times) for answer, times in collection.refusals]
    aside = [(client, verdict, 1) for client, verdict in collection.set_aside.items()]
    text, attention = lesson.text, lesson.attention
    trained = collection.plan.recipe.local_steps > 0
    return RoundRecord(
        round=collection.plan.round,
        outcome="failed" if problem else "aggregated" if collection.has_quorum else "quorum-missed",
        problem=problem,
        accepted=list(offers),
        rejected=[
            Refusal(client=client, reason=verdict.reason, detail=verdict.detail, times=times)
            for client, verdict, times in [*refused, *aside]
        ],
        silent=collection.silent,
        failed=collection.failed,
        late={client: c.offer.round for client, c in collection.contributions.items() if c.discount < 1.0},
        samples=samples,
        loss=mean_told((o.loss, o.samples) for o in offers.values()) if trained else None,
        train_accuracy=mean_told((o.accuracy, o.samples) for o in offers.values()),
        seconds=seconds,
        bytes_up={client: size for client, size in sorted(bytes_up.items()) if client in heard},
        bytes_down={client: offer.bytes_received for client, offer in offers.items()},
        adapter_sha256=sha256(encode_adapter(known.adapter)),
        bank_version=known.bank.version,
        text=text and TextRecord.of(text),
        own=list(lesson.renewed),
        attention=attention and AttentionRecord.of(attention),
        class_accuracy=lesson.class_accuracy,
        epsilon={client: offer.epsilon for client, offer in offers.items() if offer.epsilon is not None},
        aggregation=lesson.choice and AggregationRecord.of(lesson.choice, lesson.clipped),
    )


def largest(contributions: Mapping[str, Contribution]) -> str:
    """Return whose adapter has the largest factor."""
    return max(sorted(contributions), key=lambda client: _height(contributions[client].update.adapter))


def _height(adapter: Adapter) -> float:
    return max(float(np.abs(adapter[name]).max(initial=0.0)) for name in adapter)
