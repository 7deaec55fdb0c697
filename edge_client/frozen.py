"""Hidden states of the frozen blocks, one entry a picture: computed once, kept in memory and beyond that in a file.

Blocks below the first adapted one never change, and pictures are not augmented: a picture has exactly one view, so one
entry is all that any epoch of any round needs of it.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

RAM_BYTES = 512 * 1024 * 1024
SEGMENT_BYTES = 64 * 1024 * 1024

Hidden = NDArray[np.float32]


class HiddenStore:
    """Entries (tokens, width) by key: the first ones in memory up to `budget` bytes, the others in a temporary file.

    Nothing is evicted: epochs visit every picture, and making room for the newest would then miss every time. Threads
    may share a store. The file lies in `folder` (default: the system's temporary folder, TMPDIR), has no name, and is
    gone with the store or the process, however that ends. If it cannot grow, what does not fit is computed each time.
    """

    def __init__(self, budget: int = RAM_BYTES, segment: int = SEGMENT_BYTES, folder: Path | None = None) -> None:
        self._budget = budget
        self._overflow: _Overflow | None = _Overflow(segment, folder)
        self._kept: dict[Hashable, Hidden] = {}
        self._lock = threading.Lock()
        self.ram_bytes = 0
        self.file_bytes = 0

    @property
    def entries(self) -> int:
        """Number of entries that are kept."""
        return len(self._kept)

    def get(self, keys: Sequence[Hashable], compute: Callable[[int], Hidden]) -> Hidden:
        """Return the entries of at least one key, (N, tokens, width) float32, in a new array.

        `compute(position)` gives the entry (tokens, width) of `keys[position]` and is called for what is missing only, one
        at a time: what is kept then cannot depend on which others were missing in the same call.
        """
        return np.stack([self._one(key, position, compute) for position, key in enumerate(keys)])

    def _one(self, key: Hashable, position: int, compute: Callable[[int], Hidden]) -> Hidden:
        # Held while computing: another thread that wants the same entry waits for it instead of computing it too.
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                return found
            hidden = np.array(compute(position), np.float32, order="C")
            self._keep(key, hidden)
            return hidden

    def _keep(self, key: Hashable, hidden: Hidden) -> None:
        if self.ram_bytes + hidden.nbytes <= self._budget:
            self._kept[key] = hidden
            self.ram_bytes += hidden.nbytes
        elif self._overflow is not None:
            try:
                self._kept[key] = self._overflow.put(hidden)
            except OSError as error:
                self._overflow = None
                log.warning(
                    "no room for more hidden states: they are computed again at each use, which is slower, because the "
                    "temporary file cannot grow (%s). Free space in the temporary folder, or set TMPDIR to a larger disk",
                    error,
                )
            else:
                self.file_bytes += hidden.nbytes


class _Overflow:
    """Arrays in nameless temporary files of `segment` bytes each, mapped into memory; made when first needed."""

    def __init__(self, segment: int, folder: Path | None) -> None:
        self._segment = segment
        self._folder = folder
        self._free: NDArray[np.uint8] = np.empty(0, np.uint8)

    def put(self, hidden: Hidden) -> Hidden:
        """Return a copy that lies in a file; raises OSError if there is no room."""
        if hidden.nbytes > len(self._free):
            self._free = _map_file(max(self._segment, hidden.nbytes), self._folder)
        place = self._free[: hidden.nbytes].view(np.float32).reshape(hidden.shape)
        place[...] = hidden
        self._free = self._free[hidden.nbytes :]
        return place


def _map_file(size: int, folder: Path | None) -> NDArray[np.uint8]:
    """Return `size` bytes of a new file without a name: it lives as long as its mapping. Raises OSError."""
    with tempfile.TemporaryFile(prefix="clipcast-hidden-", dir=folder) as file:
        # Reserved, not left as a hole: writing into a mapped hole when the disk is full kills the process (SIGBUS).
        os.posix_fallocate(file.fileno(), 0, size)
        return np.asarray(np.memmap(file, np.uint8, "r+", shape=(size,)))
