"""One round's logic, as a plain object: events and the time in, verdicts out. It knows no MQTT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from coordinator.aggregate import Contribution
from coordinator.checks import Expectation, Late, check_counts, check_offer, check_update, rejected
from coordinator.judgement import Yardstick, too_large
from protocol.events import ClientSeen, CoordinatorEvent, OfferMade, OfferTooLarge, UpdateArrived, UpdateUnreadable
from protocol.messages import Offer, RoundPlan, Status, Update, Verdict

TRIES = 8


@dataclass(frozen=True)
class Answer:
    """A verdict to send."""

    client: str
    offer: Offer
    verdict: Verdict


@dataclass(frozen=True)
class Wanted:
    """An offer whose update should travel."""

    client: str
    offer: Offer


def refuse_all(event: CoordinatorEvent, oldest: int) -> Answer | None:
    """Answer an update that comes while no round is open. Those from round `oldest` on are left for the next one."""
    if isinstance(event, (OfferMade, UpdateArrived, UpdateUnreadable, OfferTooLarge)) and event.offer.round < oldest:
        return Answer(event.client, event.offer, check_offer(event.client, event.offer, None, ()))
    return None


class Collection:
    """Collects a round's updates until `quorum` are accepted or the deadline has passed.

    `accepted` and `refused` are what the round had before a restart. With a `yardstick`, those of the accepted updates that
    are too large are set aside: they do not count. That is judged anew, from all of them, whenever one is accepted.

    `late` says which earlier rounds' updates may still come, and `came_late` which of them had come before a restart. They
    count towards no quorum, and only while their client has no update of this round.
    """

    def __init__(
        self,
        expected: Expectation,
        quorum: int,
        now: float,
        accepted: Mapping[str, Contribution] | None = None,
        refused: Sequence[Answer] = (),
        yardstick: Yardstick | None = None,
        late: Mapping[int, Late] | None = None,
        came_late: Sequence[tuple[str, Contribution]] = (),
    ) -> None:
        self._expected = expected
        self._quorum = quorum
        self._deadline = now + expected.plan.deadline_s
        self._accepted = dict(accepted or {})
        self._late = dict(late or {})
        self._came_late: dict[str, Contribution] = {}
        self._came: set[tuple[str, int]] = set()  # all that came late, by client and round; the newest of a client counts
        for client, part in came_late:
            self._take_late(client, part)
        self._paused: float | None = None
        self._tries = Counter(answer.client for answer in refused)
        self._failed: set[str] = set()
        self.refused = list(refused)
        self._yardstick = yardstick
        self._sizes = {client: self._size(contribution.update) for client, contribution in self._accepted.items()}
        self._set_aside: dict[str, Verdict] = {}
        self._judge()

    @property
    def plan(self) -> RoundPlan:
        """The round's plan."""
        return self._expected.plan

    @property
    def accepted(self) -> Mapping[str, Contribution]:
        """The accepted updates by client, those that are set aside included."""
        return self._accepted

    @property
    def contributions(self) -> Mapping[str, Contribution]:
        """What the round is made of: what counts, and of who sent nothing else, what came late and is not too large."""
        late = {client: part for client, part in self._came_late.items() if client not in self._accepted}
        over = self._too_large({**self._sizes, **{client: self._size(part.update) for client, part in late.items()}})
        return {**{client: part for client, part in late.items() if client not in over}, **self.counted}

    @property
    def counted(self) -> Mapping[str, Contribution]:
        """The accepted updates that count towards the quorum."""
        return {client: part for client, part in self._accepted.items() if client not in self._set_aside}

    @property
    def set_aside(self) -> Mapping[str, Verdict]:
        """Who was told "accepted" and does not count, by client, and why: as the round stands now."""
        late = {client: part for client, part in self._came_late.items() if client not in self._accepted}
        over = self._too_large({**self._sizes, **{client: self._size(part.update) for client, part in late.items()}})
        return {**{client: too_large(over[client]) for client in late if client in over}, **self._set_aside}

    @property
    def has_quorum(self) -> bool:
        """Whether enough updates count."""
        return len(self.counted) >= self._quorum

    @property
    def silent(self) -> list[str]:
        """The participants that have not delivered an accepted update."""
        return sorted(set(self.plan.participants) - self._accepted.keys())

    @property
    def failed(self) -> list[str]:
        """Those of the silent that are not waited for: they said that they failed, were refused, or were cut off."""
        return sorted(self._out.intersection(self.silent))

    @property
    def _out(self) -> set[str]:
        return self._failed | {answer.client for answer in self.refused if answer.offer.round == self.plan.round}

    def patience(self, now: float) -> float:
        """Return how many seconds the round stays open: 0 with its quorum, without hope of one, or after its deadline.

        A client whose update was refused, or that says that it has failed, sends no other in the round: it counts no more.
        """
        awaited = set(self.plan.participants) - self._out - self._accepted.keys()
        # Whoever is awaited may also move the median, so that who is set aside now counts then.
        hopeless = not awaited or len(awaited | self._accepted.keys()) < self._quorum
        now = now if self._paused is None else self._paused
        return 0.0 if self.has_quorum or hopeless else max(0.0, self._deadline - now)

    def pause(self, since: float) -> None:
        """Let the deadline stand still from a moment on: nothing can arrive."""
        self._paused = since if self._paused is None else self._paused

    def resume(self, now: float) -> None:
        """Let the deadline go on, later by what it stood still."""
        if self._paused is not None:
            self._deadline += now - self._paused
            self._paused = None

    def lacks(self, answer: Answer) -> bool:
        """Whether an update that was accepted for this round, or late in it, is not here."""
        offer, client = answer.offer, answer.client
        if not answer.verdict.accepted:
            return False
        if offer.round in self._late:
            return (client, offer.round) not in self._came and client not in self._late[offer.round].counted
        return offer.round == self.plan.round and client not in self._accepted

    def recover(self, client: str, offer: Offer, update: Update) -> None:
        """Take in an update that was accepted before, unless it is here."""
        if self.lacks(Answer(client, offer, Verdict(True, "accepted"))):
            self._accept(client, offer, update)

    def rest(self, answer: Answer, update: Update) -> None:
        """Put an accepted update's twin in its place: the same values, with an adapter that stays on the disk."""
        for kept in (self._accepted, self._came_late):
            if answer.client in kept and kept[answer.client].offer == answer.offer:
                kept[answer.client] = replace(kept[answer.client], update=update)

    def take_back(self, answer: Answer) -> None:
        """Forget an answer that could not be kept: the update may come again."""
        for kept in (self._accepted, self._came_late):
            if answer.client in kept and kept[answer.client].offer == answer.offer:
                del kept[answer.client]
                self._came.discard((answer.client, answer.offer.round))
        if answer.client not in self._accepted:
            self._sizes.pop(answer.client, None)
        self._judge()
        self.refused = [other for other in self.refused if other is not answer]

    def give_up(self, client: str) -> None:
        """Wait no longer for a client: it was cut off."""
        self._failed.add(client)

    def take(self, event: CoordinatorEvent) -> Answer | Wanted | None:
        """Take in an event of the wire; an update gets its answer, an offer one too unless the update is wanted."""
        match event:
            case OfferMade(client=client, offer=offer):
                expected, counted = self._against(offer)
                verdict = check_offer(client, offer, expected, counted)
                if verdict.accepted and self._tries[client] >= TRIES:
                    verdict = rejected("too-many-tries", f"{TRIES} updates of this client were refused in this round")
                return Wanted(client, offer) if verdict.accepted else self._answer(Answer(client, offer, verdict))
            case UpdateArrived(client=client, offer=offer, update=update):
                return self._answer(Answer(client, offer, self._count(client, offer, update)))
            case UpdateUnreadable(client=client, offer=offer, problem=problem, reason=reason):
                return self._answer(Answer(client, offer, rejected(reason, problem)))
            case OfferTooLarge(client=client, offer=offer, problem=problem):
                return self._answer(Answer(client, offer, rejected("too-large", problem)))
            case ClientSeen(client=client, status=Status(phase=phase, round=number)):
                # A hint that only ends a wait for nothing: an update that comes all the same is taken as any other.
                if (phase, number) == ("failed", self.plan.round):
                    self._failed.add(client)
                elif phase in ("training", "uploading"):
                    self._failed.discard(client)
                return None
            case _:
                return None

    def _against(self, offer: Offer) -> tuple[Expectation, AbstractSet[str]]:
        """Return what an offer is held to, and whose updates of its round are here."""
        late = self._late.get(offer.round)
        if late is None:
            return self._expected, self._accepted.keys()
        came = {client for client, number in self._came if number == offer.round}
        return late.expected, came | set(late.counted)

    def _count(self, client: str, offer: Offer, update: Update) -> Verdict:
        expected, counted = self._against(offer)
        verdict = check_offer(client, offer, expected, counted)
        if verdict.accepted:
            verdict = check_update(client, update, expected)
        if verdict.accepted:
            verdict = check_counts(offer, update)
        if verdict.accepted:
            self._accept(client, offer, update)
        return verdict

    def _accept(self, client: str, offer: Offer, update: Update) -> None:
        late = self._late.get(offer.round)
        if late is None:
            self._accepted[client] = Contribution(offer, update)
            self._sizes[client] = self._size(update)
            self._judge()
        else:
            self._take_late(client, Contribution(offer, update, late.discount))

    def _take_late(self, client: str, part: Contribution) -> None:
        self._came.add((client, part.offer.round))
        if client not in self._came_late or self._came_late[client].offer.round < part.offer.round:
            self._came_late[client] = part

    def _size(self, update: Update) -> tuple[float, ...]:
        return () if self._yardstick is None else self._yardstick.sizes(update.adapter)

    def _too_large(self, sizes: Mapping[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        return {} if self._yardstick is None else self._yardstick.excess(sizes)

    def _judge(self) -> None:
        self._set_aside = {client: too_large(ratios) for client, ratios in self._too_large(self._sizes).items()}

    def _answer(self, answer: Answer) -> Answer:
        # What a client wrote may be in the detail: printable and short, as it goes into logs and records.
        detail = ascii(answer.verdict.detail)[1:-1][:300]
        answer = replace(answer, verdict=replace(answer.verdict, detail=detail))
        self._tries[answer.client] += not answer.verdict.accepted
        if not answer.verdict.accepted and not any(self._alike(answer, other) for other in self.refused):
            self.refused.append(answer)
        return answer

    def _alike(self, one: Answer, other: Answer) -> bool:
        """Whether two refusals tell the same: of what a device offers again and again one is enough."""
        here = (one.offer.round == self.plan.round) == (other.offer.round == self.plan.round)
        return here and (one.client, one.verdict.reason) == (other.client, other.verdict.reason)
