"""Who may upload now: so many at a time, in the order in which they asked; who stalls goes to the end of the line."""

from __future__ import annotations

STALLED_S = 20.0


class Turns:
    """At most `limit` turns at a time. A turn without progress for `stalled_s` seconds is passed on if somebody waits."""

    def __init__(self, limit: int, stalled_s: float = STALLED_S) -> None:
        self._limit = limit
        self._stalled_s = stalled_s
        self._turns: dict[str, float] = {}  # by client: when it last made progress
        self._line: dict[str, None] = {}

    def ask(self, client: str) -> None:
        """Put a client into the line, unless it is there or has its turn."""
        if client not in self._turns:
            self._line[client] = None

    def progress(self, client: str, now: float) -> None:
        """Note that a client's upload goes on."""
        if client in self._turns:
            self._turns[client] = now

    def end(self, client: str) -> None:
        """Take a client out: it is done, or has given up."""
        self._turns.pop(client, None)
        self._line.pop(client, None)

    def now(self, now: float) -> list[str]:
        """Return whose turn it is."""
        for client, last in list(self._turns.items()):
            if self._line and now - last > self._stalled_s:
                self.end(client)
                self._line[client] = None
        while self._line and len(self._turns) < self._limit:
            first = next(iter(self._line))
            del self._line[first]
            self._turns[first] = now
        return list(self._turns)
