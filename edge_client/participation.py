"""What a client does next, as a plain object: events in, steps out. No threads, no MQTT, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.events import Answered, ClientEvent, Finished, LinkChanged, NotDrawn, PlanReady, Unreadable
from protocol.messages import Status, TrainingResult


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

    def __init__(self, status: Status) -> None:
        self._status = status
        self._current: PlanReady | None = None
        self._training: PlanReady | None = None
        self._done: _Done | None = None

    def on(self, event: ClientEvent) -> list[Step]:
        """Take in an event of the wire."""
        match event:
            case PlanReady():
                return self._planned(event)
            case NotDrawn(plan=plan):
                self._current = None
                return [Withdraw(), self._announce("waiting", plan.round, "not drawn for this round")]
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
        if _key(trained) != _key(self._current):
            return self._planned(self._current)
        return self._send(result, self._current)

    def failed(self, problem: str) -> list[Step]:
        """Take in a failed training: everybody is told why."""
        number = self._training.plan.round if self._training else None
        self._training = None
        return [self._announce("failed", number, problem[:500])]

    def _planned(self, ready: PlanReady) -> list[Step]:
        self._current = ready
        plan, done = ready.plan, self._done
        if done is not None and done.key == _key(ready):
            # Said again by the same coordinator, the offer stands; a restarted one has forgotten what it accepted.
            return [] if done.start == plan.start else [Withdraw(), *self._send(done.result, ready)]
        if self._training is not None:
            return [Withdraw()]
        self._training = ready
        return [Withdraw(), Train(ready), self._announce("training", plan.round)]

    def _send(self, result: TrainingResult, ready: PlanReady) -> list[Step]:
        self._done = _Done(result, _key(ready), ready.plan.start)
        return [Send(result), self._announce("uploading", ready.plan.round)]

    def _announce(self, phase: str, number: int | None, detail: str = "") -> Announce:
        fields = {**self._status.model_dump(), "phase": phase, "round": number, "detail": detail}
        self._status = Status.model_validate(fields)
        return Announce(self._status)


def _key(ready: PlanReady) -> tuple[str, int, str, str]:
    return (ready.plan.run, ready.plan.round, ready.plan.classes, ready.base)
