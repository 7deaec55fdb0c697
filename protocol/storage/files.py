"""Files that are whole or absent: temporary file, fsync, rename, fsync of the folder. And folders that one process owns."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LOCK = "lock"


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`; whatever dies meanwhile, readers see the old content or the new. Makes the folder."""
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Give a file to write, which takes the place of `path` at the end, whole; if that is not reached, nothing does."""
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_halves(path: Path) -> None:
    """Remove what writers of `path` that died have left half written. Nobody may be writing it."""
    for half in path.parent.glob(f".{path.name}.*"):
        half.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, that survive a power cut."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock_folder(folder: Path) -> IO[bytes]:
    """Make this process the only one at work in a folder, which it makes, until the result is closed or the process ends.

    Raises BlockingIOError if another one is.
    """
    make_folder(folder)
    lock = (folder / LOCK).open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise
    return lock


def is_locked(folder: Path) -> bool | None:
    """Whether a process is at work in a folder (`lock_folder`), None where that cannot be seen. Changes nothing."""
    try:
        lock = (folder / LOCK).open("rb")
    except FileNotFoundError:
        return False
    except OSError:
        return None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
