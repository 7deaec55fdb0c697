"""A client's downloads: records that manifests point to, on their way or here; what has arrived survives a restart."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from protocol.messages import BlobRef
from protocol.storage.blobs import BlobError, Blobs
from protocol.storage.partial import FilePartials, MemoryPartials, Partials
from protocol.transfer.exchange import NEED_S, Fetch, Repeat

log = logging.getLogger(__name__)

Record = TypeVar("Record")


@dataclass
class Download(Generic[Record]):
    """A record that a manifest points to: being fetched, or here."""

    fetch: Fetch
    read: Callable[[bytes], Record]
    record: Record | None = None

    @property
    def ref(self) -> BlobRef:
        """The blob that holds it."""
        return self.fetch.ref

    @property
    def under_way(self) -> bool:
        """Whether it is still being fetched."""
        return self.record is None

    def is_for(self, ref: BlobRef) -> bool:
        """Whether this is the blob of `ref`: here already, or being fetched in chunks of that size."""
        return self.ref == ref if self.under_way else self.ref.sha256 == ref.sha256


class Shelf:
    """Where downloads are kept: blobs and parts of them, in a folder or only in memory. A disk that fails costs time."""

    def __init__(self, rng: random.Random, folder: Path | None = None) -> None:
        self._rng = rng
        self._blobs = None if folder is None else Blobs(folder / "blobs")
        self._partials: Partials = MemoryPartials() if folder is None else FilePartials(folder / "partial")

    def begin(self, slot: str, ref: BlobRef, read: Callable[[bytes], Record]) -> Download[Record]:
        """Start a download, from where an earlier one was cut off; the last one of this slot is forgotten."""
        return Download(Fetch(ref, Repeat(self._rng, NEED_S), partial=self._partials.open(slot, ref)), read)

    def find(self, ref: BlobRef) -> bytes | None:
        """Return the blob if it is kept here."""
        if self._blobs is None:
            return None
        try:
            return self._blobs.get(ref.sha256)
        except BlobError:
            return None

    def keep(self, blob: bytes, wanted: set[str]) -> None:
        """Keep a blob, and of the others only `wanted`."""
        if self._blobs is None:
            return
        try:
            self._blobs.sweep(wanted | {self._blobs.put(blob)})
        except OSError as error:
            log.warning("a download is not kept and must be repeated after a restart: %s", error)
