"""What a client does next, as a plain object: events in, steps out. No threads, no MQTT, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.work import Work, work_of
from protocol.events import Answered, ClientEvent, Finished, LinkChanged, NotDrawn, Noticed, PlanReady, Unreadable
from protocol.messages import RoundPlan, Status
from protocol.transfer.parcel import Parcel

NOT_DRAWN = "not drawn for this round"


@dataclass(frozen=True)
class Train:
    """Start training for this plan."""

    ready: PlanReady


@dataclass(frozen=True)
class Send:
    """Keep this update, then offer it until its receipt."""

    work: Work


@dataclass(frozen=True)
class Withdraw:
    """Stop offering: the round has moved on."""


@dataclass(frozen=True)
class Announce:
    """Tell everybody what this client is doing."""

    status: Status


@dataclass(frozen=True)
class Leave:
    """Take part no more: the coordinator has shut this device out."""

    problem: str


SHUT_OUT = ("cloned", "quarantined")
Step = Train | Send | Withdraw | Announce | Leave


class Participation:
    """One client's part in a federation. It trains at most one plan at a time, and each plan once.

    `done` is what it trained before a restart.
    """

    def __init__(self, status: Status, done: Work | None = None) -> None:
        self._status = status
        self._current: PlanReady | None = None
        self._training: PlanReady | None = None
        self._newest: RoundPlan | None = None
        self._done = done
        self._unanswered = done is not None
        self._held = ""
        self._sent_in: int | None = None  # start of the coordinator in which `done` was last offered

    @property
    def training(self) -> RoundPlan | None:
        """The plan that is being trained for."""
        return None if self._training is None else self._training.plan

    def on(self, event: ClientEvent) -> list[Step]:
        """Take in an event of the wire."""
        match event:
            case PlanReady():
                return self._planned(event)
            case NotDrawn(plan=plan):
                self._current, self._newest = None, plan
                steps = self._keep_offering(plan)
                if (self._status.phase, self._status.detail) == ("waiting", NOT_DRAWN):
                    return steps  # in a large fleet most are not drawn: they need not all say so in every round
                return [*steps, self._announce("waiting", plan.round, NOT_DRAWN)]
            case Finished(plan=plan):
                self._current, self._newest = None, plan
                return [*self._keep_offering(plan), self._announce("waiting", plan.round, "federation finished")]
            case Answered(receipt=receipt):
                self._unanswered = False
                verdict = "accepted" if receipt.accepted else f"rejected: {receipt.reason} {receipt.detail}".strip()
                phase = "waiting" if self._training is None else "training"
                return [self._announce(phase, receipt.round, f"update {verdict}"[:500])]
            case Unreadable(problem=problem, round=number):
                return [self._announce("failed", number, f"{problem}: the same clipcast on both sides?"[:500])]
            case Noticed(notice=notice):
                return [Leave(notice.detail)] if notice.reason in SHUT_OUT else []
            case LinkChanged():
                return []

    def trained(self, parcel: Parcel) -> list[Step]:
        """Take in a finished training: it is sent if its plan is still the current one, or the newest one takes it late."""
        trained, self._training = self._training, None
        if trained is None or self._newest is None:
            return []
        work, current = Work(work_of(trained), parcel), self._current
        if current is not None and work.key == work_of(current):
            return self._send(work, current.plan)
        if self._newest.takes_late(trained.plan.run, trained.plan.round):
            return [*self._send(work, self._newest), *([] if current is None else self._planned(current))]
        return [] if current is None else self._planned(current)

    def failed(self, problem: str) -> list[Step]:
        """Take in a failed training: everybody is told why."""
        number = self._training.plan.round if self._training else None
        self._training = None
        return [self._announce("failed", number, problem[:500])]

    def held(self, reason: str) -> list[Step]:
        """Take in why a training waits (empty: it does not): everybody is told, once."""
        if self._training is None or reason == self._held:
            return []
        self._held = reason
        return [self._announce("training", self._training.plan.round, f"waits: {reason}" if reason else "")]

    def missed(self, problem: str) -> list[Step]:
        """Take in a training that came to nothing: everybody is told why, and the client stays for the next plan."""
        missed, told = self._training, self.failed(problem)
        if missed is None or self._current is None or work_of(missed) == work_of(self._current):
            return told
        return [*told, *self._planned(self._current)]

    def _planned(self, ready: PlanReady) -> list[Step]:
        self._current, self._newest = ready, ready.plan
        plan, done = ready.plan, self._done
        if done is not None and done.key == work_of(ready):
            # Said again by the same coordinator, the offer stands. A restarted one may have been set back to an older state.
            return [] if self._sent_in == plan.start else [Withdraw(), *self._send(done, plan)]
        steps = self._keep_offering(plan)
        if self._training is not None:
            return steps
        self._training, self._held = ready, ""
        return [*steps, Train(ready), self._announce("training", plan.round)]

    def _keep_offering(self, plan: RoundPlan) -> list[Step]:
        """Withdraw what was offered for another round, unless it has had no answer and the newest plan takes it late."""
        done = self._done
        if done is None or not self._unanswered or not plan.takes_late(done.parcel.offer.run, done.parcel.offer.round):
            return [Withdraw()]
        if self._sent_in is None:  # from before a restart
            return self._send(done, plan)
        return []

    def _send(self, work: Work, plan: RoundPlan) -> list[Step]:
        self._done, self._sent_in, self._unanswered = work, plan.start, True
        return [Send(work), self._announce("uploading", work.parcel.offer.round)]

    def _announce(self, phase: str, number: int | None, detail: str = "") -> Announce:
        fields = {**self._status.model_dump(), "phase": phase, "round": number, "detail": detail}
        self._status = Status.model_validate(fields)
        return Announce(self._status)
