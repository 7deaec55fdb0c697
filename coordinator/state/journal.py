"""The journal: the tables in which a coordinator keeps what a restart must find, in SQLite or PostgreSQL.

SQLite writes ahead and syncs at every commit (WAL, `synchronous=FULL`): what was committed survives `kill -9` and a power
cut. The tables are the same on PostgreSQL. Blobs are files (protocol/storage/blobs.py); a row names them and is written
after them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    inspect,
    select,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.schema import CreateIndex, CreateTable

from coordinator.errors import FederationError, NotKeptError
from coordinator.state.sole import Sole
from protocol.storage.files import lock_folder, make_folder

FILE = "journal.db"
VERSION = 3
SILENCE_S = 30  # a database that answers nothing for so long is taken for away
# PostgreSQL's classes of errors that are about its surroundings, not about what it was asked: connections, no room,
# read-only, shutting down, its disk.
PASSING = ("08", "25", "53", "55", "57", "58")
EXAMPLE = "write e.g. postgresql+pg8000://user@host/name, or leave it out for a file in the state folder"

MAKING_KEY = 0x6D616B65  # "make": held in PostgreSQL while the tables are made

_making = threading.Lock()
_tables = MetaData()

RUN = Table(
    "run",
    _tables,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("version", Integer, nullable=False),
    Column("about", Text, nullable=False),
)
"""One row: this run of the federation (records.Run as JSON), and the version of these tables."""

ROUNDS = Table(
    "rounds",
    _tables,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("plan", Text, nullable=False),
    Column("ranks", Text, nullable=False),
    Column("bases", Text, nullable=False),
    Column("record", Text),
)
"""A round: its plan, each participant's rank and the hash of the adapter that it starts from; its record once it is over.

At most one has no record: the open one.
"""

UPDATES = Table(
    "updates",
    _tables,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("client", String(128), primary_key=True),
    Column("sha256", String(64), primary_key=True),
    Column("offer", Text, nullable=False),
    Column("accepted", Boolean, nullable=False),
    Column("reason", String(64), nullable=False),
    Column("detail", Text, nullable=False),
    Column("counts_in", Integer, nullable=False),
    Column("blob", String(64)),
)
"""The answer to each update of a participant, by the round that it was trained for and the hash that it was offered by.

An accepted one counts in the round `counts_in`, and until that is over it is kept as the blob `blob`: unsealed, if it was
sealed.
"""

ONE_ACCEPTED = Index(
    "one_accepted_update",
    UPDATES.c.number,
    UPDATES.c.client,
    unique=True,
    sqlite_where=UPDATES.c.accepted,
    postgresql_where=UPDATES.c.accepted,
)
"""A client counts at most once in a round, whatever the code above believes."""

KEPT = Table(
    "kept",
    _tables,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("kind", String(16), primary_key=True),
    Column("name", String(128), primary_key=True),
    Column("sha256", String(64), nullable=False),
)
"""What each round made, by the hash of its blob: the global adapter, a bank, a text adapter, a client's own adapter."""


DEVICES = Table(
    "devices",
    _tables,
    Column("client", String(128), primary_key=True),
    Column("key", String(64), nullable=False),
    Column("revoked", Boolean, nullable=False),
    Column("quarantined", Boolean, nullable=False),
)
"""The devices that are known, each with its public key (protocol/trust/signing.py).

Quarantined is one whose name and key two devices use at the same time (protocol/trust/instances.py).
"""

ENROLMENTS = Table(
    "enrolments",
    _tables,
    Column("client", String(128), primary_key=True),
    Column("profile", String(64)),
    Column("proof", String(64)),
    Column("expires", BigInteger),
    Column("used_by", String(64)),
    Column("certificate", Text),
)
"""How a device came here: its profile, and its claim (protocol/trust/claims.py), by the key that proves it.

A claim holds until `expires`, seconds since 1970 by this machine's clock, or until it was used: by the board whose public
keys have the hash `used_by`, and that got `certificate`.
"""

RELEASES = Table(
    "releases",
    _tables,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("revision", Integer, nullable=False),
    Column("age", Float(53), nullable=False),
    Column("made", BigInteger, nullable=False),
    Column("about", Text, nullable=False),
)
"""What was announced to devices (protocol/release/rings.py, Rollout as JSON), the newest last.

`revision` counts its changes, `age` the seconds that a desk has worked on it, and `made` is in seconds since 1970.
"""

