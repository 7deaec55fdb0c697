"""The journal of releases: what was announced, how far it has come, and what each device said last.

The desk and the operator's commands write it at the same time: a release is changed only from the revision that was read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from sqlalchemy import Connection, Row, delete, func, insert, inspect, select, update

from coordinator.errors import FederationError
from coordinator.state.journal import RELEASES, REPORTS, Journal
from protocol.release.manifests import Report
from protocol.release.rings import Rollout, stopped

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Entry:
    """A release in the journal: the `number`-th that was announced, `age` seconds of a desk's work ago.

    `made` is in seconds since 1970, by this machine's clock.
    """

    number: int
    revision: int
    age: float
    made: int
    rollout: Rollout

    @property
    def version(self) -> int:
        """The version that it announces: several may announce one, as a rollback does."""
        return self.rollout.release.version


@dataclass(frozen=True)
class Heard:
    """What a device said last, by which message, and `heard` when, in seconds since 1970.

    `moved` is the age of the release that it speaks of when that last changed.
    """

    report: Report
    instance: str
    sequence: int
    moved: float
    heard: int


class Book:
    """The tables of releases. All methods raise FederationError if they cannot be used."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def prepare(self) -> None:
        """Make the tables that are not there yet."""
        self._journal.make_tables()

    def newest(self) -> Entry | None:
        """Return the release that is announced, None before the first."""
        found = self._entries(1)
        return found[0] if found else None

    def entries(self) -> list[Entry]:
        """Return all releases, the newest first."""
        return self._entries(None)

    def _entries(self, most: int | None) -> list[Entry]:
        with self._journal.reading() as connection:
            if connection is None or not inspect(connection).has_table(RELEASES.name):
                return []
            rows = connection.execute(select(RELEASES).order_by(RELEASES.c.number.desc()).limit(most)).all()
        return [self._entry(row) for row in rows]

    def _entry(self, row: Row[tuple[int, ...]]) -> Entry:
        return Entry(row.number, row.revision, row.age, row.made, self._read(Rollout, row.about))

    def add(self, rollout: Rollout, after: Entry | None) -> Entry:
        """Announce a release in the place of `after`, which was the newest; if that was still under way it ends.

        Raises FederationError if another one came first.
        """
        self._journal.make_tables()
        number = 1 if after is None else after.number + 1
        entry = Entry(number, 0, 0.0, int(time.time()), rollout)
        with self._journal.writing() as connection:
            newest = connection.scalar(select(func.max(RELEASES.c.number))) or 0
            ended = after is None or not after.rollout.under_way
            if after is not None and after.rollout.under_way:
                ended = _change(connection, after, stopped(after.rollout, "aborted", "superseded"))
            if newest != number - 1 or not ended:
                raise FederationError(
                    "another release came, or changed, at the same moment: see `clipcast release status`, and try again"
                )
            connection.execute(
                insert(RELEASES).values(number=number, revision=0, age=0.0, made=entry.made, about=_json(rollout))
            )
        return entry

    def change(self, entry: Entry, rollout: Rollout, age: float | None = None) -> Entry | None:
        """Note what became of a release, at the age `age`; return it, None if another changed it since it was read."""
        with self._journal.writing() as connection:
            done = _change(connection, entry, rollout, age)
        changed = replace(entry, revision=entry.revision + 1, age=entry.age if age is None else age, rollout=rollout)
        return changed if done else None

    def reports(self) -> dict[str, Heard]:
        """Return what each device said last, by name."""
        with self._journal.reading() as connection:
            if connection is None or not inspect(connection).has_table(REPORTS.name):
                return {}
            rows = connection.execute(select(REPORTS).order_by(REPORTS.c.client)).all()
        return {
            row.client: Heard(self._read(Report, row.report), row.instance, row.sequence, row.moved, row.heard)
            for row in rows
        }

    def keep(self, heard: Mapping[str, Heard], number: int | None, age: float) -> None:
        """Note what devices have said, and how old release `number` is by now, in one transaction."""
        rows = [
            {
                "client": client,
                "report": _json(one.report),
                "instance": one.instance,
                "sequence": one.sequence,
                "moved": one.moved,
                "heard": one.heard,
            }
            for client, one in sorted(heard.items())
        ]
        with self._journal.writing() as connection:
            for row in rows:
                connection.execute(delete(REPORTS).where(REPORTS.c.client == row["client"]))
            if rows:
                connection.execute(insert(REPORTS), rows)
            if number is not None:
                connection.execute(update(RELEASES).where(RELEASES.c.number == number).values(age=age))

    def _read(self, schema: type[Model], text: str) -> Model:
        try:
            return schema.model_validate_json(text)
        except ValidationError as error:
            raise FederationError(
                f"the journal {self._journal} holds a damaged {schema.__name__}, or one of another version: restore it"
            ) from error


def _change(connection: Connection, entry: Entry, rollout: Rollout, age: float | None = None) -> bool:
    mine = RELEASES.c.number == entry.number, RELEASES.c.revision == entry.revision
    values = {"revision": entry.revision + 1, "about": _json(rollout), **({} if age is None else {"age": age})}
    return connection.execute(update(RELEASES).where(*mine).values(**values)).rowcount == 1


def _json(record: BaseModel) -> str:
    return record.model_dump_json()
