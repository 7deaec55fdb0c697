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


_Kind = tuple[str, str, bool]  # a refusal's client and reason, and whether it is of this round: only those end a wait


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
        self._paused: float | None = None
        self._tries: Counter[str] = Counter()
        self._failed: set[str] = set()
        self._refused: dict[_Kind, tuple[Answer, int]] = {}
        for answer in refused:
            self._refuse(answer)
        self._yardstick = yardstick
        self._sizes = {client: self._size(contribution.update) for client, contribution in self._accepted.items()}
        self._came_late: dict[tuple[str, int], Contribution] = {}  # of a client the newest counts, all are here
        self._late_sizes: dict[tuple[str, int], tuple[float, ...]] = {}
        for client, part in came_late:
            self._take_late(client, part)
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
    def refused(self) -> list[Answer]:
        """The refusals, of a client and reason the first."""
        return [answer for answer, _ in self._refused.values()]

    @property
    def refusals(self) -> list[tuple[Answer, int]]:
        """The refusals, of a client and reason the first, and how many there were."""
        return list(self._refused.values())

    @property
    def contributions(self) -> Mapping[str, Contribution]:
        """What the round is made of: what counts, and of who sent nothing else, what came late and is not too large."""
        over = self._late_too_large()
        late = {client: self._came_late[key] for client, key in self._newest().items() if client not in over}
        return {**late, **self.counted}

    @property
    def counted(self) -> Mapping[str, Contribution]:
        """The accepted updates that count towards the quorum."""
        return {client: part for client, part in self._accepted.items() if client not in self._set_aside}

    @property
    def set_aside(self) -> Mapping[str, Verdict]:
        """Who was told "accepted" and does not count, by client, and why: as the round stands now."""
        return {**{client: too_large(ratios) for client, ratios in self._late_too_large().items()}, **self._set_aside}

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
            return (client, offer.round) not in self._came_late and client not in self._late[offer.round].counted
        return offer.round == self.plan.round and client not in self._accepted

    def recover(self, client: str, offer: Offer, update: Update) -> None:
        """Take in an update that was accepted before, unless it is here."""
        if self.lacks(Answer(client, offer, Verdict(True, "accepted"))):
            self._accept(client, offer, update)

    def rest(self, answer: Answer, update: Update) -> None:
        """Put an accepted update's twin in its place: the same values, with an adapter that stays on the disk."""
        client, key = answer.client, (answer.client, answer.offer.round)
        if self._is_here(self._accepted.get(client), answer):
            self._accepted[client] = replace(self._accepted[client], update=update)
        if self._is_here(self._came_late.get(key), answer):
            self._came_late[key] = replace(self._came_late[key], update=update)

    def take_back(self, answer: Answer) -> None:
        """Forget an answer that could not be kept: the update may come again."""
        client, key = answer.client, (answer.client, answer.offer.round)
        if not answer.verdict.accepted:
            first, times = self._refused.pop(self._kind(answer))
            self._tries[answer.client] -= 1
            if times > 1:
                self._refused[self._kind(answer)] = first, times - 1
        elif self._is_here(self._came_late.get(key), answer):
            del self._came_late[key], self._late_sizes[key]
        elif self._is_here(self._accepted.get(client), answer):
            del self._accepted[client], self._sizes[client]
            self._judge()

    @staticmethod
    def _is_here(part: Contribution | None, answer: Answer) -> bool:
        return part is not None and part.offer == answer.offer

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
        came = {client for client, number in self._came_late if number == offer.round}
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
        self._came_late[client, part.offer.round] = part
        self._late_sizes[client, part.offer.round] = self._size(part.update)

    def _newest(self) -> dict[str, tuple[str, int]]:
        """Return where the newest late update is of those who sent none of this round."""
        return {client: (client, number) for client, number in sorted(self._came_late) if client not in self._accepted}

    def _late_too_large(self) -> dict[str, tuple[float, ...]]:
        """Return which late ones are above the limit, of a median that they move; those in time are judged without them."""
        newest = self._newest()
        over = self._too_large({**self._sizes, **{client: self._late_sizes[key] for client, key in newest.items()}})
        return {client: ratios for client, ratios in over.items() if client in newest}

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
        if not answer.verdict.accepted:
            self._refuse(answer)
        return answer

    def _refuse(self, answer: Answer) -> None:
        """Note a refusal: of what a device offers again and again the first, and how often."""
        first, times = self._refused.get(self._kind(answer), (answer, 0))
        self._refused[self._kind(answer)] = first, times + 1
        self._tries[answer.client] += 1

    def _kind(self, answer: Answer) -> _Kind:
        return answer.client, answer.verdict.reason, answer.offer.round == self.plan.round
