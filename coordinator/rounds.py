"""THE LOOP of the lab server: broadcast a plan, collect updates until quorum or deadline, aggregate, save, again."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator

from clip_lora.lora import Shapes, adapter_shapes, initial_adapter
from clip_lora.towers import load_config
from coordinator.aggregate import aggregate
from coordinator.checks import Expectation
from coordinator.collection import Answer, Collection, refuse_all
from coordinator.config import CoordinatorConfig
from coordinator.errors import FederationError
from coordinator.store import Identity, Refusal, RoundRecord, Store
from protocol.coordinator_end import CoordinatorEnd
from protocol.events import BrokerLink, ClientSeen, CoordinatorEvent
from protocol.link import Link
from protocol.messages import Adapter, RoundPlan, Status, TextBank

log = logging.getLogger(__name__)

POLL_S = 5.0
MISSED_ROUNDS = 3


class Federation:
    """A coordinator at work. `run` is the loop; the other methods are its steps."""

    def __init__(
        self, config: CoordinatorConfig, bank: TextBank, link: Link[CoordinatorEvent], end: CoordinatorEnd, store: Store
    ) -> None:
        self._config = config
        self._bank = bank
        self._link = link
        self._end = end
        self._store = store
        self._online: dict[str, Status] = {}
        self._run, self._start = "", 0
        self._shapes: Shapes = adapter_shapes(load_config(config.model), "vision", config.recipe)

    def run(self) -> Iterator[RoundRecord]:
        """Yield a record after each round; raises FederationError when the federation cannot go on."""
        self._await_link()
        self._run, self._start = self._store.begin(self._identity())
        number, adapter = self._store.resume(self._shapes)
        if adapter is None:
            adapter = initial_adapter(self._shapes, self._config.seed)
            self._store.save_adapter(0, adapter)
        self._store.save_bank(self._bank)
        bank_ref, actions = self._end.publish_bank(self._bank)
        self._link.do(actions)
        missed = 0
        while number < self._config.rounds:
            number += 1
            participants = self._draw(number)
            plan = self._plan(number, "open", bank_ref.sha256, adapter, participants)
            started = time.monotonic()
            collection = self._collect(plan)
            if collection.has_quorum:
                missed = 0
                accepted = collection.accepted
                adapter = aggregate(accepted, self._config.aggregation, self._config.recipe.rank)
            else:
                missed += 1
            record = self._record(collection, adapter, time.monotonic() - started)
            self._store.save_record(record)
            yield record
            if missed >= MISSED_ROUNDS:
                raise FederationError(
                    f"{missed} rounds in a row without a quorum of {self._config.quorum}; last waited for "
                    f"{', '.join(collection.silent)}. See their status and logs, or lower quorum or raise deadline_s"
                )
        self._plan(number, "finished", bank_ref.sha256, adapter, ())
        self._link.poll(0.0)

    def _identity(self) -> Identity:
        """Return what must stay the same from the first round to the last."""
        recipe = self._config.recipe
        return Identity(
            federation=self._config.federation,
            model_digest=self._bank.model_digest,
            classes=self._bank.classes,
            rank=recipe.rank,
            alpha=recipe.alpha,
            projections=recipe.projections,
            first_block=recipe.first_block,
        )

    def _await_link(self) -> None:
        """Let the end learn the broker's limits, by which it cuts blobs, before anything is published."""
        deadline = time.monotonic() + self._config.deadline_s
        while not any(isinstance(event, BrokerLink) and event.up for event in self._link.poll(POLL_S)):
            if time.monotonic() > deadline:
                raise FederationError(f"the broker at {self._config.broker.url} did not come back: see its log")

    def _draw(self, number: int) -> tuple[str, ...]:
        """Wait for enough clients, at most a deadline long, and draw the round's participants by seed.

        After the deadline a quorum is enough: a device that is away for good must not stop the others.
        """
        wanted, deadline = self._config.clients_per_round, time.monotonic() + self._config.deadline_s
        while len(self._online) < wanted:
            left = deadline - time.monotonic()
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
            for event in self._link.poll(min(left, POLL_S)):
                self._notice(event)
                self._reply(refuse_all(event))
        rng = random.Random(f"{self._config.seed}:{number}")
        return tuple(sorted(rng.sample(sorted(self._online), min(wanted, len(self._online)))))

    def _plan(self, number: int, state: str, classes: str, adapter: Adapter, participants: tuple[str, ...]) -> RoundPlan:
        """Serve the adapter and publish the plan."""
        plan = RoundPlan.model_validate(
            {
                "run": self._run,
                "start": self._start,
                "round": number,
                "state": state,
                "classes": classes,
                "adapter": self._end.serve_adapter(adapter),
                "participants": participants,
                "recipe": self._config.recipe,
                "seed": self._config.seed,
                "deadline_s": self._config.deadline_s,
            }
        )
        self._link.do(self._end.publish_plan(plan))
        return plan

    def _collect(self, plan: RoundPlan) -> Collection:
        """Take updates until quorum or deadline."""
        expected = Expectation(plan, self._shapes, self._bank.embeddings.shape[1], len(self._bank.classes))
        collection = Collection(expected, self._config.quorum, time.monotonic())
        log.info("round %d: %s", plan.round, ", ".join(plan.participants))
        while (patience := collection.patience(time.monotonic())) > 0:
            for event in self._link.poll(min(patience, POLL_S)):
                self._notice(event)
                self._reply(collection.take(event))
        return collection

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

    def _reply(self, answer: Answer | None) -> None:
        if answer is None:
            return
        if not answer.verdict.accepted:
            log.warning("rejected %s: %s, %s", answer.client, answer.verdict.reason, answer.verdict.detail)
        self._link.do(self._end.answer(answer.client, answer.offer, answer.verdict))

    def _record(self, collection: Collection, adapter: Adapter, seconds: float) -> RoundRecord:
        """Save the adapter and sum up the round."""
        number = collection.plan.round
        name, digest = self._store.save_adapter(number, adapter)
        offers = {client: c.offer for client, c in sorted(collection.accepted.items())}
        samples = sum(offer.samples for offer in offers.values())
        bytes_up, self._end.bytes_up = dict(sorted(self._end.bytes_up.items())), type(self._end.bytes_up)()
        return RoundRecord(
            round=number,
            outcome="aggregated" if collection.has_quorum else "quorum-missed",
            accepted=list(offers),
            rejected=[
                Refusal(client=a.client, reason=a.verdict.reason, detail=a.verdict.detail) for a in collection.refused
            ],
            silent=collection.silent,
            samples=samples,
            loss=sum(o.loss * o.samples for o in offers.values()) / samples if samples else None,
            train_accuracy=sum(o.accuracy * o.samples for o in offers.values()) / samples if samples else None,
            seconds=seconds,
            bytes_up=bytes_up,
            bytes_down={client: offer.bytes_received for client, offer in offers.items()},
            adapter=name,
            adapter_sha256=digest,
        )
