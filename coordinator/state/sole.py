"""A lock in PostgreSQL that one coordinator holds: a second one may have another folder, and the same database."""

from __future__ import annotations

import contextlib

from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from coordinator.errors import FederationError, NotKeptError

KEY = 0x636C6970  # "clip"; such locks are a database's own
KEEPALIVE = ("tcp_keepalives_idle = 20", "tcp_keepalives_interval = 10", "tcp_keepalives_count = 3")
"""So that the server lets go, within a minute, of a coordinator whose machine has lost power or link."""


class Sole:
    """Held as long as its connection lives: until `close`, or the end of the process. `hold` renews one that was lost."""

    def __init__(self, engine: Engine, journal: str) -> None:
        self._engine = engine
        self._journal = journal
        self._connection: Connection | None = None
        self._held = False

    def hold(self) -> None:
        """Take the lock, or see that it is held still. Raises FederationError if another coordinator has it.

        NotKeptError if it was held before: then the other one may be this one's own connection, which the server has not
        given up yet. Lets the database's own errors through.
        """
        if self._connection is not None:
            try:
                self._connection.execute(select(1))
            except (SQLAlchemyError, OSError):
                self._drop()
            else:
                return
        self._take()

    def _take(self) -> None:
        self._connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self._connection.detach()  # no other use: it is closed and not given back
        try:
            for setting in KEEPALIVE:
                self._connection.exec_driver_sql(f"SET {setting}")
            taken = self._connection.scalar(select(func.pg_try_advisory_lock(KEY)))
        except BaseException:
            self._drop()
            raise
        if not taken:
            self._drop()
            raise (NotKeptError if self._held else FederationError)(
                f"another coordinator is at work with the journal {self._journal}: stop it, or give each federation a "
                f"database of its own. One whose machine was cut off is let go of within a minute"
            )
        self._held = True

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(SQLAlchemyError, OSError):
                connection.close()

    def close(self) -> None:
        """Let another coordinator in."""
        if self._connection is not None:
            with contextlib.suppress(SQLAlchemyError, OSError):  # by the word, as the server notices a closing later
                self._connection.execute(select(func.pg_advisory_unlock(KEY)))
        self._drop()
