"""A blob that is too large for the memory of a device, as it arrives: its bytes in a file at their places, beside it a log.

The log has a record (offset, length, CRC-32) of each part that is there. It decides what counts: after a crash a part whose
bytes are not what its record says travels again. The blob's own hash is the judge of the whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from protocol.storage.files import make_folder, replacing, sync_folder
from protocol.storage.partial import Ranges, write_at

RECORD = struct.Struct("<QIII")  # offset, length, CRC-32 of the data, CRC-32 of the three
SYNC_BYTES = 4 * 1024 * 1024
READ_BYTES = 1024 * 1024
SPARE_BYTES = 64 * 1024 * 1024  # is left free on the disk


class LargePartial:
    """A part of one blob, in the file `path` and its log. What is not synced yet, at most 4 MB, a power cut may take."""

    def __init__(self, path: Path, size: int) -> None:
        """Take up what an earlier process has left."""
        self._path = path
        self._log = path.with_suffix(".log")
        self._size = size
        self._ranges = Ranges()
        self._unsynced = 0
        self._end = self._scan()

    def has(self, offset: int, length: int) -> bool:
        """Whether all of these bytes are here."""
        return self._ranges.cover(offset, offset + length)

    def add(self, offset: int, data: bytes) -> None:
        """Take in bytes; raises OSError if they cannot be kept."""
        make_folder(self._path.parent)
        head = struct.pack("<QII", offset, len(data), zlib.crc32(data))
        with _opened(self._path) as handle:
            write_at(handle, data, offset)
            self._unsynced += len(data)
            due = self._unsynced >= SYNC_BYTES
            if due:
                os.fsync(handle)
        with _opened(self._log) as handle:
            write_at(handle, head + struct.pack("<I", zlib.crc32(head)), self._end)  # over what a failed write has left
            if due:
                os.fsync(handle)
                sync_folder(self._path.parent)
                self._unsynced = 0
        self._end += RECORD.size
        self._ranges.add(offset, offset + len(data))

    def whole(self, size: int) -> bytes | None:
        """Return the blob, None while any bytes are missing; `finish` needs no memory for it."""
        return self._path.read_bytes()[:size] if self._ranges.cover(0, size) else None

    def finish(self, digest: str, target: Path) -> bool:
        """Move the whole blob to `target`, on the disk for good; False, and all is forgotten, if its hash is another.

        Raises OSError.
        """
        if file_sha256(self._path) != digest:
            self.clear()
            return False
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
        make_folder(target.parent)
        self._path.replace(target)
        sync_folder(target.parent)
        self._log.unlink(missing_ok=True)
        return True

    def clear(self) -> None:
        """Forget everything, on the disk too."""
        for path in (self._log, self._path):
            with contextlib.suppress(OSError):  # it costs room
                path.unlink(missing_ok=True)
        self._ranges, self._end, self._unsynced = Ranges(), 0, 0

    def _scan(self) -> int:
        """Find what counts of what is there; return where the next record goes."""
        try:
            log, data = self._log.read_bytes(), self._path.open("rb")
        except OSError:
            return 0
        end = 0
        with data:
            for start in range(0, len(log) - RECORD.size + 1, RECORD.size):
                offset, length, crc, own = RECORD.unpack_from(log, start)
                if own != zlib.crc32(log[start : start + RECORD.size - 4]) or offset + length > self._size:
                    break  # what a crash has left half written
                end = start + RECORD.size
                data.seek(offset)
                if zlib.crc32(data.read(length)) == crc:
                    self._ranges.add(offset, offset + length)
        return end


def room_for(size: int, folder: Path) -> bool:
    """Whether the disk of a folder has room for so many bytes, and some to spare."""
    make_folder(folder)
    return shutil.disk_usage(folder).free >= size + SPARE_BYTES


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex; raises OSError."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            found.update(part)
    return found.hexdigest()


def copy_atomic(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all; raises OSError."""
    with source.open("rb") as file, replacing(target) as copy:
        shutil.copyfileobj(file, copy, READ_BYTES)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield handle
    finally:
        os.close(handle)
