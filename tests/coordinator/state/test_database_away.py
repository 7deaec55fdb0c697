"""A real PostgreSQL that goes away, refuses or falls silent: what is kept is waited for, and nobody hangs."""

from __future__ import annotations

import gc
import socket

import pytest
from sqlalchemy import create_engine, text

from coordinator.errors import FederationError, NotKeptError
from coordinator.records import Identity
from coordinator.state.devices import Devices
from coordinator.state.store import Store

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
IDENTITY = Identity(
    federation="lab", model_digest="a" * 64, classes=("cat", "dog"), rank=4, alpha=8.0, projections=("q",), first_block=0
)


@pytest.fixture(autouse=True)
def sockets():
    """Collect, while that is ignored, the sockets that pg8000 leaves open when the server has closed them."""
    yield
    gc.collect()


@pytest.fixture
def database(postgres):
    """Return the address of a database, and a way to do something to it from outside."""
    url = postgres()
    server, _, name = url.rpartition("/")
    engine = create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")

    def do(*statements: str) -> None:
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement.format(name=name)))

    yield url, do
    engine.dispose()


ENDED = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"


@pytest.fixture
def store(tmp_path, database):
    made = Store(tmp_path / "state", database[0])
    made.begin(IDENTITY)
    yield made
    made.close()


def test_a_server_that_was_restarted_is_used_again(store, database):
    store.registry.add("ann", "key")
    database[1](ENDED)
    assert set(store.registry.devices()) == {"ann"}


def test_what_the_server_refuses_for_now_may_be_kept_later(store, database):
    database[1]("ALTER DATABASE {name} SET default_transaction_read_only = on", ENDED)
    with pytest.raises(NotKeptError, match=r"cannot execute .* in a read-only transaction"):
        store.registry.add("ann", "key")
    database[1]("ALTER DATABASE {name} SET default_transaction_read_only = off", ENDED)
    store.registry.add("ann", "key")
    assert set(store.registry.devices()) == {"ann"}


def test_devices_stay_as_they_were_while_the_database_is_away(store, database, caplog):
    now = [0.0]
    store.registry.add("ann", "key")
    devices = Devices(store, "registered", lambda: now[0])
    database[1]("ALTER DATABASE {name} ALLOW_CONNECTIONS false", ENDED)
    for _ in range(3):
        now[0] += 10.0
        assert devices.refresh() == set()
    devices.check("ann", "key")
    assert caplog.text.count("no news of devices") == 1
    database[1]("ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    store.registry.revoke("ann")
    now[0] += 10.0
    assert devices.refresh() == {"ann"}
    assert devices.is_revoked("ann")


def test_a_server_that_says_nothing_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.state.journal.SILENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = Store(tmp_path / "state", f"postgresql+pg8000://clipcast@127.0.0.1:{silent.getsockname()[1]}/lab")
        with pytest.raises(NotKeptError, match="timed out"):
            store.prepare()
        store.close()


def test_a_second_coordinator_with_another_folder_is_turned_away_until_the_first_has_stopped(tmp_path, store, database):
    second = Store(tmp_path / "other", database[0])
    with pytest.raises(
        FederationError, match=r"another coordinator is at work with the journal postgresql.*a database of its own"
    ):
        second.begin(IDENTITY)
    second.close()
    store.close()
    assert second.begin(IDENTITY)[1] == 2
    second.close()


def test_the_lock_is_taken_again_when_the_server_was_restarted(tmp_path, store, database):
    database[1](ENDED)
    store.registry.add("ann", "key")
    second = Store(tmp_path / "other", database[0])
    with pytest.raises(FederationError, match="another coordinator is at work"):
        second.begin(IDENTITY)
    second.close()
