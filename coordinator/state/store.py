"""A federation at rest: what it knew after each round, what the open round has collected, and the record of every round.

state/journal.db     the journal (journal.py), unless `journal` names a database
state/blobs/         adapters, class banks and the open round's updates, named by their hash (protocol/storage/blobs.py)
state/lock           held by the coordinator that works here

Every step of a round is one transaction that can be repeated: `open` a plan, `keep` an answer, `finish`. The blobs that it
names are on the disk before it is committed.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from sqlalchemy import Connection, delete, func, insert, select, update

from clip_lora.errors import ModelError
from clip_lora.shapes import Shapes, check_shapes
from coordinator.aggregate import Contribution
from coordinator.collection import Answer
from coordinator.errors import FederationError, NotKeptError
from coordinator.learning import NO_LESSON, Knowledge, Lesson
from coordinator.records import Identity, RoundRecord, Run
from coordinator.releases.book import Book
from coordinator.state.journal import ROUNDS, RUN, UPDATES, VERSION, Journal, not_written
from coordinator.state.models import ADAPTER, BANK, OWN, TEXT, Models
from coordinator.state.registry import Registry
from protocol.codec import decode_update, encode_adapter, encode_bank, sha256
from protocol.messages import Offer, RoundPlan, Update, Verdict
from protocol.storage.at_rest import StoredAdapter
from protocol.storage.blobs import Blobs

log = logging.getLogger(__name__)

FIRST_BANK = 1
KEEP_ROUNDS = 100
LAST_ROUND = 2**31 - 1
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Opened:
    """A round that has begun: its plan, each participant's rank, and what was answered so far, in client order."""

    plan: RoundPlan
    ranks: Mapping[str, int]
    accepted: Mapping[str, Contribution]
    refused: tuple[Answer, ...]
    came_late: tuple[tuple[str, Offer, Update], ...] = ()


@dataclass(frozen=True)
class Progress:
    """How far the open round is: who was accepted, how many updates were rejected, of whom there is none yet."""

    round: int
    accepted: tuple[str, ...]
    rejected: int
    awaited: tuple[str, ...]


@dataclass(frozen=True)
class Earlier:
    """A round that is over: its plan, each participant's rank and start, and who had an update accepted for it."""

    plan: RoundPlan
    ranks: Mapping[str, int]
    bases: Mapping[str, str]
    counted: frozenset[str]


