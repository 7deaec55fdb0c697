"""THE LOOP of the lab server: broadcast a plan, collect updates until quorum or deadline, aggregate, save, again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from clip_lora.errors import ModelError
from clip_lora.shapes import initial_adapter
from coordinator.aggregate import Contribution
from coordinator.answering import Answering
from coordinator.checks import Expectation
from coordinator.collection import Collection
from coordinator.config import CoordinatorConfig
from coordinator.errors import FederationError, NotKeptError
from coordinator.judgement import Yardstick
from coordinator.learning import NO_LESSON, Knowledge, Learner, Lesson, stored
from coordinator.model import LocalModel, Model
from coordinator.planning import Planner, check_size, same
from coordinator.records import RoundRecord
from coordinator.roster import REMEMBERED, Roster
from coordinator.state.devices import Devices
from coordinator.state.store import Opened, Store
from coordinator.summary import largest, summary
from protocol.bus import Action
from protocol.coordinator_end import CoordinatorEnd
from protocol.events import BrokerLink, ClientSeen, Cloned, CoordinatorEvent
from protocol.link import Link
from protocol.messages import TextBank

log = logging.getLogger(__name__)

POLL_S = 2.0
MISSED_ROUNDS = 3
AGAIN_S = 30.0
SETTLE_S = 1.0
Kept = TypeVar("Kept")


class Federation:
    """A coordinator at work. `run` is the loop; the other methods are its steps."""

    def __init__(
        self,
        config: CoordinatorConfig,
        bank: TextBank,
        link: Link[CoordinatorEvent],
        end: CoordinatorEnd,
        store: Store,
        devices: Devices | None = None,
        clock: Callable[[], float] = time.monotonic,
        model: Model | None = None,
    ) -> None:
        """Make ready; without `model`, the configured one is held in this process. Raises ModelError."""
        self._clock = clock
        self._config = config
        self._bank = bank
        self._link = link
        self._end = end
        self._store = store
        self._devices = devices
        self._roster = Roster()
        self._settled = False
        self._down: float | None = None  # since when the broker is away
        self._answers = Answering(link, end, store, devices)
        model = LocalModel(config.model) if model is None else model
        self._learner = Learner(bank, config.recipe, config.seed, model)
        self._planner = Planner(config, model.sizes(), self._learner, end, store)

    def run(self) -> Iterator[RoundRecord]:
        """Yield a record after each round; raises FederationError when the federation cannot go on."""
        self._await_link()
        identity = self._planner.identity(self._bank)
        self._planner.run, self._planner.start = self._insist(lambda: self._store.begin(identity))
        number, known = self._insist(self._recall)
        for record in self._insist(partial(self._store.records, REMEMBERED)):
            self._roster.learn(record)
        missed = 0
        while number < self._planner.last:
            number += 1
            started, collection = self._begin(number, known)
            self._collect(collection)
            record, known = self._conclude(started, collection, known)
            self._tell_late(record)
            self._roster.learn(record)
            yield record
            missed = 0 if record.outcome == "aggregated" else missed + 1
            if missed >= MISSED_ROUNDS:
                raise FederationError(f"{missed} rounds in a row {self._why(collection, record)}")
        self._publish(*self._planner.plan(number, known, {}))
        self._say_the_end()

    def _conclude(self, started: float, collection: Collection, known: Knowledge) -> tuple[RoundRecord, Knowledge]:
        """Learn what there is in a round, and keep it; return its record, and what is known then.

        What updates make fail would fail again after each restart: they are in the journal. So the round is given up.
        """
        bytes_up = self._end.take_bytes_up()

        def finish(known: Knowledge, lesson: Lesson, problem: str = "") -> tuple[RoundRecord, Knowledge]:
            record = summary(collection, lesson, known, self._clock() - started, bytes_up, problem)
            return record, self._insist(partial(self._store.finish, record, known, lesson))

        if not collection.has_quorum:
            return finish(known, NO_LESSON)
        try:
            with self._store.models.intact():
                learned = self._planner.phase(collection.plan.round).learn(collection.contributions, known)
            return finish(*learned)  # clients' own adapters are made only now, one after another
        except (ValueError, ModelError) as error:  # WireError and numpy's LinAlgError are ValueErrors
            with self._store.models.intact():
                problem = f"{error}; the largest update is {largest(collection.contributions)}'s"
            log.exception("round %d comes to nothing: %s", collection.plan.round, problem)
        return finish(known, NO_LESSON, problem)

    def _tell_late(self, record: RoundRecord) -> None:
        """Tell whose late updates were accepted in a round that came to nothing: they count in no other."""
        for client, number in record.late.items() if record.outcome != "aggregated" else ():
            detail = f"the update of round {number} came late, in round {record.round}, and that came to nothing"
            log.warning("lost of %s: round-missed, %s", client, detail)
            self._link.do(self._end.notify(client, "round-missed", detail))

    def _why(self, collection: Collection, record: RoundRecord) -> str:
        if record.problem:
            return f"came to nothing: {record.problem}"
        return (
            f"without a quorum of {self._config.quorum}; last waited for {', '.join(collection.silent)}. See their status "
            f"and logs, or lower quorum or raise deadline_s"
        )

    def _say_the_end(self) -> None:
        """See to it that the broker has heard the last plan, for at most a deadline's time: clients would wait for ever."""
        deadline = self._clock() + self._config.deadline_s
        self._link.poll(0.0)
        while (self._down is not None or not self._link.bus.drained()) and self._clock() < deadline:
            for event in self._link.poll(POLL_S):
                self._notice(event)

    def _settle_roster(self) -> None:
        """Wait until those who are there have said so: who is drawn must not depend on whom a broker names first."""
        self._settled = True
        deadline, last = self._clock() + self._config.deadline_s, self._clock()
        while self._devices is not None and self._devices.active - set(self._roster) and self._clock() < deadline:
            before = len(self._roster)
            self._attend(SETTLE_S)
            if len(self._roster) > before:
                last = self._clock()
            elif self._clock() - last >= SETTLE_S:
                break

    def _insist(self, keep: Callable[[], Kept]) -> Kept:
        """Keep what the next step needs, again and again for at most a deadline's time while disk or database refuse it."""
        deadline, pause = self._clock() + self._config.deadline_s, 1.0
        while True:
            try:
                return keep()
            except NotKeptError as error:
                if self._clock() >= deadline:
                    raise
                log.error("%s. Trying again for %.0f s", error, deadline - self._clock())  # noqa: TRY400 - no bug
            again = self._clock() + pause
            while (left := again - self._clock()) > 0:
                self._attend(left)
            pause = min(2 * pause, AGAIN_S)

    def _recall(self) -> tuple[int, Knowledge]:
        """Return the last finished round and what is known since; a new federation begins with round 0's."""
        shapes = self._planner.shapes()
        number, known = self._store.resume(shapes, self._learner.text_shapes)
        if known is None:
            known = Knowledge(self._bank, stored(initial_adapter(shapes, self._config.seed)))
            self._store.start(known)
        return number, known

    def _await_link(self) -> None:
        """Let the end learn the broker's limits, by which it cuts blobs, before anything is published."""
        deadline = self._clock() + self._config.deadline_s
        while not any(isinstance(event, BrokerLink) and event.up for event in self._link.poll(POLL_S)):
            if self._clock() > deadline:
                raise FederationError(f"the broker at {self._config.broker.url} did not come back: see its log")

    def _draw(self, number: int) -> dict[str, int]:
        """Wait for enough clients, at most a deadline long, and draw the round's participants by seed; return their ranks.

        After the deadline a quorum is enough: a device that is away for good must not stop the others.
        """
        wanted, deadline = self._config.clients_per_round, self._clock() + self._config.deadline_s
        for client in self._roster.expire(self._clock()) if self._down is None else ():
            log.warning("client %s has said nothing for long: it is not drawn", client)
        while len(self._roster) < wanted or self._down is not None:
            left = deadline - self._clock()
            if left <= 0 and self._down is not None:
                raise self._broker_away()
            if left <= 0 and len(self._roster) >= self._config.quorum:
                log.warning("round %d begins with %d of %d clients", number, len(self._roster), wanted)
                break
            if left <= 0:
                present = ", ".join(self._roster) or "nobody"
                raise FederationError(
                    f"round {number} needs {self._config.quorum} clients, only {present} came within "
                    f"{self._config.deadline_s:g} s. Start more with `clipcast client run`, or lower quorum; check that "
                    f"they use federation {self._config.federation!r} and the same broker"
                )
            log.info("round %d waits for %d more clients", number, max(0, wanted - len(self._roster)))
            self._attend(left, oldest=number - self._planner.phase(number).recipe.late_rounds)
        if not self._settled:
            self._settle_roster()
        drawn = self._roster.draw(number, wanted, self._config.seed)
        return {client: self._planner.rank(self._roster.status(client)) for client in drawn}

    def _begin(self, number: int, known: Knowledge) -> tuple[float, Collection]:
        """Publish a round's plan once it is in the journal; a round that a restart interrupted goes on with what it had."""
        opened = self._insist(self._store.opened)
        if opened is not None and not self._planner.suits(opened.ranks):
            log.warning("the settings have changed while round %d was open: it begins anew, with other participants", number)
            opened = None
        ranks = opened.ranks if opened is not None else self._draw(number)
        started = self._clock()
        expected, announced = self._planner.plan(number, known, ranks)
        if opened is not None and not same(opened.plan, expected.plan):
            log.warning("the settings have changed while round %d was open: it begins anew", number)
            opened = None
        if opened is None:
            # Before it is in the journal, which would hold a restart to it.
            check_size(self._config.federation, expected.plan)
            bases = {client: start.base for client, start in expected.starts.items()}
            self._insist(lambda: self._store.open(expected.plan, ranks, bases))
            opened = Opened(expected.plan, ranks, {}, ())
        elif opened.accepted:
            log.info("round %d goes on with the updates of %s", number, ", ".join(opened.accepted))
        self._publish(expected, announced)
        late = self._insist(lambda: self._planner.late(number, expected, known))
        came_late = [
            (client, Contribution(offer, update, late[offer.round].discount))
            for client, offer, update in opened.came_late
            if offer.round in late
        ]
        recipe, begun = self._config.recipe, self._clock()
        yardstick = Yardstick.of(recipe) if recipe.defence.over_limit == "reject" else None
        had = (opened.accepted, opened.refused, yardstick, late, came_late)
        with self._store.models.intact():
            collection = Collection(expected, self._config.quorum, begun, *had)
        for client in self._devices.shut_out if self._devices is not None else ():
            collection.give_up(client)  # also if it was shut out while nobody was here to see it
        return started, collection

    def _publish(self, expected: Expectation, announced: list[Action]) -> None:
        self._link.do([*announced, *self._end.publish_plan(expected.plan)])

    def _collect(self, collection: Collection) -> None:
        """Take updates until quorum or deadline, which stands still while the broker is away."""
        log.info("round %d: %s", collection.plan.round, ", ".join(collection.plan.participants))
        for early in self._answers.between.take():
            self._answers.settle(early, collection)
        while (patience := collection.patience(self._clock())) > 0:
            self._attend(patience, collection)
            if self._down is None:
                collection.resume(self._clock())
            else:
                collection.pause(self._down)
                if self._clock() - self._down > self._config.deadline_s:
                    raise self._broker_away()
        self._ask_for_unheard(collection)
        for client, verdict in collection.set_aside.items():
            log.warning("set aside %s: %s, %s", client, verdict.reason, verdict.detail)
            self._link.do(self._end.notify(client, verdict.reason, verdict.detail))

    def _ask_for_unheard(self, collection: Collection) -> None:
        """Take in what the journal may have though nobody heard of it: after a restart it would count."""
        for answer in self._answers.take_unheard():
            kept = self._insist(partial(self._store.answered, answer.client, answer.offer))
            if kept is not None and collection.lacks(kept):
                self._insist(partial(self._answers.take_in, collection))

    def _broker_away(self) -> FederationError:
        return FederationError(
            f"the broker at {self._config.broker.url} was away for {self._config.deadline_s:g} s: see its log. The same "
            f"command goes on with the open round"
        )

    def _attend(self, seconds: float, collection: Collection | None = None, oldest: int = 0) -> None:
        """Wait at most so long, and see to what happens; `oldest` as for Answering.settle."""
        for event in self._poll(seconds, collection):
            self._notice(event)
            self._answers.settle(event, collection, oldest)

    def _poll(self, seconds: float, collection: Collection | None) -> list[CoordinatorEvent]:
        """See who was cut off, and wait for events at most so long."""
        for client in self._devices.refresh() if self._devices is not None else ():
            revoked = self._devices is not None and self._devices.is_revoked(client)
            log.warning("device %s was %s: what is under way is given up", client, "revoked" if revoked else "replaced")
            self._roster.drop(client)
            self._answers.between.drop(client)
            self._end.cut_off(client)
            if collection is not None and revoked:  # with another key it may still do its part
                collection.give_up(client)
        events = self._link.poll(min(seconds, POLL_S))
        for client in {event.client for event in events if isinstance(event, Cloned)}:
            self._shut_out(client, collection)
        return events

    def _shut_out(self, client: str, collection: Collection | None) -> None:
        """Take nothing more from two devices of one name; what was accepted before stays."""
        if client in self._roster:
            log.error("two devices speak as %s with one key: both are shut out (`clipcast device list`)", client)
        if self._devices is not None:
            self._devices.quarantine(client)
        self._roster.drop(client)
        self._answers.between.drop(client)
        self._end.give_up(client)
        if collection is not None:
            collection.give_up(client)

    def _notice(self, event: CoordinatorEvent) -> None:
        """Keep the roster, and tell the operator what matters."""
        match event:
            case ClientSeen(client=client, status=status):
                self._roster.hear(client, status, self._clock())
                if status.phase == "failed" and self._answers.is_news(client, "failed"):
                    log.warning("client %s failed: %s", client, ascii(status.detail)[1:-1])
            case BrokerLink(up=False, reason=reason):
                log.warning("lost the broker (%s), connecting again", reason)
                self._down = self._clock() if self._down is None else self._down
            case BrokerLink(up=True):
                self._down = None
                self._roster.reconnected(self._clock())
            case _:
                log.debug("%s", event)
