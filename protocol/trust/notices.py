"""What a client is told when the gate does not let it in: no device waits for ever without knowing why."""

from __future__ import annotations

from typing import TypeVar

from protocol.errors import Refused
from protocol.messages import Notice

Value = TypeVar("Value")

CLONED = "cloned"
EVERY_S = 10.0
KEPT = 1000
REPLAYS = 8
TOLD = frozenset(("unknown-device", "wrong-key", "revoked", "quarantined", CLONED))


class Notices:
    """At most one notice to a client in `EVERY_S` seconds: the newest, at the end of that time if need be."""

    def __init__(self) -> None:
        self._pending: dict[str, Notice] = {}
        self._last: dict[str, float] = {}
        self._replays: dict[str, int] = {}

    def note(self, client: str, refusal: Refused) -> None:
        """Take in a refusal, if it is one that the client should hear of.

        A number that was used is so when it happens again and again: single messages may overtake each other.
        """
        told = refusal.verdict in TOLD
        if refusal.verdict == "replayed":
            count = self._replays.pop(client, 0) + 1
            _remember(self._replays, client, count)
            told = count % REPLAYS == 0
        if told:
            _remember(self._pending, client, Notice(reason=refusal.verdict, detail=str(refusal)[:500]))

    def due(self, now: float) -> list[tuple[str, Notice]]:
        """Return what to tell whom now."""
        ready = [client for client in self._pending if now - self._last.get(client, -EVERY_S) >= EVERY_S]
        for client in ready:
            self._last.pop(client, None)
            _remember(self._last, client, now)
        return [(client, self._pending.pop(client)) for client in ready]


def _remember(book: dict[str, Value], client: str, value: Value) -> None:
    book[client] = value
    while len(book) > KEPT:  # names cost nothing: a stranger may use any number of them
        del book[next(iter(book))]