class Store:
    """The state of one federation. Only `begin` and what follows it writes; `close` lets another coordinator in."""

    def __init__(self, folder: Path, journal: str | None = None, keep_rounds: int = KEEP_ROUNDS) -> None:
        self.folder = folder
        self.blobs = Blobs(folder / "blobs")
        self._journal = Journal(folder, journal)
        self.models = Models(folder, self._journal, self.blobs)
        self.registry = Registry(self._journal)
        self.releases = Book(self._journal)
        self._keep_rounds = keep_rounds

    def close(self) -> None:
        """Let go of the folder and the database."""
        self._journal.close()

    def run(self) -> Run | None:
        """Return what is known of this run, None before its first start; raises FederationError if it is unreadable."""
        with self._journal.reading() as connection:
            return self._run(connection) if connection is not None else None

    def _run(self, connection: Connection) -> Run | None:
        row = connection.execute(select(RUN.c.about)).one_or_none()
        if row is None:
            return None
        return _read(Run, row.about, self._journal)

    def begin(self, identity: Identity) -> tuple[str, int]:
        """Return the name of this run of the federation, made once, and how often the coordinator was started in it.

        Raises FederationError if another coordinator is at work here, or the state is of another identity's federation.
        """
        self._journal.prepare()
        with self._journal.writing() as connection:
            known = self._run(connection)
            run = known or Run(name=secrets.token_hex(8), starts=0, identity=identity)
            changed = [key for key in Identity.model_fields if getattr(run.identity, key) != getattr(identity, key)]
            if changed:
                raise FederationError(
                    f"{self.folder} holds the state of a federation with another {', '.join(changed)}: set `state` to a "
                    f"new folder, or change the settings back"
                )
            run = run.model_copy(update={"starts": run.starts + 1})
            if known is None and any(self.blobs.digests()):  # to sweep them would lose another journal's federation
                raise FederationError(
                    f"{self.blobs.folder} holds blobs that the journal {self._journal} knows nothing of: set `journal` "
                    f"back, or `state` to a new folder"
                )
            if known is None:
                connection.execute(insert(RUN).values(id=1, version=VERSION, about=run.model_dump_json()))
            else:
                connection.execute(update(RUN).values(about=run.model_dump_json()))
            named = self._named(connection)
        try:
            self.blobs.sweep(named)
        except OSError as error:
            log.warning("what is no longer wanted in %s cannot be removed: %s", self.blobs.folder, error)
        return run.name, run.starts

    def records(self, newest: int | None = None) -> list[RoundRecord]:
        """Return the finished rounds, or the newest of them; raises FederationError if they cannot be read."""
        with self._journal.reading() as connection:
            if connection is None:
                return []
            query = select(ROUNDS.c.record).where(ROUNDS.c.record.is_not(None)).order_by(ROUNDS.c.number.desc())
            found = connection.scalars(query.limit(newest)).all()
        return [_read(RoundRecord, text, self._journal) for text in reversed(found)]

    def resume(self, shapes: Shapes, text_shapes: Shapes | None) -> tuple[int, Knowledge | None]:
        """Return the number of rounds done and what is known (None at the start); raises FederationError."""
        known = self.models.knowledge()
        if known is None:
            return 0, None
        try:
            check_shapes(known.adapter, shapes)
            if known.text is not None and text_shapes is not None:
                check_shapes(known.text, text_shapes)
        except ModelError as error:
            raise self.models.of_another_federation(error) from error
        return self._done(), known

    def _done(self) -> int:
        """Return the number of the last round that is over, 0 before the first."""
        with self._journal.reading() as connection:
            if connection is None:
                return 0
            return connection.scalar(select(func.max(ROUNDS.c.number)).where(ROUNDS.c.record.is_not(None))) or 0

    def start(self, known: Knowledge) -> None:
        """Keep what a new federation begins with."""
        self._commit(0, known, NO_LESSON, None)

    def open(self, plan: RoundPlan, ranks: Mapping[str, int], bases: Mapping[str, str]) -> None:
        """Note that a round begins, each participant from the adapter whose hash is in `bases`.

        What an abandoned one of the same number had collected is forgotten.
        """
        with self._journal.writing() as connection:
            connection.execute(delete(UPDATES).where(UPDATES.c.counts_in == plan.round))
            connection.execute(delete(ROUNDS).where(ROUNDS.c.number == plan.round))
            connection.execute(
                insert(ROUNDS).values(
                    number=plan.round,
                    plan=plan.model_dump_json(),
                    ranks=json.dumps(dict(ranks)),
                    bases=json.dumps(dict(bases)),
                )
            )

    def opened(self) -> Opened | None:
        """Return the round that had begun and not ended when the coordinator stopped; raises FederationError."""
        with self._journal.reading() as connection:
            if connection is None:
                return None
            row = connection.execute(select(ROUNDS).where(ROUNDS.c.record.is_(None))).one_or_none()
            if row is None:
                return None
            query = (
                select(UPDATES)
                .where(UPDATES.c.counts_in == row.number)
                .order_by(UPDATES.c.client, UPDATES.c.number, UPDATES.c.sha256)
            )
            answers = connection.execute(query).all()
        accepted: dict[str, Contribution] = {}
        refused: list[Answer] = []
        came_late: list[tuple[str, Offer, Update]] = []
        for found in answers:
            offer = _read(Offer, found.offer, self._journal)
            if not found.accepted:
                refused.append(Answer(found.client, offer, Verdict(False, found.reason, found.detail)))
                continue
            blob = self.models.blob(found.blob)
            update = self.at_rest(decode_update(blob), blob)
            if found.number < row.number:
                came_late.append((found.client, offer, update))
            else:
                accepted[found.client] = Contribution(offer, update)
        plan = _read(RoundPlan, row.plan, self._journal)
        return Opened(plan, json.loads(row.ranks), accepted, tuple(refused), tuple(came_late))

    def progress(self) -> Progress | None:
        """Return how far the open round is, None between rounds; raises FederationError. Reads no update."""
        with self._journal.reading() as connection:
            row = None if connection is None else connection.execute(select(ROUNDS).where(ROUNDS.c.record.is_(None))).first()
            if row is None or connection is None:
                return None
            query = select(UPDATES.c.client, UPDATES.c.accepted).where(UPDATES.c.number == row.number)
            answers = connection.execute(query).all()
        accepted = sorted(answer.client for answer in answers if answer.accepted)
        waits = sorted(json.loads(row.ranks).keys() - set(accepted))
        return Progress(row.number, tuple(accepted), len(answers) - len(accepted), tuple(waits))

    def earlier(self, number: int, back: int) -> list[Earlier]:
        """Return the rounds before round `number`, at most `back` of them; raises FederationError."""
        between = (ROUNDS.c.number < number, ROUNDS.c.number >= number - back)
        with self._journal.reading() as connection:
            if connection is None or not back:
                return []
            rows = connection.execute(select(ROUNDS).where(*between).order_by(ROUNDS.c.number)).all()
            query = select(UPDATES.c.number, UPDATES.c.client).where(UPDATES.c.accepted, UPDATES.c.number >= number - back)
            # What came late in the open round is not over yet: the round itself knows of it.
            counted = connection.execute(query.where(UPDATES.c.counts_in < number)).all()
        return [
            Earlier(
                _read(RoundPlan, row.plan, self._journal),
                json.loads(row.ranks),
                json.loads(row.bases),
                frozenset(found.client for found in counted if found.number == row.number),
            )
            for row in rows
        ]

    def keep(self, answer: Answer, blob: bytes | None, counts_in: int) -> None:
        """Keep the answer to an update, and if it is accepted the update: before the client hears of it. Idempotent.

        It counts in round `counts_in`. Raises FederationError if it cannot be kept: then the client must not hear of it.
        """
        digest = None
        if answer.verdict.accepted:
            assert blob is not None
            with self._writable():
                digest = self.blobs.put(blob)
        client, offer, verdict = answer.client, answer.offer, answer.verdict
        with self._journal.writing() as connection:
            if self._verdict(connection, client, offer) is not None:
                return
            connection.execute(
                insert(UPDATES).values(
                    number=offer.round,
                    client=client,
                    sha256=offer.blob.sha256,
                    offer=offer.model_dump_json(),
                    accepted=verdict.accepted,
                    reason=verdict.reason,
                    detail=verdict.detail,
                    counts_in=counts_in,
                    blob=digest,
                )
            )

    def at_rest(self, update: Update, blob: bytes) -> Update:
        """Return a kept update's twin whose adapter stays on the disk: in memory it would weigh twice its blob."""
        return replace(update, adapter=StoredAdapter.of_update(self.blobs.path(sha256(blob)), blob))

    def answered(self, client: str, offer: Offer) -> Answer | None:
        """Return the answer that this very update got, in whatever round and before whatever restart."""
        if offer.round > LAST_ROUND:  # which no table takes
            return None
        with self._journal.reading() as connection:
            if connection is None:
                return None
            verdict = self._verdict(connection, client, offer)
        return None if verdict is None else Answer(client, offer, verdict)

    def _verdict(self, connection: Connection, client: str, offer: Offer) -> Verdict | None:
        key = (UPDATES.c.number == offer.round, UPDATES.c.client == client, UPDATES.c.sha256 == offer.blob.sha256)
        row = connection.execute(select(UPDATES.c.accepted, UPDATES.c.reason, UPDATES.c.detail).where(*key)).one_or_none()
        return None if row is None else Verdict(row.accepted, row.reason, row.detail)

    def prepare(self) -> None:
        """Take the folder for this coordinator; raises FederationError if another one is at work there."""
        self._journal.prepare()

    def finish(self, record: RoundRecord, known: Knowledge, lesson: Lesson = NO_LESSON) -> Knowledge:
        """End a round: keep its record and what it changed, forget its updates and what is older than is kept.

        Returns what is known with clients' own adapters as they are kept: `known` may still make them from the updates.
        """
        return self._commit(record.round, known, lesson, record)

    def _commit(self, number: int, known: Knowledge, lesson: Lesson, record: RoundRecord | None) -> Knowledge:
        """Blobs first, clients' own adapters one after another; then one transaction, then what it left without a name."""
        made = {(ADAPTER, ""): encode_adapter(known.adapter)}
        if number == 0 or lesson.text is not None:
            made[BANK, str(known.bank.version)] = encode_bank(known.bank)
            if known.text is not None:
                made[TEXT, str(known.bank.version)] = encode_adapter(known.text)
        own = {client: known.own[client] for client in known.own if client not in lesson.renewed}
        with self._writable(), self.models.intact():
            digests = {key: self.blobs.put(blob) for key, blob in made.items()}
            for client in lesson.renewed:
                blob = encode_adapter(known.own[client])
                digests[OWN, client] = self.blobs.put(blob)
                own[client] = StoredAdapter(self.blobs.path(digests[OWN, client]), blob)
        with self._journal.writing() as connection:
            before = self._named(connection)
            self.models.write(connection, number, digests)
            if record is not None:
                connection.execute(update(ROUNDS).where(ROUNDS.c.number == number).values(record=record.model_dump_json()))
            self._prune(connection, number - self._keep_rounds)
            unnamed = before - self._named(connection)
        for digest in unnamed:
            try:
                self.blobs.remove(digest)
            except OSError as error:  # the next start removes it
                log.warning("a blob that is no longer wanted cannot be removed: %s", error)
        return replace(known, own=dict(sorted(own.items())))

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            told = f"{not_written(self.folder, error)}; nothing that was kept is lost, and the same command goes on from it"
            raise NotKeptError(told) from error

    def _prune(self, connection: Connection, until: int) -> None:
        """Drop what is older than is kept: models, and the longest part of a record."""
        self.models.prune(connection, until)
        last = ROUNDS.c.number == until
        text = connection.scalar(select(ROUNDS.c.record).where(last))
        if text is not None:  # attention grows with the square of the clients
            shorter = _read(RoundRecord, text, self._journal).model_copy(update={"attention": None})
            connection.execute(update(ROUNDS).where(last).values(record=shorter.model_dump_json()))

    def _named(self, connection: Connection) -> set[str]:
        """Return the hashes of the blobs that are still wanted: what was made, and the open round's accepted updates."""
        open_rounds = select(ROUNDS.c.number).where(ROUNDS.c.record.is_(None))
        held = select(UPDATES.c.blob).where(UPDATES.c.accepted, UPDATES.c.counts_in.in_(open_rounds))
        return {*self.models.named(connection), *connection.scalars(held)}


def _read(schema: type[Model], text: str, journal: Journal) -> Model:
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        raise FederationError(
            f"the journal {journal} holds a damaged {schema.__name__}, or one of another version: restore it, or set "
            f"`state` to a new folder to start anew"
        ) from error
