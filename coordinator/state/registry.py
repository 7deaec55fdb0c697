"""The devices that are known, at rest: the journal's table of names and keys. Also beside a coordinator at work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, insert, select, update

from coordinator.state.journal import DEVICES, Journal


@dataclass(frozen=True)
class Device:
    """A device that is known: its public key, whether it was cut off, or is shut out because two devices use its name."""

    key: str
    revoked: bool
    quarantined: bool = False


class Registry:
    """The table of devices. All methods raise FederationError if it cannot be used."""

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

    def add(self, client: str, key: str) -> None:
        """Register a device; a known one gets this key, and is let in."""
        self._journal.make_tables()
        with self._journal.writing() as connection:
            connection.execute(delete(DEVICES).where(DEVICES.c.client == client))
            connection.execute(insert(DEVICES).values(client=client, key=key, revoked=False, quarantined=False))

    def revoke(self, client: str) -> bool:
        """Cut a device off; return whether it was known."""
        self._journal.make_tables()
        with self._journal.writing() as connection:
            done = connection.execute(update(DEVICES).where(DEVICES.c.client == client).values(revoked=True))
        return done.rowcount > 0

    def register(self, devices: Mapping[str, Device]) -> dict[str, Device]:
        """Register new devices, and shut out those that are to be quarantined; return them as they are known from now on."""
        with self._journal.writing() as connection:
            return {client: _register(connection, client, device) for client, device in devices.items()}


def _register(connection: Connection, client: str, device: Device) -> Device:
    known = connection.execute(select(DEVICES).where(DEVICES.c.client == client)).one_or_none()
    if known is None:
        connection.execute(insert(DEVICES).values(client=client, **asdict(device)))
        return device
    if device.quarantined and not known.quarantined:
        connection.execute(update(DEVICES).where(DEVICES.c.client == client).values(quarantined=True))
    return Device(known.key, known.revoked, known.quarantined or device.quarantined)
