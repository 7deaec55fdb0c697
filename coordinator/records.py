"""What a federation says about itself: the record of every round, and what must stay the same between rounds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from coordinator.aggregate import Choice
from coordinator.personal import Attention
from coordinator.text_samples import TextLoss

LARGEST = 64


class Refusal(BaseModel):
    """A client's rejected updates of one reason: what was wrong with the first, and how many there were."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    client: str
    reason: str
    detail: str
    times: int = 1


class TextRecord(BaseModel):
    """The text side's training: weighted CE before and after, number of samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    loss_before: float
    loss_after: float
    samples: int

    @classmethod
    def of(cls, loss: TextLoss) -> TextRecord:
        """Return how a training went."""
        return cls(loss_before=loss.before, loss_after=loss.after, samples=loss.samples)


class AttentionRecord(BaseModel):
    """Who listened to whom: weights by client (rows) and source, and each row's entropy in nats.

    Of more than `LARGEST` clients the weights are left out: a thousand have a million of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    clients: list[str]
    sources: list[str]
    weights: list[list[float]]
    entropy: list[float]

    @classmethod
    def of(cls, attention: Attention) -> AttentionRecord:
        """Return an attention as lists."""
        return cls(
            clients=list(attention.clients),
            sources=list(attention.sources),
            weights=attention.weights.tolist() if len(attention.clients) <= LARGEST else [],
            entropy=attention.entropy.tolist(),
        )


class AggregationRecord(BaseModel):
    """How the global adapter was made: the method used, whom it left out, whose adapters were scaled down, and why if other.

    `note` is empty unless another method was used than the recipe's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    method: str
    left_out: list[str]
    clipped: list[str]
    note: str

    @classmethod
    def of(cls, choice: Choice, clipped: Sequence[str]) -> AggregationRecord:
        """Return how a round was averaged."""
        return cls(method=choice.method, left_out=list(choice.left_out), clipped=list(clipped), note=choice.note)


class RoundRecord(BaseModel):
    """What happened in a round. Bytes are payload bytes by client; loss and accuracy are the clients' own, weighted.

    `problem` is why a round has failed that had its quorum; `failed` names those of the silent that said they would send
    nothing, sent what was refused, or were cut off. `late` says whose updates of which earlier rounds counted, too, or would
    have if anything had come of the round.
    `class_accuracy` is the share of the clients' own pictures of a class that they predicted correctly after training;
    `own` names the clients whose own adapters the round made; `bank_version` is the class bank that goes with the global
    adapter, whose blob is named by `adapter_sha256`; `epsilon` is what each client has spent of its privacy so far.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    round: int
    outcome: Literal["aggregated", "quorum-missed", "failed"]
    problem: str = ""
    accepted: list[str]
    rejected: list[Refusal]
    silent: list[str]
    failed: list[str] = []
    late: dict[str, int] = {}
    samples: int
    loss: float | None
    train_accuracy: float | None
    seconds: float
    bytes_up: dict[str, int]
    bytes_down: dict[str, int]
    adapter_sha256: str
    bank_version: int
    text: TextRecord | None = None
    own: list[str] = []
    attention: AttentionRecord | None = None
    class_accuracy: dict[str, float] = {}
    epsilon: dict[str, float] = {}
    aggregation: AggregationRecord | None = None


def mean_told(told: Iterable[tuple[float | None, int]]) -> float | None:
    """Return the mean of values by their weights, of those that are told; None if none is."""
    known = [(value, weight) for value, weight in told if value is not None]
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known) if known else None


class Identity(BaseModel):
    """What must not change between a federation's rounds; an adapter means something only together with it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    federation: str
    model_digest: str
    classes: tuple[str, ...]
    rank: int
    alpha: float
    projections: tuple[str, ...]
    first_block: int


class Run(BaseModel):
    """One run of a federation, over all starts of its coordinator."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    starts: int
    identity: Identity
