"""What has arrived of a blob, in memory or in a file: by byte ranges, so that it outlives another way of cutting.

The file is a log of records (offset, length, CRC-32, data). A crash can only harm its end: whatever does not check out is
dropped, with all behind it, and travels again. The blob's own hash is the judge of the whole.
"""

from __future__ import annotations

import contextlib
import copy
import os
import struct
import zlib
from pathlib import Path
from typing import Protocol

from protocol.messages import BlobRef
from protocol.storage.files import make_folder, sync_folder

RECORD = struct.Struct("<III")  # offset, length, CRC-32 of both and the data
SYNC_BYTES = 512 * 1024
SUFFIX = ".part"


class Partial(Protocol):
    """The part of one blob that is here."""

    def has(self, offset: int, length: int) -> bool:
        """Whether all of these bytes are here."""

    def add(self, offset: int, data: bytes) -> None:
        """Take in bytes; raises OSError if they cannot be kept."""

    def whole(self, size: int) -> bytes | None:
        """Return the blob of `size` bytes, None while any are missing."""

    def clear(self) -> None:
        """Forget everything."""


class Ranges:
    """Disjoint, sorted byte ranges."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    def cover(self, start: int, end: int) -> bool:
        """Whether every byte from `start` to before `end` is in."""
        return any(low <= start and end <= high for low, high in self._ranges)

    def add(self, start: int, end: int) -> None:
        """Put these bytes in."""
        merged: list[tuple[int, int]] = []
        for low, high in self._ranges:
            if high < start or end < low:
                merged.append((low, high))
            else:
                start, end = min(start, low), max(end, high)
        self._ranges = sorted([*merged, (start, end)])


class MemoryPartial:
    """A part of a blob in memory."""

    def __init__(self) -> None:
        self.clear()

    def has(self, offset: int, length: int) -> bool:
        """Whether all of these bytes are here."""
        return self._ranges.cover(offset, offset + length)

    def add(self, offset: int, data: bytes) -> None:
        """Take in bytes."""
        end = offset + len(data)
        if len(self._data) < end:
            self._data.extend(bytes(end - len(self._data)))
        self._data[offset:end] = data
        self._ranges.add(offset, end)

    def whole(self, size: int) -> bytes | None:
        """Return the blob, None while any bytes are missing."""
        return bytes(self._data) if self._ranges.cover(0, size) else None

    def clear(self) -> None:
        """Forget everything."""
        self._ranges = Ranges()
        self._data = bytearray()


class FilePartial:
    """A part of a blob of `size` bytes in a file, synced every half megabyte: more than that is not lost to a power cut."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self._ranges = Ranges()
        self._unsynced = 0
        self._is_named = path.exists()  # on the disk; a name of what is not synced is worth nothing
        self._end = self._scan()

    def has(self, offset: int, length: int) -> bool:
        """Whether all of these bytes are here."""
        return self._ranges.cover(offset, offset + length)

    def add(self, offset: int, data: bytes) -> None:
        """Take in bytes; raises OSError if they cannot be kept, and forgets them."""
        is_new = not self._path.exists()
        if is_new:
            make_folder(self._path.parent)
            self._ranges, self._end, self._is_named = Ranges(), 0, False
        record = RECORD.pack(offset, len(data), _crc(offset, data)) + data
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            write_at(handle, record, self._end)  # over what a failed write may have left
            self._unsynced += len(record)
            if self._unsynced >= SYNC_BYTES:
                os.fsync(handle)
                self._unsynced = 0
                if not self._is_named:
                    sync_folder(self._path.parent)
                    self._is_named = True
        finally:
            os.close(handle)
        self._end += len(record)
        self._ranges.add(offset, offset + len(data))

    def whole(self, size: int) -> bytes | None:
        """Return the blob, None while any bytes are missing."""
        if not self._ranges.cover(0, size):
            return None
        blob = bytearray(size)
        log = self._path.read_bytes()[: self._end]
        for offset, start, length in _records(log, self._size):
            blob[offset : offset + length] = log[start : start + length]
        return bytes(blob)

    def clear(self) -> None:
        """Forget everything, on the disk too."""
        _remove(self._path)
        self._ranges, self._end, self._unsynced = Ranges(), 0, 0

    def _scan(self) -> int:
        """Find what an earlier process has left; return where the next record goes.

        Of a whole that it did not come to use the last record is left out: what arrives is what is acted on.
        """
        try:
            log = self._path.read_bytes()
        except OSError:
            return 0
        end = 0
        for offset, start, length in _records(log, self._size):
            before = copy.copy(self._ranges)
            self._ranges.add(offset, offset + length)
            if self._ranges.cover(0, self._size):
                self._ranges = before
                return end
            end = start + length
        return end


class MemoryPartials:
    """Parts of blobs in memory."""

    def open(self, owner: str, ref: BlobRef) -> Partial:
        """Return a new part of this blob."""
        del owner, ref
        return MemoryPartial()

    def retain(self, owners: set[str]) -> None:
        """Nothing to forget: who holds a part forgets it."""


class FilePartials:
    """A folder of parts of blobs: one of each owner at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, owner: str, ref: BlobRef) -> Partial:
        """Return what is here of the blob, for this owner; another blob of the same owner's is forgotten."""
        for other in self._folder.glob(f"{owner}@*{SUFFIX}"):
            if other.name != f"{owner}@{ref.sha256}{SUFFIX}":
                _remove(other)
        return FilePartial(self._folder / f"{owner}@{ref.sha256}{SUFFIX}", ref.size)

    def retain(self, owners: set[str]) -> None:
        """Forget the parts of all other owners."""
        for path in self._folder.glob(f"*@*{SUFFIX}"):
            if path.name.split("@")[0] not in owners:
                _remove(path)


Partials = MemoryPartials | FilePartials


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # it costs room, and the next one of this owner's is another file
        path.unlink(missing_ok=True)


def _crc(offset: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(struct.pack("<II", offset, len(data))))


def _records(log: bytes, size: int) -> list[tuple[int, int, int]]:
    """Return (offset in the blob, start in the log, length) of each record up to the first that does not check out."""
    found: list[tuple[int, int, int]] = []
    position = 0
    while position + RECORD.size <= len(log):
        offset, length, crc = RECORD.unpack_from(log, position)
        start = position + RECORD.size
        data = log[start : start + length]
        if not 0 < length == len(data) or offset + length > size or crc != _crc(offset, data):
            break
        found.append((offset, start, length))
        position = start + length
    return found


def write_at(handle: int, data: bytes, position: int) -> None:
    """Write all of `data` at a position of an open file; raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, position)
        if written == 0:
            raise OSError("the disk takes no more")
        view, position = view[written:], position + written
