"""Blobs at rest: files named by the SHA-256 of their content, whole or absent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from protocol.codec import sha256
from protocol.storage.files import sync_folder, write_atomic

SUFFIX = ".safetensors"


class BlobError(RuntimeError):
    """A blob that is not there, or not what its name says."""


class Blobs:
    """A folder of blobs. What `put` has returned for survives a power cut."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, digest: str) -> Path:
        """Return where the blob of this hash is kept."""
        return self.folder / f"{digest}{SUFFIX}"

    def put(self, blob: bytes) -> str:
        """Keep a blob, once however often it is put; return its SHA-256."""
        digest = sha256(blob)
        path = self.path(digest)
        try:
            kept = path.read_bytes()
        except OSError:
            kept = None
        if kept == blob:  # and not merely a file of that name: it may be damaged
            sync_folder(self.folder)  # a crash may have come between the file's rename and this
        else:
            write_atomic(path, blob)
        return digest

    def get(self, digest: str) -> bytes:
        """Return the blob of this hash; raises BlobError if it is not there or not what its name says."""
        path = self.path(digest)
        try:
            blob = path.read_bytes()
        except FileNotFoundError as error:
            raise BlobError(f"{path} is missing") from error
        except OSError as error:
            raise BlobError(f"{path} cannot be read: {error}") from error
        if sha256(blob) != digest:
            raise BlobError(f"{path} is damaged, its hash is another")
        return blob

    def digests(self) -> Iterator[str]:
        """Yield the hash of every blob that is kept."""
        yield from sorted(path.stem for path in self.folder.glob(f"*{SUFFIX}"))

    def remove(self, digest: str) -> None:
        """Forget a blob; that it is gone already is fine."""
        self.path(digest).unlink(missing_ok=True)

    def sweep(self, wanted: set[str]) -> None:
        """Forget all blobs but `wanted`, and what a crash has left half written."""
        for digest in self.digests():
            if digest not in wanted:
                self.remove(digest)
        for half in self.folder.glob(f".*{SUFFIX}.*"):
            half.unlink(missing_ok=True)
