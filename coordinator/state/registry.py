"""The devices that are known or may come, at rest: names, keys and claims. Also beside a coordinator at work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, Table, delete, func, insert, inspect, select, update
from sqlalchemy.dialects import postgresql, sqlite

from coordinator.state.journal import DEVICES, ENROLMENTS, UPDATES, Journal


@dataclass(frozen=True)
class Device:
    """A device that is known: its public key, whether it was cut off, or is shut out because two devices use its name."""

    key: str
    revoked: bool
    quarantined: bool = False


@dataclass(frozen=True)
class Enrolment:
    """How a device came here, or may come: its profile if that was told, and its claim (journal.ENROLMENTS)."""

    profile: str | None
    proof: str | None = None
    expires: int | None = None
    used_by: str | None = None
    certificate: str | None = None


class Registry:
    """The tables of devices. All methods raise FederationError if it cannot be used."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def devices(self) -> dict[str, Device]:
        """Return the known devices by name."""
        with self._journal.reading() as connection:
            if connection is None:
                return {}
            columns = (DEVICES.c.client, DEVICES.c.key, DEVICES.c.revoked, DEVICES.c.quarantined)
            rows = connection.execute(select(*columns).order_by(DEVICES.c.client)).all()
        return {client: Device(key, revoked, quarantined) for client, key, revoked, quarantined in rows}

    def add(self, client: str, key: str, profile: str | None = None) -> None:
        """Register a device; a known one gets this key, and is let in. A claim of its name is void."""
        self._journal.make_tables()
        with self._journal.writing() as connection:
            _replace(connection, ENROLMENTS, client=client, profile=_profile(connection, client, profile))
            _replace(connection, DEVICES, client=client, key=key, revoked=False, quarantined=False)

    def revoke(self, client: str) -> bool:
        """Cut a device off, and void the claim of its name; return whether there was either."""
        self._journal.make_tables()
        with self._journal.writing() as connection:
            # The claim first, as `enrol` does: one that is being used meanwhile is waited for, and its device is seen then.
            claim = ENROLMENTS.c.client == client, ENROLMENTS.c.proof.is_not(None)
            void = connection.execute(update(ENROLMENTS).where(*claim).values(proof=None, expires=None))
            done = connection.execute(update(DEVICES).where(DEVICES.c.client == client).values(revoked=True))
        return done.rowcount + void.rowcount > 0

    def enrolments(self) -> dict[str, Enrolment]:
        """Return how devices came here, or may come, by name."""
        return self._enrolments(select(ENROLMENTS))

    def enrolment(self, client: str) -> Enrolment | None:
        """Return how a device came here, or may come."""
        return self._enrolments(select(ENROLMENTS).where(ENROLMENTS.c.client == client)).get(client)

    def _enrolments(self, query: Select[Any]) -> dict[str, Enrolment]:
        with self._journal.reading() as connection:
            if connection is None or not inspect(connection).has_table(ENROLMENTS.name):
                return {}
            return {row.client: _enrolment(row) for row in connection.execute(query)}

    def claim(self, client: str, proof: str, expires: int, profile: str | None) -> None:
        """Let a board become this device, until a moment in seconds since 1970; an earlier claim of the name is void."""
        self._journal.make_tables()
        with self._journal.writing() as connection:
            profile = _profile(connection, client, profile)
            _replace(connection, ENROLMENTS, client=client, profile=profile, proof=proof, expires=expires)

    def enrol(self, client: str, proof: str, keys: str, certificate: str, key: str) -> Enrolment | None:
        """Use a claim, once: note who has it and what it got, and register the device. Return how it stands then.

        None if there is no such claim any more.
        """
        mine = ENROLMENTS.c.client == client, ENROLMENTS.c.proof == proof
        with self._journal.writing() as connection:
            unused = update(ENROLMENTS).where(*mine, ENROLMENTS.c.used_by.is_(None))
            if connection.execute(unused.values(used_by=keys, certificate=certificate)).rowcount:
                _replace(connection, DEVICES, client=client, key=key, revoked=False, quarantined=False)
            row = connection.execute(select(ENROLMENTS).where(*mine)).one_or_none()
        return None if row is None else _enrolment(row)

    def last_rounds(self) -> dict[str, int]:
        """Return the last round in which an update of each device was accepted."""
        with self._journal.reading() as connection:
            if connection is None:
                return {}
            newest = select(UPDATES.c.client, func.max(UPDATES.c.number)).where(UPDATES.c.accepted)
            return {row[0]: row[1] for row in connection.execute(newest.group_by(UPDATES.c.client))}

    def register(self, devices: Mapping[str, Device]) -> dict[str, Device]:
        """Register new devices, and shut out those that are to be quarantined; return them as they are known from now on."""
        with self._journal.writing() as connection:
            return {client: _register(connection, client, device) for client, device in devices.items()}


def _profile(connection: Connection, client: str, told: str | None) -> str | None:
    """Return a device's profile: what is told now, else what was told before."""
    return told or connection.scalar(select(ENROLMENTS.c.profile).where(ENROLMENTS.c.client == client))


def _enrolment(row: Row[Any]) -> Enrolment:
    return Enrolment(row.profile, row.proof, row.expires, row.used_by, row.certificate)


def _replace(connection: Connection, table: Table, **row: object) -> None:
    """Put a row in the place of the one that its client may have."""
    connection.execute(delete(table).where(table.c.client == row["client"]))
    connection.execute(insert(table).values(**row))


def _register(connection: Connection, client: str, device: Device) -> Device:
    row = {"client": client, **asdict(device)}
    # The coordinator and the desk of its releases may see a new device at the same moment: the first one counts.
    if connection.dialect.name == "sqlite":
        connection.execute(sqlite.insert(DEVICES).values(**row).on_conflict_do_nothing())
    else:
        connection.execute(postgresql.insert(DEVICES).values(**row).on_conflict_do_nothing())
    known = connection.execute(select(DEVICES).where(DEVICES.c.client == client)).one()
    if device.quarantined and not known.quarantined:
        connection.execute(update(DEVICES).where(DEVICES.c.client == client).values(quarantined=True))
    return Device(known.key, known.revoked, known.quarantined or device.quarantined)
