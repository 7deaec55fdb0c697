"""Who may be drawn for a round: who is online, and who sits out because they delivered nothing when they were drawn."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator

from coordinator.records import RoundRecord
from protocol.messages import Status

SILENCE_S = 900.0  # a client says its status every five minutes at least
REMEMBERED = 64
LONGEST_REST = 32


class Roster:
    """The clients that are online, and what the last rounds' records say of them.

    Presence is a hint, by the clock. Who sits out follows from records alone, so that a restart draws the same clients.
    """

    def __init__(self) -> None:
        self._online: dict[str, Status] = {}
        self._heard: dict[str, float] = {}
        self._records: deque[RoundRecord] = deque(maxlen=REMEMBERED)

    def __len__(self) -> int:
        return len(self._online)

    def __contains__(self, client: object) -> bool:
        return client in self._online

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._online))

    def status(self, client: str) -> Status:
        """Return what a client that is online has said last."""
        return self._online[client]

    def hear(self, client: str, status: Status, now: float) -> None:
        """Take in a client's status."""
        if status.state == "offline":
            self.drop(client)
            return
        self._online[client], self._heard[client] = status, now

    def drop(self, client: str) -> None:
        """Take a client for gone."""
        self._online.pop(client, None)
        self._heard.pop(client, None)

    def reconnected(self, now: float) -> None:
        """Give everybody time to speak again: while our own link was down nobody was heard."""
        self._heard = dict.fromkeys(self._heard, now)

    def expire(self, now: float) -> list[str]:
        """Take those for gone that said nothing for long, as when their last will was lost with a broker; return them."""
        gone = sorted(client for client, heard in self._heard.items() if now - heard > SILENCE_S)
        for client in gone:
            self.drop(client)
        return gone

    def learn(self, record: RoundRecord) -> None:
        """Take in how a round went."""
        self._records.append(record)

    def misses(self) -> dict[str, tuple[int, int]]:
        """Return who has let rounds down since the last update of theirs: how often, and in which round last.

        A round with its quorum was not let down by those that were slower. Of one without, those are to blame who said that
        they failed; if nobody did, all that were silent.
        """
        found: dict[str, tuple[int, int]] = {}
        for record in self._records:
            for client in (*record.accepted, *record.late):
                found.pop(client, None)
            if record.outcome == "quorum-missed":
                for client in record.failed or record.silent:
                    found[client] = (found.get(client, (0, 0))[0] + 1, record.round)
        return found

    def draw(self, number: int, wanted: int, seed: int) -> list[str]:
        """Return the participants of round `number`, at most `wanted`.

        Who let a round down sits out one, after the next 2, 4, ..., unless the others are too few.
        """
        misses, rng = self.misses(), random.Random(f"{seed}:{number}")
        resting = {name for name, (times, last) in misses.items() if number <= last + min(2 ** (times - 1), LONGEST_REST)}
        fit = [client for client in sorted(self._online) if client not in resting]
        if len(fit) >= wanted:
            return sorted(rng.sample(fit, wanted))
        others = rng.sample(sorted(set(self._online) & resting), len(set(self._online) & resting))
        others.sort(key=lambda client: misses[client][0])
        return sorted([*fit, *others[: wanted - len(fit)]])
