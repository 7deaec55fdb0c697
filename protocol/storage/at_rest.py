"""Adapters at rest: factors stay in their blob's file and come into memory one at a time, when they are asked for.

A round's adapters together are many times what fits into a coordinator's memory; averaging them needs one factor of each.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protocol.codec import UPDATE_FACTORS
from protocol.messages import Adapter, FloatArray
from protocol.storage.blobs import BlobError

HALF = np.dtype("<f2")


@dataclass(frozen=True)
class _Place:
    """Where a factor's float16 values are in the file, its shape, and the CRC-32 of its bytes."""

    offset: int
    shape: tuple[int, int]
    crc: int


class StoredAdapter(Mapping[str, FloatArray]):
    """A read-only adapter over the file of a blob. Every look-up reads anew, and gives float32 as decoding does.

    Reading raises BlobError if the file is gone, or is not what it was when the blob's hash was checked: each factor's bytes
    are compared with the CRC-32 that was taken then.
    """

    def __init__(self, path: Path, blob: bytes, prefix: str = "") -> None:
        self.path = path
        self._places = _places(blob, prefix)

    @classmethod
    def of_update(cls, path: Path, blob: bytes) -> StoredAdapter:
        """Return the adapter of an update's blob, which has been decoded before and lies at `path`."""
        return cls(path, blob, UPDATE_FACTORS)

    def __getitem__(self, name: str) -> FloatArray:
        place = self._places[name]
        length = place.shape[0] * place.shape[1] * HALF.itemsize
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(place.offset)
                data = file.read(length)
        except OSError as error:
            raise BlobError(f"{self.path} cannot be read: {error}") from error
        if len(data) != length or zlib.crc32(data) != place.crc:
            raise BlobError(f"{self.path} is damaged: {name} is not what it was")
        return np.frombuffer(data, HALF).reshape(place.shape).astype(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass(frozen=True)
class KeptBlob:
    """A blob of `size` bytes that stays in its file. Slices, without a step, read it as they would read bytes."""

    path: Path
    size: int

    def __getitem__(self, part: slice) -> bytes:
        """Return a part; raises OSError if the file is gone."""
        start, stop, _ = part.indices(self.size)
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(max(0, stop - start))


def kept(adapter: Adapter, digest: str) -> KeptBlob | None:
    """Return the file of an adapter's own blob if it has one, None if it is in memory, or part of another blob."""
    if isinstance(adapter, StoredAdapter) and adapter.path.stem == digest:
        return KeptBlob(adapter.path, adapter.path.stat().st_size)
    return None


def _places(blob: bytes, prefix: str) -> dict[str, _Place]:
    """Find the factors in a safetensors blob: 8 bytes of length, the header in JSON, the data."""
    (length,) = struct.unpack("<Q", blob[:8])
    header, view = json.loads(blob[8 : 8 + length]), memoryview(blob)
    found: dict[str, _Place] = {}
    for name in sorted(header):
        if name != "__metadata__" and name.startswith(prefix):
            begin, end = (8 + length + offset for offset in header[name]["data_offsets"])
            rows, columns = header[name]["shape"]
            found[name.removeprefix(prefix)] = _Place(begin, (rows, columns), zlib.crc32(view[begin:end]))
    return found
