"""One round's logic, as a plain object: events and the time in, verdicts out. It knows no MQTT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from coordinator.aggregate import Contribution
from coordinator.checks import Expectation, check_offer, check_update, rejected
from protocol.events import CoordinatorEvent, OfferTooLarge, UpdateArrived, UpdateUnreadable
from protocol.messages import Offer, RoundPlan, Verdict


@dataclass(frozen=True)
class Answer:
    """A verdict to send."""

    client: str
    offer: Offer
    verdict: Verdict


def refuse_all(event: CoordinatorEvent) -> Answer | None:
    """Answer an update that comes while no round is open."""
    if isinstance(event, (UpdateArrived, UpdateUnreadable, OfferTooLarge)):
        return Answer(event.client, event.offer, check_offer(event.client, event.offer, None, ()))
    return None


class Collection:
    """Collects a round's updates until `quorum` are accepted or the deadline has passed."""

    def __init__(self, expected: Expectation, quorum: int, now: float) -> None:
        self._expected = expected
        self._quorum = quorum
        self._deadline = now + expected.plan.deadline_s
        self._accepted: dict[str, Contribution] = {}
        self.refused: list[Answer] = []

    @property
    def plan(self) -> RoundPlan:
        """The round's plan."""
        return self._expected.plan

    @property
    def accepted(self) -> Mapping[str, Contribution]:
        """The accepted updates by client."""
        return self._accepted

    @property
    def has_quorum(self) -> bool:
        """Whether enough updates were accepted."""
        return len(self._accepted) >= self._quorum

    @property
    def silent(self) -> list[str]:
        """The participants that have not delivered an accepted update."""
        return sorted(set(self.plan.participants) - self._accepted.keys())

    def patience(self, now: float) -> float:
        """Return how many seconds the round stays open: 0 with its quorum, without hope of one, or after its deadline.

        A client whose update was refused sends no other in the round, so it counts no more.
        """
        refused = {answer.client for answer in self.refused if answer.offer.round == self.plan.round}
        hopeless = len(set(self.plan.participants) - (refused - self._accepted.keys())) < self._quorum
        return 0.0 if self.has_quorum or hopeless else max(0.0, self._deadline - now)

    def take(self, event: CoordinatorEvent) -> Answer | None:
        """Take in an event of the wire; an update gets its answer."""
        match event:
            case UpdateArrived(client=client, offer=offer, update=update):
                verdict = check_offer(client, offer, self._expected, self._accepted)
                if verdict.accepted:
                    verdict = check_update(client, update, self._expected)
                if verdict.accepted:
                    self._accepted[client] = Contribution(offer, update)
                return self._answer(Answer(client, offer, verdict))
            case UpdateUnreadable(client=client, offer=offer, problem=problem):
                return self._answer(Answer(client, offer, rejected("unreadable", problem)))
            case OfferTooLarge(client=client, offer=offer, problem=problem):
                return self._answer(Answer(client, offer, rejected("too-large", problem)))
            case _:
                return None

    def _answer(self, answer: Answer) -> Answer:
        # What a client wrote may be in the detail: printable and short, as it goes into logs and records.
        detail = ascii(answer.verdict.detail)[1:-1][:300]
        answer = replace(answer, verdict=replace(answer.verdict, detail=detail))
        if not answer.verdict.accepted:
            self.refused.append(answer)
        return answer
