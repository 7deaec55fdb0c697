"""Faults of a TCP link: delay, rate, cuts after so many bytes or at drawn times, half-open connections, resets.

All of it happens in one thread, so that thousands of connections cost no more than their bytes.
"""

from __future__ import annotations

import asyncio
import random

from tests.faults.relay import DOWN, UP, Pair, Relay

READ = 4096
LEFT, CUT = "left", "cut"


class FaultProxy:
    """Forwards 127.0.0.1:port to a target port, with faults drawn from `seed`.

    cut_after: each connection is cut after a drawn number of bytes, both directions together. rate: bytes a second, in
    each of the limited `directions` or with `shared` in all of them together. delay_s: each byte arrives so much later.
    """

    def __init__(
        self,
        target: int,
        seed: int = 0,
        *,
        cut_after: tuple[int, int] | None = None,
        rate: float | None = None,
        directions: tuple[str, ...] = (UP, DOWN),
        shared: bool = False,
        delay_s: float = 0.0,
    ) -> None:
        self.cuts = 0
        self.moved = {UP: 0, DOWN: 0}
        self.rate = rate
        self.delay_s = delay_s
        self._rng = random.Random(seed)
        self._cut_after = cut_after
        self._directions = directions
        self._shared = shared
        self._free: dict[str, float] = {}
        self._frozen = False
        self._thawed: asyncio.Event | None = None
        self._healed = False
        self._relay = Relay(target, self._pump)
        self.port = self._relay.port

    def heal(self) -> None:
        """Cut no more."""
        self._cut_after, self._healed = None, True

    def cut_all(self, reset: bool = False) -> None:
        """Cut every connection now."""
        self._relay.call(self._cut_now, reset)

    def cut_every(self, span: tuple[float, float], reset: bool = False) -> None:
        """From now on cut every connection after pauses drawn from `span` seconds, until healed."""

        async def cutting() -> None:
            while True:
                await asyncio.sleep(self._rng.uniform(*span))
                if self._healed:
                    return
                self._cut_now(reset)

        self._relay.spawn(cutting)

    def freeze(self) -> None:
        """Half-open: connections stay, new ones are taken, and nothing moves any more, nobody is told."""
        self._frozen = True

    def thaw(self) -> None:
        """Move again; what waited arrives late."""
        self._frozen = False
        self._relay.call(self._wake)

    def close(self) -> None:
        """Stop."""
        self._relay.close()

    def _cut_now(self, reset: bool) -> None:
        self.cuts += self._relay.cut_all(reset)

    def _wake(self) -> None:
        if self._thawed is not None:
            self._thawed.set()

    async def _pump(self, pair: Pair, direction: str) -> None:
        if LEFT not in pair.memory:
            pair.memory[LEFT] = self._rng.randint(*self._cut_after) if self._cut_after else -1
        reader, writer = pair.ends(direction)
        loop = asyncio.get_running_loop()
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=64)
        sender = loop.create_task(self._send(late, writer))
        try:
            while data := await reader.read(READ):
                await self._await_turn(direction, len(data))
                data, is_cut = self._counted(pair, direction, data)
                await late.put((loop.time() + self.delay_s, data))
                if is_cut or sender.done():
                    break
            await late.put((loop.time() + self.delay_s, b""))
            await sender
        finally:
            sender.cancel()

    async def _send(self, late: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await late.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            if not data:
                return
            writer.write(data)
            await writer.drain()

    def _counted(self, pair: Pair, direction: str, data: bytes) -> tuple[bytes, bool]:
        left = pair.memory[LEFT]
        is_cut = self._cut_after is not None and 0 <= left < len(data)
        if is_cut:
            data = data[:left]
            self.cuts += CUT not in pair.memory  # both directions may come to it
            pair.memory[CUT] = 1
        pair.memory[LEFT] = left - len(data) if left >= 0 else left
        self.moved[direction] += len(data)
        return data, is_cut

    async def _await_turn(self, direction: str, size: int) -> None:
        while self._frozen:
            self._thawed = self._thawed or asyncio.Event()
            self._thawed.clear()
            await self._thawed.wait()
        if self.rate is None or direction not in self._directions:
            return
        line = "both" if self._shared else direction
        now = asyncio.get_running_loop().time()
        self._free[line] = max(now, self._free.get(line, 0.0)) + size / self.rate
        await asyncio.sleep(self._free[line] - now)
