"""A TCP relay in a thread of its own: accepts on 127.0.0.1, connects to a target port, and leaves the rest to a pump."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

UP, DOWN = "up", "down"
BACKLOG = 4096
RESET = struct.pack("ii", 1, 0)


@dataclass(eq=False)
class Pair:
    """One connection through the relay: the client's stream and the target's, and what a pump wants to remember of it."""

    near: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    far: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    memory: dict[str, int] = field(default_factory=dict)

    def ends(self, direction: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return where a direction reads and where it writes; "up" is from the client to the target."""
        source, sink = (self.near, self.far) if direction == UP else (self.far, self.near)
        return source[0], sink[1]

    def cut(self, reset: bool = False) -> None:
        """End both connections at once; with `reset` by RST, so that the other side's data is lost as well."""
        for _, writer in (self.near, self.far):
            raw = writer.get_extra_info("socket")
            with contextlib.suppress(OSError, AttributeError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET if reset else struct.pack("ii", 0, 0))
            writer.transport.abort()


Pump = Callable[[Pair, str], Awaitable[None]]


class Relay:
    """Relays connections from `port` to `target`. `pump(pair, direction)` moves the bytes and returns when it is over."""

    def __init__(self, target: int, pump: Pump) -> None:
        self.pairs: set[Pair] = set()
        self._target = target
        self._pump = pump
        self._loop = asyncio.new_event_loop()
        listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
        self.port = int(listener.getsockname()[1])
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, args=(listener,), name=f"relay[{self.port}]", daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Call a function in the relay's thread, soon; nothing happens once the relay is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def cut_all(self, reset: bool = False) -> int:
        """End every connection, from the relay's thread; return how many there were."""
        pairs = list(self.pairs)
        for pair in pairs:
            pair.cut(reset)
        return len(pairs)

    def spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run a coroutine in the relay's thread beside the connections."""
        self.call(self._spawn, work)

    def close(self) -> None:
        """Stop, and end every connection."""
        self.call(self._loop.stop)
        self._thread.join(10)

    def _spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            await work()

        task = self._loop.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _run(self, listener: socket.socket) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, sock=listener, backlog=BACKLOG))
        try:
            self._loop.run_forever()
        finally:
            server.close()
            self.cut_all()
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        pair = Pair((reader, writer), far)
        for _, end in (pair.near, pair.far):
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.pairs.add(pair)
        pumps = [asyncio.ensure_future(self._guarded(pair, direction)) for direction in (UP, DOWN)]
        try:
            with contextlib.suppress(asyncio.CancelledError):  # closed: asyncio would complain about a cancelled connection
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.pairs.discard(pair)
            for pump in pumps:
                pump.cancel()
            pair.cut()

    async def _guarded(self, pair: Pair, direction: str) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await self._pump(pair, direction)
