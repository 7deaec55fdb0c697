"""THE LOOP of the lab server: broadcast a plan, collect updates until quorum or deadline, aggregate, save, again."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from clip_lora.shapes import Shapes, adapter_shapes, initial_adapter
from coordinator.aggregate import Contribution
from coordinator.checks import Expectation, Late, Start
from coordinator.collection import Answer, Collection, Wanted, refuse_all
from coordinator.config import CoordinatorConfig
from coordinator.devices import Devices
from coordinator.errors import FederationError, NotKeptError
from coordinator.judgement import Yardstick
from coordinator.learning import NO_LESSON, Knowledge, Learner, Lesson, stored
from coordinator.model import LocalModel, Model
from coordinator.on_demand import OnDemand, each
from coordinator.records import AggregationRecord, AttentionRecord, Identity, Refusal, RoundRecord, TextRecord, mean_told
from coordinator.store import Opened, Store
from protocol.codec import encode_adapter, sha256
from protocol.coordinator_end import CoordinatorEnd
from protocol.events import BrokerLink, ClientSeen, Cloned, CoordinatorEvent, OfferMade, UpdateArrived, UpdateUnreadable
from protocol.link import Link
from protocol.messages import Recipe, RoundPlan, Status, TextBank

log = logging.getLogger(__name__)

POLL_S = 2.0
MISSED_ROUNDS = 3
AGAIN_S = 30.0
Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Phase:
    """What a round is for: what clients do, whether each starts from its own adapter, what is learned from their updates."""

    recipe: Recipe
    from_own: bool
    learn: Callable[[Mapping[str, Contribution], Knowledge], tuple[Knowledge, Lesson]]


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
        self._online: dict[str, Status] = {}
        self._run, self._start = "", 0
        model = LocalModel(config.model) if model is None else model
        self._sizes = model.sizes()
        self._training = config.recipe.training(self._sizes.vision.blocks)
        self._learner = Learner(bank, config.recipe, config.seed, model)
        self._last = config.rounds + config.recipe.rounds_after

    def run(self) -> Iterator[RoundRecord]:
        """Yield a record after each round; raises FederationError when the federation cannot go on."""
        self._await_link()
        self._run, self._start = self._insist(lambda: self._store.begin(self._identity()))
        number, known = self._insist(self._recall)
        missed = 0
        while number < self._last:
            number += 1
            started, collection = self._begin(number, known)
            self._collect(collection)
            lesson = NO_LESSON
            if collection.has_quorum:
                missed = 0
                with self._store.intact():
                    known, lesson = self._phase(number).learn(collection.contributions, known)
            else:
                missed += 1
            record = self._record(collection, lesson, known, self._clock() - started)
            known = self._insist(partial(self._store.finish, record, known, lesson))
            yield record
            if missed >= MISSED_ROUNDS:
                raise FederationError(
                    f"{missed} rounds in a row without a quorum of {self._config.quorum}; last waited for "
                    f"{', '.join(collection.silent)}. See their status and logs, or lower quorum or raise deadline_s"
                )
        self._publish(self._plan(number, known, {}))
        self._link.poll(0.0)

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
                for event in self._poll(left, None):
                    self._notice(event)
                    self._settle(event, None)
            pause = min(2 * pause, AGAIN_S)

    def _phase(self, number: int) -> Phase:
        """Return what a round is for: training, or after `rounds` of it the recipe's aligning and closing rounds."""
        training, recipe, personal = self._training, self._config.recipe, self._config.recipe.personal
        personalised = personal.query != "none"
        if number <= self._config.rounds:
            return Phase(training, personalised and personal.start == "own", self._learner.learn)
        # What was trained for an earlier round is of no use to the last ones.
        if recipe.aligns and number == self._config.rounds + 1:
            return Phase(training.model_copy(update={"local_steps": 0, "late_rounds": 0}), False, self._learner.align)
        changed = {"local_steps": personal.closing_steps, "features_per_class": 0, "late_rounds": 0}
        closing = training.model_copy(update=changed)
        return Phase(closing, personalised, self._learner.close)

    def _recall(self) -> tuple[int, Knowledge]:
        """Return the last finished round and what is known since; a new federation begins with round 0's."""
        shapes = adapter_shapes(self._sizes, "vision", self._training)
        number, known = self._store.resume(shapes, self._learner.text_shapes)
        if known is None:
            known = Knowledge(self._bank, stored(initial_adapter(shapes, self._config.seed)))
            self._store.start(known)
        return number, known

    def _identity(self) -> Identity:
        """Return what must stay the same from the first round to the last."""
        return Identity(
            federation=self._config.federation,
            model_digest=self._bank.model_digest,
            classes=self._bank.classes,
            rank=self._training.rank,
            alpha=self._training.alpha,
            projections=self._training.projections,
            first_block=self._training.first_block,
        )

    def _await_link(self) -> None:
        """Let the end learn the broker's limits, by which it cuts blobs, before anything is published."""
        deadline = self._clock() + self._config.deadline_s
        while not any(isinstance(event, BrokerLink) and event.up for event in self._link.poll(POLL_S)):
            if self._clock() > deadline:
                raise FederationError(f"the broker at {self._config.broker.url} did not come back: see its log")

    def _draw(self, number: int) -> tuple[str, ...]:
        """Wait for enough clients, at most a deadline long, and draw the round's participants by seed.

        After the deadline a quorum is enough: a device that is away for good must not stop the others.
        """
        wanted, deadline = self._config.clients_per_round, self._clock() + self._config.deadline_s
        while len(self._online) < wanted:
            left = deadline - self._clock()
            if left <= 0 and len(self._online) >= self._config.quorum:
                log.warning("round %d begins with %d of %d clients", number, len(self._online), wanted)
                break
            if left <= 0:
                present = ", ".join(sorted(self._online)) or "nobody"
                raise FederationError(
                    f"round {number} needs {self._config.quorum} clients, only {present} came within "
                    f"{self._config.deadline_s:g} s. Start more with `clipcast client run`, or lower quorum; check that "
                    f"they use federation {self._config.federation!r} and the same broker"
                )
            log.info("round %d waits for %d more clients", number, wanted - len(self._online))
            for event in self._poll(left, None):
                self._notice(event)
                self._settle(event, None, number - self._phase(number).recipe.late_rounds)
        rng = random.Random(f"{self._config.seed}:{number}")
        return tuple(sorted(rng.sample(sorted(self._online), min(wanted, len(self._online)))))

    def _begin(self, number: int, known: Knowledge) -> tuple[float, Collection]:
        """Publish a round's plan once it is in the journal; a round that a restart interrupted goes on with what it had."""
        opened = self._store.opened()
        ranks = opened.ranks if opened is not None else {client: self._rank(client) for client in self._draw(number)}
        started = self._clock()
        expected = self._plan(number, known, ranks)
        if opened is not None and not self._same(opened.plan, expected.plan):
            log.warning("the settings have changed while round %d was open: it begins anew", number)
            opened = None
        if opened is None:
            bases = {client: start.base for client, start in expected.starts.items()}
            self._insist(lambda: self._store.open(expected.plan, ranks, bases))
            opened = Opened(expected.plan, ranks, {}, ())
        elif opened.accepted:
            log.info("round %d goes on with the updates of %s", number, ", ".join(opened.accepted))
        self._publish(expected)
        late = self._late(number, expected)
        came_late = {
            client: Contribution(offer, update, late[offer.round].discount)
            for client, offer, update in opened.came_late
            if offer.round in late
        }
        recipe, begun = self._config.recipe, self._clock()
        yardstick = Yardstick.of(recipe) if recipe.defence.over_limit == "reject" else None
        had = (opened.accepted, opened.refused, yardstick, late, came_late)
        with self._store.intact():
            return started, Collection(expected, self._config.quorum, begun, *had)

    def _late(self, number: int, expected: Expectation) -> dict[int, Late]:
        """Return what updates of earlier rounds are held to that may still come in this one."""
        late: dict[int, Late] = {}
        for earlier in self._store.earlier(number, expected.plan.recipe.late_rounds):
            shapes = self._shapes(earlier.ranks)
            starts = {client: Start(earlier.bases[client], shapes[rank]) for client, rank in earlier.ranks.items()}
            discount = self._config.recipe.late_discount ** (number - earlier.plan.round)
            then = replace(expected, plan=earlier.plan, starts=starts)
            late[earlier.plan.round] = Late(then, earlier.counted, discount)
        return late

    def _shapes(self, ranks: Mapping[str, int]) -> dict[int, Shapes]:
        """Return the factors' shapes at each rank."""
        return {r: adapter_shapes(self._sizes, "vision", self._training.at_rank(r)) for r in set(ranks.values())}

    def _same(self, old: RoundPlan, new: RoundPlan) -> bool:
        """Whether updates for the old plan are updates for the new one."""
        one, other = (
            plan.model_dump(exclude={"start": True, "deadline_s": True, "adapter": {"chunk_size"}}) for plan in (old, new)
        )
        return one == other

    def _plan(self, number: int, known: Knowledge, ranks: Mapping[str, int]) -> Expectation:
        """Serve class bank and adapters, and make the plan; without participants it says that the federation is finished."""
        bank, actions = self._end.publish_bank(known.bank)
        self._link.do(actions)
        common = self._end.serve_adapter(known.adapter)
        phase = self._phase(min(number, self._last))
        individual, starts = self._starts(number, phase.from_own, known, ranks, common.sha256)
        plan = RoundPlan.model_validate(
            {
                "run": self._run,
                "start": self._start,
                "round": number,
                "state": "open" if ranks else "finished",
                "classes": bank.sha256,
                "adapter": common,
                "individual": individual,
                "participants": tuple(ranks),
                "recipe": phase.recipe,
                "seed": self._config.seed,
                "deadline_s": self._config.deadline_s,
                "seal_to": self._end.seal_to,
            }
        )
        return Expectation(plan, starts, known.bank.embeddings.shape[1], len(known.bank.classes))

    def _publish(self, expected: Expectation) -> None:
        self._link.do(self._end.publish_plan(expected.plan))

    def _starts(
        self, number: int, from_own: bool, known: Knowledge, ranks: Mapping[str, int], common: str
    ) -> tuple[bool, dict[str, Start]]:
        """Decide what each participant starts from, and announce it where it is not the global adapter for all."""
        shapes = self._shapes(ranks)
        if not from_own and set(ranks.values()) <= {self._training.rank}:
            frozen = known.adapter if self._training.freeze_a else None
            return False, {client: Start(common, shapes[rank], frozen) for client, rank in ranks.items()}
        if not from_own:
            known = replace(known, own={})
        starting = OnDemand(ranks, each(lambda client: known.start_of(client, ranks[client])))
        with self._store.intact():
            own = self._end.serve_client_adapters(self._run, number, starting)
        self._link.do(self._end.publish_client_adapters(own))
        starts = {
            client: Start(own[client].adapter.sha256, shapes[rank], starting[client] if self._training.freeze_a else None)
            for client, rank in ranks.items()
        }
        return True, starts

    def _rank(self, client: str) -> int:
        """Return the rank that a client trains: factors can be averaged at one rank only, products at any."""
        limit, rank = self._online[client].max_rank, self._training.rank
        return min(rank, limit) if limit is not None and self._config.recipe.mixes_ranks else rank

    def _collect(self, collection: Collection) -> None:
        """Take updates until quorum or deadline."""
        log.info("round %d: %s", collection.plan.round, ", ".join(collection.plan.participants))
        while (patience := collection.patience(self._clock())) > 0:
            for event in self._poll(patience, collection):
                self._notice(event)
                self._settle(event, collection)
        for client, verdict in collection.set_aside.items():
            log.warning("set aside %s: %s, %s", client, verdict.reason, verdict.detail)

    def _poll(self, seconds: float, collection: Collection | None) -> list[CoordinatorEvent]:
        """See who was cut off, and wait for events at most so long."""
        for client in self._devices.refresh() if self._devices is not None else ():
            revoked = self._devices is not None and self._devices.is_revoked(client)
            log.warning("device %s was %s: what is under way is given up", client, "revoked" if revoked else "replaced")
            self._online.pop(client, None)
            self._end.cut_off(client)
            if collection is not None and revoked:  # with another key it may still do its part
                collection.give_up(client)
        events = self._link.poll(min(seconds, POLL_S))
        for client in {event.client for event in events if isinstance(event, Cloned)}:
            self._shut_out(client, collection)
        return events

    def _shut_out(self, client: str, collection: Collection | None) -> None:
        """Take nothing more from two devices of one name; what was accepted before stays."""
        if client in self._online:
            log.error("two devices speak as %s with one key: both are shut out (`clipcast device list`)", client)
        if self._devices is not None:
            self._devices.quarantine(client)
        self._online.pop(client, None)
        self._end.give_up(client)
        if collection is not None:
            collection.give_up(client)

    def _notice(self, event: CoordinatorEvent) -> None:
        """Keep the roster, and tell the operator what matters."""
        match event:
            case ClientSeen(client=client, status=status):
                if status.state == "offline":
                    self._online.pop(client, None)
                else:
                    self._online[client] = status
                if status.phase == "failed":
                    log.warning("client %s failed: %s", client, status.detail)
            case BrokerLink(up=False, reason=reason):
                log.warning("lost the broker (%s), connecting again", reason)
            case _:
                log.debug("%s", event)

    def _settle(self, event: CoordinatorEvent, collection: Collection | None, oldest: int = 0) -> None:
        """Answer an update; what is accepted is in the journal before the client hears of it.

        Between rounds, without a collection, those from round `oldest` on are left for the next one.
        """
        earlier = self._store.answered(event.client, event.offer) if isinstance(event, OfferMade) else None
        if earlier is not None:
            self._reply(earlier)
            return
        match collection.take(event) if collection is not None else refuse_all(event, oldest):
            case Wanted(client=client, offer=offer):
                self._end.fetch(client, offer)
            case Answer() as answer:
                if collection is not None and isinstance(event, UpdateArrived | UpdateUnreadable):
                    try:
                        blob = event.blob if isinstance(event, UpdateArrived) else None
                        self._store.keep(answer, blob, collection.plan.round)
                    except FederationError as error:  # no receipt without it: the client offers it again
                        log.error("no receipt for %s: %s", answer.client, error)  # noqa: TRY400 - no bug, no traceback
                        collection.take_back(answer)
                        return
                    if isinstance(event, UpdateArrived) and answer.verdict.accepted:
                        collection.rest(answer, self._store.at_rest(event.update, event.blob))
                self._reply(answer)

    def _reply(self, answer: Answer) -> None:
        if not answer.verdict.accepted:
            log.warning("rejected %s: %s, %s", answer.client, answer.verdict.reason, answer.verdict.detail)
        self._link.do(self._end.answer(answer.client, answer.offer, answer.verdict))

    def _record(self, collection: Collection, lesson: Lesson, known: Knowledge, seconds: float) -> RoundRecord:
        """Sum up the round."""
        offers = {client: c.offer for client, c in sorted(collection.counted.items())}
        samples = sum(offer.samples for offer in offers.values())
        bytes_up, self._end.bytes_up = dict(sorted(self._end.bytes_up.items())), type(self._end.bytes_up)()
        text, attention = lesson.text, lesson.attention
        trained = collection.plan.recipe.local_steps > 0
        return RoundRecord(
            round=collection.plan.round,
            outcome="aggregated" if collection.has_quorum else "quorum-missed",
            accepted=list(offers),
            rejected=[
                Refusal(client=client, reason=verdict.reason, detail=verdict.detail)
                for client, verdict in [
                    *((answer.client, answer.verdict) for answer in collection.refused),
                    *collection.set_aside.items(),
                ]
            ],
            silent=collection.silent,
            late={client: c.offer.round for client, c in collection.contributions.items() if c.discount < 1.0},
            samples=samples,
            loss=mean_told((o.loss, o.samples) for o in offers.values()) if trained else None,
            train_accuracy=mean_told((o.accuracy, o.samples) for o in offers.values()),
            seconds=seconds,
            bytes_up=bytes_up,
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
