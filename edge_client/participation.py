"""What a client does next, as a plain object: events in, steps out. No threads, no MQTT, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.events import Answered, ClientEvent, Finished, LinkChanged, PlanReady, Unreadable
from protocol.messages import RoundPlan, Status, TrainingResult


@dataclass(frozen=True)
class Train:
    """Start training for this plan."""

    ready: PlanReady


@dataclass(frozen=True)
class Send:
    """Offer this update until its receipt."""

    result: TrainingResult


@dataclass(frozen=True)
class Withdraw:
    """Stop offering: the round has moved on."""


@dataclass(frozen=True)
class Announce:
    """Tell everybody what this client is doing."""

    status: Status


Step = Train | Send | Withdraw | Announce


@dataclass(frozen=True)
class _Done:
    """A finished training, its plan, and for which start of the coordinator it was last sent."""

    result: TrainingResult
    key: tuple[str, int, str, str]
    start: int


class Participation:
    """One client's part in a federation. It trains at most one plan at a time, and each plan once."""

    def __init__(self, client_id: str, status: Status) -> None:
        self._id = client_id
        self._status = status
        self._current: PlanReady | None = None
        self._training: PlanReady | None = None
        self._done: _Done | None = None

    def on(self, event: ClientEvent) -> list[Step]:
        """Take in an event of the wire."""
        match event:
            case PlanReady():
                return self._planned(event)
            case Finished(plan=plan):
                self._current = None
                return [Withdraw(), self._announce("waiting", plan.round, "federation finished")]
            case Answered(receipt=receipt):
                verdict = "accepted" if receipt.accepted else f"rejected: {receipt.reason} {receipt.detail}".strip()
                return [self._announce("waiting", receipt.round, f"update {verdict}"[:500])]
            case Unreadable(problem=problem):
                return [self._announce("failed", None, f"{problem}: the same clipcast on both sides?"[:500])]
            case LinkChanged():
                return []

    def trained(self, result: TrainingResult) -> list[Step]:
        """Take in a finished training: it is sent if its plan is still the current one."""
        trained, self._training = self._training, None
        if trained is None or self._current is None:
            return []
        plan = self._current.plan
        if _key(trained.plan) != _key(plan):
            return self._planned(self._current)
        return self._send(result, plan)

    def failed(self, problem: str) -> list[Step]:
        """Take in a failed training: everybody is told why."""
        number = self._training.plan.round if self._training else None
        self._training = None
        return [self._announce("failed", number, problem[:500])]

    def _planned(self, ready: PlanReady) -> list[Step]:
        self._current = ready
        plan, done = ready.plan, self._done
        if self._id not in plan.participants:
            return [Withdraw(), self._announce("waiting", plan.round, "not drawn for this round")]
        if done is not None and done.key == _key(plan):
            # Said again by the same coordinator, the offer stands; a restarted one has forgotten what it accepted.
            return [] if done.start == plan.start else [Withdraw(), *self._send(done.result, plan)]
        if self._training is not None:
            return [Withdraw()]
        self._training = ready
        return [Withdraw(), Train(ready), self._announce("training", plan.round)]

    def _send(self, result: TrainingResult, plan: RoundPlan) -> list[Step]:
        self._done = _Done(result, _key(plan), plan.start)
        return [Send(result), self._announce("uploading", plan.round)]

    def _announce(self, phase: str, number: int | None, detail: str = "") -> Announce:
        fields = {**self._status.model_dump(), "phase": phase, "round": number, "detail": detail}
        self._status = Status.model_validate(fields)
        return Announce(self._status)


def _key(plan: RoundPlan) -> tuple[str, int, str, str]:
    return (plan.run, plan.round, plan.classes, plan.adapter.sha256)
