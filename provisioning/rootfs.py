"""A board's root filesystem that is still a folder of this machine, usually written to as root: nothing leads out of it.

Folders are opened one in the other and links are not followed, so that `/etc/clipcast -> /` in an image cannot make us write
to the host's own files.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from provisioning.errors import ProvisioningError

FOLDER_MODE = 0o755
BLOCK = 1 << 20
State = Literal["new", "same", "replaces", "unreadable"]


@dataclass(frozen=True)
class Entry:
    """A file to be laid: its path below the root, what is in it (bytes, or a file of this machine), and its mode.

    With `link` it is a symbolic link to that text instead.
    """

    path: str
    content: bytes | Path = b""
    mode: int = 0o644
    link: str | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        if self.link is not None:
            return 0
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def blocks(self) -> Iterator[bytes]:
        """Yield the content."""
        if isinstance(self.content, bytes):
            yield self.content
            return
        with self.content.open("rb") as file:
            while block := file.read(BLOCK):
                yield block


@dataclass(frozen=True)
class Found:
    """What stands where an entry would go, against what is wanted; `was` describes what would be replaced."""

    entry: Entry
    state: State
    was: str = ""


class RootFs:
    """The folder `path`. As root all that is laid belongs to root, as it has to on a board; else to whoever runs this."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._own = os.geteuid() == 0

    def look(self, entry: Entry) -> Found:
        """Compare without writing; raises ProvisioningError if a link or a file is where a folder has to be."""
        place = PurePosixPath(entry.path)
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(self._folder(place.parent, make=False))
                seen = os.stat(place.name, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                return Found(entry, "new")
            return self._compare(entry, place.name, folder, seen)

    def lay(self, entry: Entry) -> None:
        """Write an entry, whole or not at all; raises ProvisioningError."""
        place = PurePosixPath(entry.path)
        half = f".{place.name}.clipcast"
        try:
            with self._folder(place.parent, make=True) as folder:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(half, dir_fd=folder)  # of a run that was killed
                try:
                    self._write(entry, half, folder)
                    os.rename(half, place.name, src_dir_fd=folder, dst_dir_fd=folder)
                except BaseException:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(half, dir_fd=folder)
                    raise
                os.fsync(folder)
        except PermissionError as error:
            raise ProvisioningError(f"{self.path / entry.path} cannot be written: run this as root (sudo)") from error
        except OSError as error:
            raise ProvisioningError(f"{self.path / entry.path} cannot be written: {error.strerror}") from error

    def _write(self, entry: Entry, name: str, folder: int) -> None:
        if entry.link is not None:
            os.symlink(entry.link, name, dir_fd=folder)
            if self._own:
                os.chown(name, 0, 0, dir_fd=folder, follow_symlinks=False)
            return
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder)
        with os.fdopen(handle, "wb") as file:
            for block in entry.blocks():
                file.write(block)
            if self._own:
                os.fchown(handle, 0, 0)
            os.fchmod(handle, entry.mode)
            file.flush()
            os.fsync(handle)

    def _compare(self, entry: Entry, name: str, folder: int, seen: os.stat_result) -> Found:
        if stat.S_ISDIR(seen.st_mode):
            raise ProvisioningError(f"{self.path / entry.path} is a folder, where a file has to go: remove it")
        mine = not self._own or (seen.st_uid, seen.st_gid) == (0, 0)
        if stat.S_ISLNK(seen.st_mode):
            target = os.readlink(name, dir_fd=folder)
            return Found(entry, "same") if target == entry.link and mine else Found(entry, "replaces", f"a link to {target}")
        was = f"{stat.S_IMODE(seen.st_mode):04o} {seen.st_size}"
        try:
            same = seen.st_size == entry.size and entry.link is None and self._holds(entry, name, folder)
        except PermissionError:
            return Found(entry, "unreadable", was)
        as_wanted = same and mine and stat.S_IMODE(seen.st_mode) == entry.mode
        return Found(entry, "same") if as_wanted else Found(entry, "replaces", was)

    @staticmethod
    def _holds(entry: Entry, name: str, folder: int) -> bool:
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        with os.fdopen(handle, "rb") as file:
            return all(file.read(len(block)) == block for block in entry.blocks()) and not file.read(1)

    @contextlib.contextmanager
    def _folder(self, path: PurePosixPath, *, make: bool) -> Iterator[int]:
        """Open a folder below the root; raises FileNotFoundError if it is not there and not to be made."""
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            done = PurePosixPath()
            for part in path.parts:
                done /= part
                inner = self._open(part, handle, done, make=make)
                os.close(handle)
                handle = inner
            yield handle
        finally:
            os.close(handle)

    def _open(self, part: str, above: int, path: PurePosixPath, *, make: bool) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        try:
            return os.open(part, flags, dir_fd=above)
        except FileNotFoundError:
            if not make:
                raise
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise ProvisioningError(self._why_not(part, above, path)) from error
            raise
        os.mkdir(part, FOLDER_MODE, dir_fd=above)
        handle = os.open(part, flags, dir_fd=above)
        os.fchmod(handle, FOLDER_MODE)
        if self._own:
            os.fchown(handle, 0, 0)
        os.fsync(above)
        return handle

    def _why_not(self, part: str, above: int, path: PurePosixPath) -> str:
        try:
            target = os.readlink(part, dir_fd=above)
        except OSError:
            return f"{self.path / path} is a file, where a folder has to be: remove it"
        return (
            f"{self.path / path} is a link to {target}. It is not followed, since it may lead out of the image: make a "
            f"folder of it"
        )
