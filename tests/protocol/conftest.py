"""Fixtures of the wire's tests: waiting with a deadline, and a network in virtual time between real ends."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable

import pytest

from protocol.client_end import ClientEnd
from protocol.coordinator_end import CoordinatorEnd
from tests.network import Network


def _wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 20.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"waited {deadline_s} s for {what}"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """Wait for a condition with a deadline."""
    return _wait_until


@pytest.fixture(scope="session")
def new_network() -> Callable[..., Network]:
    """Make a network of one coordinator and the clients named, all of federation `fed`, connected."""

    def make(*clients: str, fates: Iterable[str] = (), max_packet: int | None = None, **limits: object) -> Network:
        ends: dict[str, ClientEnd | CoordinatorEnd] = {"coordinator": CoordinatorEnd("fed", random.Random(0), **limits)}
        for seed, client in enumerate(clients):
            ends[client] = ClientEnd("fed", client, random.Random(seed))
        network = Network(ends, fates, max_packet)
        network.connect()
        return network

    return make
