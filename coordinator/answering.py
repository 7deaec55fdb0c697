"""Answers updates: what is accepted is in the journal before its client hears of it."""

from __future__ import annotations

import logging
from collections import Counter

from coordinator.between import Between
from coordinator.collection import Answer, Collection, Wanted, refuse_all
from coordinator.errors import FederationError, NotKeptError
from coordinator.state.devices import Devices
from coordinator.state.store import Store
from protocol.coordinator_end import CoordinatorEnd
from protocol.doublings import worth_telling
from protocol.events import CoordinatorEvent, OfferMade, UpdateArrived, UpdateUnreadable
from protocol.link import Link

log = logging.getLogger(__name__)


class Answering:
    """What a coordinator says to updates, in a round and between two."""

    def __init__(self, link: Link[CoordinatorEvent], end: CoordinatorEnd, store: Store, devices: Devices | None) -> None:
        self.between = Between()
        self._link = link
        self._end = end
        self._store = store
        self._devices = devices
        self._times: Counter[tuple[str, str]] = Counter()
        self._unheard: dict[tuple[str, int, str], Answer] = {}

    def settle(self, event: CoordinatorEvent, collection: Collection | None, oldest: int = 0) -> None:
        """Answer an update, or ask for it.

        Between rounds, without a collection, those from round `oldest` on are left for the next one.
        """
        try:
            earlier = self._store.answered(event.client, event.offer) if isinstance(event, OfferMade) else None
        except NotKeptError as error:  # it is offered again
            log.error("no answer for %s yet: %s", event, error)  # noqa: TRY400 - no bug, no traceback
            return
        if earlier is not None:
            if collection is not None and collection.lacks(earlier) and not self._recover(collection):
                return
            self._reply(earlier)
            return
        match collection.take(event) if collection is not None else refuse_all(event, oldest):
            case Wanted(client=client, offer=offer):
                self._end.fetch(client, offer)
            case Answer() as answer:
                if collection is None or self._is_kept(answer, event, collection):
                    self._reply(answer)
            case None if collection is None:
                self.between.keep(event)

    def take_unheard(self) -> list[Answer]:
        """Return what was accepted while it is not known whether the journal has it, and forget that."""
        unheard, self._unheard = self._unheard, {}
        return list(unheard.values())

    def take_in(self, collection: Collection) -> None:
        """Take into a round what the journal has of it; raises FederationError."""
        opened = self._store.opened()
        if opened is not None and opened.plan.round == collection.plan.round:
            found = [(client, part.offer, part.update) for client, part in opened.accepted.items()]
            for client, offer, update in (*found, *opened.came_late):
                collection.recover(client, offer, update)

    def is_news(self, client: str, what: str) -> bool:
        """Whether to log what a client did this time."""
        self._times[client, what] += 1
        return worth_telling(self._times[client, what])

    def _is_kept(self, answer: Answer, event: CoordinatorEvent, collection: Collection) -> bool:
        """Keep the answer to an update; False if that failed: no receipt without it, the client offers it again."""
        if not isinstance(event, UpdateArrived | UpdateUnreadable):
            return True
        try:
            blob = event.blob if isinstance(event, UpdateArrived) else None
            if self._devices is not None:
                self._devices.keep()  # whose update it is stands in the journal before the update does
            self._store.keep(answer, blob, collection.plan.round)
        except FederationError as error:
            log.error("no receipt for %s: %s", answer.client, error)  # noqa: TRY400 - no bug, no traceback
            collection.take_back(answer)
            if answer.verdict.accepted:
                self._unheard[answer.client, answer.offer.round, answer.offer.blob.sha256] = answer
            return False
        if isinstance(event, UpdateArrived) and answer.verdict.accepted:
            collection.rest(answer, self._store.at_rest(event.update, event.blob))
        return True

    def _recover(self, collection: Collection) -> bool:
        """Take in what the journal has after all, as when a commit succeeded and its success was not heard of."""
        try:
            self.take_in(collection)
        except NotKeptError as error:  # it is offered again
            log.error("no answer yet: %s", error)  # noqa: TRY400 - no bug, no traceback
            return False
        return True

    def _reply(self, answer: Answer) -> None:
        if not answer.verdict.accepted and self.is_news(answer.client, answer.verdict.reason):
            log.warning("rejected %s: %s, %s", answer.client, answer.verdict.reason, answer.verdict.detail)
        self._link.do(self._end.answer(answer.client, answer.offer, answer.verdict))
