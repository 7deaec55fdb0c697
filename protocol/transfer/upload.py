"""A client's upload: one update at a time, offered until its receipt, in chunks that suit broker and link. Sans-I/O."""

from __future__ import annotations

import logging
import random

from protocol.messages import CHUNK_SIZE, Need, Offer, Receipt
from protocol.transfer.exchange import SLOW_LINK, SMALLEST_CUT, Pace, Repeat, Serve, chunk_size, cut_for, from_bitmap
from protocol.transfer.parcel import Parcel

log = logging.getLogger(__name__)


class Upload:
    """The `parcel` that is offered, None if nothing is; and what was learnt of the link meanwhile, for what comes next.

    Chunks become smaller, down to 4 KB, while a whole connection brings none through, or each takes long; the broker's
    limit holds always.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.parcel: Parcel | None = None
        self._serve: Serve | None = None
        self._repeat = Repeat(rng)
        self._size = self._limit = chunk_size(None)
        self._max_packet: int | None = None
        self._pace = Pace()
        self._sent: set[int] = set()  # chunks given to this connection
        self._tried: set[int] = set()  # those that the last connection was given, until a need tells their fate

    @property
    def offer(self) -> Offer | None:
        """What is offered."""
        return None if self.parcel is None else self.parcel.offer

    def begin(self, parcel: Parcel) -> None:
        """Offer this instead of what was offered before; raises WireError if it is too large."""
        if self._pace.rate is not None and self._pace.rate >= SLOW_LINK:
            self._cut(CHUNK_SIZE)  # the link was slow once, and is so no longer
        self._put(parcel.cut(self._size))
        self._repeat = Repeat(self._rng)
        self._sent, self._tried = set(), set()

    def end(self) -> None:
        """Offer nothing."""
        self.parcel = self._serve = None

    def connected(self, max_packet: int | None) -> None:
        """Begin anew on another connection, whose broker takes such packets; raises WireError if they are too small."""
        self._pace.lost()
        self._max_packet = max_packet
        self._cut(self._limit)
        self._repeat.again()
        self._tried, self._sent = self._sent, set()

    def due(self, now: float, room: int, drained: bool) -> tuple[Offer | None, list[tuple[int, bytes]]]:
        """Return the offer if it is time to say it, and at most `room` chunks to send; `drained`: all before have landed."""
        if drained and self._serve is not None:
            self._serve.landed()
        if drained and room > 0 and self._pace.landed(now):
            self._heed_pace()
        if self._serve is None or self.parcel is None:
            return None, []
        said = None
        if self._serve.busy:
            self._repeat.answered(now)
        elif self._repeat.due(now):
            said = self.parcel.offer
        chunks = self._serve.take(room, now)
        for index, data in chunks:
            self._sent.add(index)
            self._pace.sent(len(data), now)
        return said, chunks

    def needed(self, need: Need, now: float) -> None:
        """Take in what the coordinator lacks; raises WireError for a bitmap of another size."""
        if self.parcel is None or self._serve is None or need.sha256 != self.parcel.offer.blob.sha256:
            return
        self._repeat.answered(now)
        self._serve.need(need.missing, now)
        missing = from_bitmap(need.missing, self.parcel.offer.blob.chunks)
        fruitless = bool(self._tried) and self._tried <= missing
        self._tried = set()
        if fruitless and self._size > SMALLEST_CUT:
            log.info("no chunk of %d bytes came through", self._size)
            self._cut(max(SMALLEST_CUT, self._size // 2))
            self._repeat.again()

    def answered(self, receipt: Receipt) -> bool:
        """Take in a receipt; return whether it is for what is offered, which ends the upload."""
        offer = self.offer
        if offer is None or (receipt.round, receipt.sha256) != (offer.round, offer.blob.sha256):
            return False
        self.end()
        return True

    def _heed_pace(self) -> None:
        """Cut smaller on a slow link: a chunk that takes long holds up all else, and is long to repeat."""
        rate = self._pace.rate
        assert rate is not None
        if cut_for(rate) < self._size:
            log.info("the link takes %.0f kbit/s: chunks have %d bytes from now on", rate * 8 / 1000, cut_for(rate))
            self._cut(cut_for(rate))
            self._repeat.again()

    def _cut(self, limit: int) -> None:
        """Cut in chunks of at most `limit` bytes from now on, which the broker takes, too."""
        self._limit = limit
        size = min(chunk_size(self._max_packet), limit)
        if size != self._size:
            self._size = size
            if self.parcel is not None:
                self._put(self.parcel.cut(size))

    def _put(self, parcel: Parcel) -> None:
        self.parcel, self._serve = parcel, Serve(parcel.blob, parcel.offer.blob)
