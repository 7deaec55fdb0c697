"""The one transfer protocol: offer -> need -> chunks -> receipt. Sans-I/O: events and the time go in, decisions come out.

`Fetch` is the receiving side of one blob, `Serve` the sending side, `Repeat` the clock by which an unanswered message is
sent again (full jitter, so that a fleet does not speak in chorus). Chunks may arrive twice, late, in any order or never.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass, field

from protocol.codec import sha256
from protocol.errors import Refused, WireError
from protocol.messages import CHUNK_SIZE, MIN_CHUNK_SIZE, BlobRef
from protocol.storage.at_rest import KeptBlob
from protocol.storage.partial import MemoryPartial, Partial

log = logging.getLogger(__name__)

UNLIMITED = 1 << 30
CHUNK_EXPIRY_S = 60
# What is retained is said again after such pauses: a broker may lose it without a word.
BROADCAST_S, PRESENCE_S, LASTING_CAP_S = 10.0, 30.0, 300.0
PACKET_MARGIN = 512
NEED_S = 6.0
NUDGE_S = 1.0
PATIENCE = 4.0
SMALLEST_CUT = 4096
SLOW_LINK = 128_000 / 8  # bytes a second
SLOW_CHUNK_S = 3.0


def chunk_size(max_packet: int | None) -> int:
    """Return how blobs are cut for a broker that takes packets of `max_packet` bytes (None: it names no limit)."""
    if max_packet is None:
        return CHUNK_SIZE
    return max(MIN_CHUNK_SIZE, min(CHUNK_SIZE, max_packet - PACKET_MARGIN))


def cut_for(rate: float) -> int:
    """Return how large chunks should be on a link of `rate` bytes a second: whole, or of three seconds if it is slow."""
    size = CHUNK_SIZE
    while rate < SLOW_LINK and size > SMALLEST_CUT and size > rate * SLOW_CHUNK_S:
        size //= 2
    return size


class Pace:
    """How fast what is sent reaches the broker, in bytes a second: from the first chunk given out until all have landed."""

    def __init__(self) -> None:
        self.rate: float | None = None
        self._bytes = 0
        self._since = 0.0

    def sent(self, size: int, now: float) -> None:
        """Note that a chunk was given out."""
        if not self._bytes:
            self._since = now
        self._bytes += size

    def landed(self, now: float) -> bool:
        """Note that nothing is under way; return whether `rate` is new."""
        size, self._bytes = self._bytes, 0
        if size and now > self._since:
            self.rate = size / (now - self._since)
            return True
        return False

    def lost(self) -> None:
        """Forget what was under way: its link is gone."""
        self._bytes = 0


def to_bitmap(indices: set[int], chunks: int) -> str:
    """Set of chunk indices -> hex bitmap, chunk 0 the highest bit of the first byte."""
    bits = bytearray(-(-chunks // 8))
    for index in indices:
        bits[index // 8] |= 0x80 >> (index % 8)
    return bits.hex()


def from_bitmap(bitmap: str, chunks: int) -> set[int]:
    """Hex bitmap -> set of chunk indices; raises WireError if it is not one of `chunks` bits."""
    bits = bytes.fromhex(bitmap)
    if len(bits) != -(-chunks // 8):
        raise WireError(f"a bitmap of {len(bits)} bytes for {chunks} chunks")
    indices = {i for i in range(len(bits) * 8) if bits[i // 8] & (0x80 >> (i % 8))}
    if any(index >= chunks for index in indices):
        raise WireError(f"a bitmap that asks for more than {chunks} chunks")
    return indices


@dataclass
class Repeat:
    """When to say it again: `due(now)` is true at first, then after `base` s, doubling up to `cap`, each jittered."""

    rng: random.Random
    base: float = 1.0
    cap: float = 30.0
    _tries: int = 0
    _next: float = 0.0
    _said: bool = False

    def due(self, now: float) -> bool:
        """Tell whether to speak now, and if so schedule the next time."""
        if now < self._next and not self._said:
            return False
        early, self._said = self._said, False
        span = min(self.cap, self.base * 2.0 ** min(self._tries, 32))
        self._tries += 1
        self._next = now + span * (0.5 + 0.5 * self.rng.random())
        return not early

    def said(self) -> None:
        """Begin with the shortest pause: it has been said just now."""
        self._tries, self._said = 0, True

    def again(self) -> None:
        """Speak at the next opportunity: the other side may have been away."""
        self._tries, self._next = 0, 0.0

    def answered(self, now: float, wait: float = 0.0) -> None:
        """Progress was made: wait a full interval, or `wait` seconds if that is longer, before asking again."""
        self._tries = 0
        self._next = now + max(self.base, wait)


@dataclass
class Fetch:
    """The receiving side of one blob: what has arrived, what to ask for, and the whole once it is proven.

    At most `window` chunks are asked for at a time, which bounds what is under way. `partial` may hold what an earlier
    fetch of the same blob had got.
    """

    ref: BlobRef
    repeat: Repeat
    window: int = UNLIMITED
    partial: Partial = field(default_factory=MemoryPartial)
    _asked: set[int] = field(default_factory=set)
    _last: float = 0.0  # when chunks were last asked for, or one came
    _since: float | None = None  # since when the next chunk is awaited
    _pace: float = 0.0  # seconds between chunks of late, rather too long than too short

    def chunk(self, index: int, data: bytes, now: float) -> None:
        """Take in one chunk; raises WireError if it cannot belong to this blob. A duplicate changes nothing."""
        if index >= self.ref.chunks or len(data) != self.ref.length(index):
            raise Refused(
                "wrong-chunk",
                f"chunk {index} of {len(data)} bytes does not belong to a blob of "
                f"{self.ref.chunks} chunks of {self.ref.chunk_size} bytes, {self.ref.size} in all",
            )
        if self._has(index):
            return
        try:
            self.partial.add(index * self.ref.chunk_size, data)
        except OSError as error:  # as if it were lost: it is asked for again
            log.warning("chunk %d of blob %s cannot be kept: %s", index, self.ref.sha256[:12], error)
            return
        self._asked.discard(index)
        self._pace = max(now - (now if self._since is None else self._since), self._pace / 2)
        self._last = self._since = now
        # On a slow link chunks are under way for long: to ask for them again would double the load.
        self.repeat.answered(now, min(PATIENCE * self._pace, self.repeat.cap))
        if not self._asked:
            self._since = None
            self.repeat.again()

    def need(self, now: float) -> str | None:
        """Return the bitmap to ask for now, or None while an answer is awaited or nothing is missing."""
        if not self.repeat.due(now):
            return None
        missing = [index for index in range(self.ref.chunks) if not self._has(index)]
        self._asked = set(missing[: self.window])
        self._last = now
        self._since = now if self._since is None else self._since
        return to_bitmap(self._asked, self.ref.chunks) if missing else None

    def nudge(self, now: float) -> None:
        """Ask again at once: the other side has offered again, which it does only when it has nothing under way.

        What it had sent before is here, since messages overtake each other rarely, or lost with its connection. Only a need
        that has just gone out may have missed the offer.
        """
        if now - self._last > NUDGE_S:
            self.repeat.again()

    def blob(self) -> bytes | None:
        """Return the whole blob once complete; raises WireError, and starts over, if its hash is wrong."""
        try:
            whole = self.partial.whole(self.ref.size)
        except OSError as error:
            log.warning("what has arrived of blob %s cannot be read: %s", self.ref.sha256[:12], error)
            whole = b""
        if whole is None:
            return None
        if sha256(whole) != self.ref.sha256:
            self.partial.clear()
            self.repeat.again()
            raise Refused("damaged", f"blob {self.ref.sha256[:12]} arrived damaged: wrong hash, asking for it again")
        return whole

    def _has(self, index: int) -> bool:
        return self.partial.has(index * self.ref.chunk_size, self.ref.length(index))


@dataclass
class Serve:
    """The sending side of one blob: needs are merged, and each wanted chunk is given out once, lowest first.

    After a first need it waits `gather` seconds for others, because a broadcast chunk serves all who asked by then. What
    it gave out is not given out again until it has `landed`: on a slow link it is still under way. And not for `rest`
    seconds: who asks meanwhile has asked before it came.
    """

    blob: bytes | KeptBlob
    ref: BlobRef
    gather: float = 0.0
    rest: float = 0.0
    _wanted: set[int] = field(default_factory=set)
    _out: set[int] = field(default_factory=set)
    _ready: float = 0.0
    _given: dict[int, float] = field(default_factory=dict)  # when, of those that rest

    @property
    def busy(self) -> bool:
        """Whether chunks are wanted or under way."""
        return bool(self._wanted or self._out)

    def landed(self) -> None:
        """All that was given out has reached the broker, or is lost."""
        self._out.clear()

    def need(self, bitmap: str, now: float) -> None:
        """Take in one receiver's need; raises WireError for a bitmap of another size."""
        self._given = {index: given for index, given in self._given.items() if now - given < self.rest}
        wanted = from_bitmap(bitmap, self.ref.chunks) - self._out - self._given.keys()
        if wanted and not self._wanted:
            self._ready = now + self.gather
        self._wanted |= wanted

    def take(self, room: int, now: float) -> list[tuple[int, bytes]]:
        """Return at most `room` chunks to send now."""
        if now < self._ready:
            return []
        taken = sorted(self._wanted)[: max(room, 0)]
        self._wanted.difference_update(taken)
        self._out.update(taken)
        if self.rest:
            self._given.update(dict.fromkeys(taken, now))
        size = self.ref.chunk_size
        try:
            return [(index, self.blob[index * size : (index + 1) * size]) for index in taken]
        except OSError as error:  # gone with its round: who still wants it takes the next plan
            log.warning("blob %s cannot be served: %s", self.ref.sha256[:12], error)
            return []
