"""The blobs of releases: files named by the SHA-256 of their content, whole or absent, and never read into memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from coordinator.errors import FederationError, NotKeptError
from coordinator.state.journal import not_written
from protocol.messages import BlobRef
from protocol.storage.at_rest import KeptBlob
from protocol.storage.blobs import BlobError
from protocol.storage.files import LOCK, lock_folder, make_folder, sync_folder
from protocol.storage.large import file_sha256

PIECE = 1 << 20


class ReleaseBlobs:
    """A folder of blobs. What `put` has returned for survives a power cut."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let no other process put or sweep meanwhile; raises FederationError if one does."""
        try:
            lock = lock_folder(self.folder)
        except BlockingIOError as error:
            raise FederationError("another release is being made: wait for its end") from error
        except OSError as error:
            raise not_written(self.folder, error) from error
        with lock:
            yield

    def put(self, source: Path) -> tuple[str, int]:
        """Copy a file; return its SHA-256 and size in bytes. Raises OSError if it cannot be read, NotKeptError."""
        with source.open("rb") as file:
            return self._put(iter(lambda: file.read(PIECE), b""))

    def put_bytes(self, blob: bytes) -> tuple[str, int]:
        """Keep a small blob; return its SHA-256 and size in bytes. Raises NotKeptError."""
        return self._put([blob])

    def _put(self, pieces: Iterable[bytes]) -> tuple[str, int]:
        """Write what comes, hash it on the way, and give it its name at the end."""
        with self._writable():
            make_folder(self.folder)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=".")
        try:
            with os.fdopen(handle, "wb") as file:
                digest, size = self._written(pieces, file)
            with self._writable():
                Path(name).replace(self.path(digest))  # also over one of that name: it may be damaged
                sync_folder(self.folder)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return digest, size

    def _written(self, pieces: Iterable[bytes], file: IO[bytes]) -> tuple[str, int]:
        hashed, size = hashlib.sha256(), 0
        for piece in pieces:  # what the source raises is not the folder's fault
            hashed.update(piece)
            size += len(piece)
            with self._writable():
                file.write(piece)
        with self._writable():
            file.flush()
            os.fsync(file.fileno())
        return hashed.hexdigest(), size

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise NotKeptError(f"{not_written(self.folder, error)}; the release was not made") from error

    def path(self, digest: str) -> Path:
        """Return where the blob of this hash is kept."""
        return self.folder / digest

    def has(self, ref: BlobRef) -> bool:
        """Whether there is a file of this name and size."""
        with contextlib.suppress(OSError):
            return self.path(ref.sha256).stat().st_size == ref.size
        return False

    def open(self, ref: BlobRef) -> KeptBlob:
        """Return a blob that is whole; raises BlobError if it is missing or damaged. Reads all of it."""
        path = self.path(ref.sha256)
        try:
            digest = file_sha256(path)
        except OSError as error:
            raise BlobError(f"{path} cannot be read: {error}") from error
        if digest != ref.sha256:
            raise BlobError(f"{path} is damaged, its hash is another")
        return KeptBlob(path, ref.size)

    def sweep(self, wanted: set[str]) -> None:
        """Forget all blobs but `wanted`, and what a crash has left half written; only `alone`."""
        for path in self.folder.iterdir():
            if path.name not in wanted and path.name != LOCK:
                path.unlink(missing_ok=True)