REPORTS = Table(
    "reports",
    _tables,
    Column("client", String(128), primary_key=True),
    Column("report", Text, nullable=False),
    Column("instance", String(16), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("moved", Float(53), nullable=False),
    Column("heard", BigInteger, nullable=False),
)
"""What each device last said of releases (coordinator/releases/book.py, Heard)."""


class Journal:
    """The tables of one federation, in a file of its state folder or in the database at `url`."""

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self._folder = folder
        self._file = folder / FILE if url is None else None
        self._url = URL.create("sqlite", database=str(folder / FILE)) if url is None else _parse(url)
        self._engine: Engine | None = None
        self._lock: IO[bytes] | None = None
        self._sole: Sole | None = None
        self._seen_ours = False  # whether this process has found the tables, of this version, in use

    def __str__(self) -> str:
        return str(self._file or self._url)  # SQLAlchemy hides the password

    @contextmanager
    def reading(self) -> Iterator[Connection | None]:
        """Give a connection to look with, None if nothing was ever written; raises FederationError."""
        if self._file is not None and not self._file.exists():
            yield None
            return
        with self._told(), self._connect() as connection:
            yield connection if self._is_ours(connection) else None

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Give a transaction: committed as a whole at the end, or not at all; raises FederationError."""
        with self._told():
            if self._sole is not None:
                self._sole.hold()
            with self._connect() as connection, connection.begin():
                yield connection

    def prepare(self) -> None:
        """Make this process the only coordinator of the folder, and the tables; raises FederationError."""
        if self._lock is None:
            try:
                self._lock = lock_folder(self._folder)
            except BlockingIOError as error:
                raise FederationError(
                    f"another coordinator is at work in {self._folder}: stop it, or set `state` to a new folder"
                ) from error
            except OSError as error:
                raise not_written(self._folder, error) from error
        self.make_tables()
        if self._file is None and self._sole is None:
            self._sole = Sole(self._open(), str(self))
            with self._told():
                self._sole.hold()

    def make_tables(self) -> None:
        """Make the tables that are not there yet; also while a coordinator is at work. Raises FederationError."""
        try:
            make_folder(self._folder)
            with contextlib.suppress(PermissionError):
                self._folder.chmod(0o700)  # who reads a claim's proof can use the claim
        except OSError as error:
            raise not_written(self._folder, error) from error
        with _making, self._told(), self._connect() as connection, connection.begin():
            self._is_ours(connection)
            if connection.dialect.name == "sqlite":
                _write_ahead(connection)
            else:
                connection.execute(select(func.pg_advisory_xact_lock(MAKING_KEY)))
            # Two that begin at the same moment, as a coordinator and its desk, may both find a table missing.
            for table in _tables.sorted_tables:
                connection.execute(CreateTable(table, if_not_exists=True))
                for index in table.indexes:
                    connection.execute(CreateIndex(index, if_not_exists=True))

    def _is_ours(self, connection: Connection) -> bool:
        """Whether there are tables; raises FederationError if they are of another version."""
        if self._seen_ours:
            return True
        if not inspect(connection).has_table(RUN.name):
            return False
        found = connection.scalar(select(RUN.c.version))
        if found not in (None, VERSION):
            raise FederationError(
                f"the journal {self} is of version {found}, this clipcast reads {VERSION}: use the clipcast that wrote it, "
                f"or set `state` to a new folder (and `journal` to a new database)"
            )
        self._seen_ours = found is not None
        return True

    def close(self) -> None:
        """Let go of the folder and the database."""
        self._seen_ours = False
        if self._sole is not None:
            self._sole.close()
            self._sole = None
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _open(self) -> Engine:
        if self._engine is None:
            self._engine = create_engine(self._url, connect_args=self._patience())
            if self._engine.dialect.name == "sqlite":
                event.listen(self._engine, "connect", _make_durable)
        return self._engine

    def _connect(self) -> Connection:
        """Return a connection that works: of a server that was restarted the pool holds dead ones, and pg8000 hides that."""
        connection = self._open().connect()
        if self._file is None:
            try:
                connection.exec_driver_sql("SELECT 1")
                connection.rollback()
            except (SQLAlchemyError, OSError):
                connection.invalidate()
                self._open().dispose()
                return self._open().connect()
        return connection

    def _patience(self) -> dict[str, float]:
        return {"timeout": SILENCE_S} if self._url.get_driver_name() == "pg8000" else {}

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say what is wrong with the database in the operator's words."""
        try:
            yield
        except (SQLAlchemyError, OSError) as error:  # pg8000 lets a socket's own errors through
            if _passes(error):
                cure = f"make room in {self._folder}; if the file is damaged, restore it" if self._file else "see its log"
                raise NotKeptError(f"the journal {self} cannot be used ({_cause(error)}): {cure}") from error
            cure = f"restore it, or move {self._folder} aside to start anew" if self._file else "see its log"
            raise FederationError(f"the journal {self} cannot be used ({_cause(error)}): {cure}") from error


def not_written(folder: Path, error: OSError) -> NotKeptError:
    """Return what to say of a folder that takes nothing."""
    cure = "give this user the right to write there" if isinstance(error, PermissionError) else "make room there"
    return NotKeptError(f"{folder} cannot be written ({error}): {cure}")


def _passes(error: Exception) -> bool:
    """Whether an error is about the database's surroundings, so that the same may work a little later."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, OSError)
    if code := _said(error).get("C"):
        return code[:2] in PASSING
    return isinstance(error, OperationalError | InterfaceError) and "no such" not in str(error.orig)


def _cause(error: Exception) -> str:
    told = _said(error).get("M") or str(getattr(error, "orig", None) or error)
    return (told.splitlines() or [type(error).__name__])[0]


def _said(error: Exception) -> dict[str, str]:
    """Return what PostgreSQL says of an error, by the letters of its protocol: C the code, M the message."""
    arguments = getattr(getattr(error, "orig", None), "args", ())
    return arguments[0] if arguments and isinstance(arguments[0], dict) else {}


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise FederationError(f"`journal` is not the address of a database: {EXAMPLE}") from error
    if parsed.get_backend_name() != "postgresql":
        raise FederationError(f"`journal` names a {parsed.get_backend_name()} database, PostgreSQL is supported: {EXAMPLE}")
    return parsed


def _write_ahead(connection: Connection) -> None:
    """Let SQLite write ahead from now on, which stays with the file. For this it does not wait until others are done."""
    until = time.monotonic() + SILENCE_S
    while True:
        try:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        except OperationalError as error:
            if "locked" not in str(error.orig) or time.monotonic() >= until:
                raise
            time.sleep(0.01)
        else:
            return


def _make_durable(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("busy_timeout=30000", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
