"""Disks that can lose power or room at any operation: what folders hold now, and what would be left of them after a cut.

The product's files are real. Wrapped are the calls by which it makes them last: a file is safe once it is synced, a name
(of a new, renamed or removed file) once its folder is, a transaction of SQLite once it is committed. A cut leaves all that
was asked for (`LIVE`), only what is safe (`SAFE`), or that with half of what came after (`TORN`).
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pytest
from sqlalchemy.engine.default import DefaultDialect

LIVE, TORN, SAFE = "live", "torn", "safe"
GONE = " (deleted)"
Image = dict[str, bytes | None]
"""A folder by relative path: contents, None for a folder."""


class PowerCut(BaseException):
    """Nothing after this point happened."""


@dataclass(frozen=True)
class Operation:
    """Something that changes a disk: write, sync, create, rename, folder sync, unlink, mkdir or commit."""

    kind: str
    path: str


class Fault(Protocol):
    """What happens at an operation. It calls `do`, or `half` for a write or commit that is cut off, or neither."""

    def at(self, disk: Disk, operation: Operation, do: Callable[[], Any], half: Callable[[], Any]) -> Any:
        """Carry out an operation, or not."""


@dataclass
class Cut:
    """The power is cut at the `number`-th operation.

    `when`: "before" it, amid it ("torn"), after it with what was not safe "lost", or "after" it.
    """

    number: int
    when: str
    seen: int = 0
    left: Image | None = None
    disk: Disk | None = None
    operation: Operation | None = None

    def at(self, disk: Disk, operation: Operation, do: Callable[[], Any], half: Callable[[], Any]) -> Any:
        """Carry it out, or cut and keep what is left."""
        self.seen += 1
        if self.seen != self.number:
            return do()
        if self.when == "torn" and operation.kind in ("write", "commit"):
            half()
        elif self.when != "before" and not (self.when == "torn" and operation.kind.endswith("sync")):
            do()
        self.left = disk.image({"torn": TORN, "lost": SAFE}.get(self.when, LIVE))
        self.disk, self.operation, disk.dead = disk, operation, True
        raise PowerCut


@dataclass
class Full:
    """From the `number`-th operation on its disk takes nothing for `lasts_s`, 0: only this once. A write gets half down."""

    number: int
    code: int
    lasts_s: float
    clock: Callable[[], float]
    seen: int = 0
    failed: list[Operation] = field(default_factory=list)
    disk: Disk | None = None
    _until: float = 0.0

    def at(self, disk: Disk, operation: Operation, do: Callable[[], Any], half: Callable[[], Any]) -> Any:
        """Carry it out, or fail as the system and SQLite say it."""
        self.seen += 1
        if self.seen == self.number:
            self.disk, self._until = disk, self.clock() + self.lasts_s
        elif disk is not self.disk or self.clock() >= self._until:
            return do()
        self.failed.append(operation)
        if operation.kind == "commit":
            raise sqlite3.OperationalError("database or disk is full" if self.code == errno.ENOSPC else "disk I/O error")
        if operation.kind == "write":
            half()
        raise OSError(self.code, os.strerror(self.code), operation.path)


class Calm:
    """Nothing happens but that operations are counted."""

    def __init__(self) -> None:
        self.done: list[Operation] = []

    def at(self, disk: Disk, operation: Operation, do: Callable[[], Any], half: Callable[[], Any]) -> Any:
        """Carry it out."""
        del disk, half
        self.done.append(operation)
        return do()


@dataclass
class Disk:
    """One machine's folder: which file stands behind a name, what of it is synced, which names are."""

    root: Path
    dead: bool = False
    _serials: Iterator[int] = field(default_factory=itertools.count)
    _files: dict[str, int] = field(default_factory=dict)  # by path
    _synced: dict[int, bytes] = field(default_factory=dict)
    _names: dict[str, dict[str, int | None]] = field(default_factory=dict)  # by folder: synced names, None for a folder

    def image(self, how: str) -> Image:
        """Return what a power cut now leaves."""
        if how == SAFE:
            return dict(self._safe(str(self.root), ""))
        found: Image = {}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            if path.is_dir():
                found[name] = None
            elif not name.endswith("-shm"):  # SQLite makes it anew
                found[name] = self._half(path) if how == TORN else path.read_bytes()
        return found

    def restore(self, image: Image) -> None:
        """Put the folder into this state, all of it safe, as another start of the machine finds it."""
        self.dead = False
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        self._files.clear()
        self._synced.clear()
        self._names.clear()
        for name, data in image.items():
            path = self.root / name
            path.mkdir(parents=True, exist_ok=True) if data is None else path.write_bytes(data)
            if data is not None:
                self.sync(str(path))
        for folder in (self.root, *self.root.rglob("*")):
            if folder.is_dir():
                self.sync(str(folder))

    def sync(self, path: str) -> None:
        """A file's bytes, or a folder's names, are safe from now on."""
        if not Path(path).is_dir():
            self._synced[self._file(path)] = Path(path).read_bytes()
            return
        with os.scandir(path) as entries:
            self._names[path] = {e.name: None if e.is_dir() else self._file(e.path) for e in entries}

    def committed(self, database: str) -> None:
        """SQLite has synced its log and, as it is new, its name."""
        for path in (database, f"{database}-wal"):
            if Path(path).exists():
                self.sync(path)
                self._names.setdefault(str(self.root), {})[Path(path).name] = self._file(path)

    def renamed(self, source: str, target: str) -> None:
        """A file stands behind another name."""
        self._files[target] = self._file(source)
        del self._files[source]

    def removed(self, path: str) -> None:
        """No file stands behind this name any more."""
        self._files.pop(path, None)

    def _file(self, path: str) -> int:
        if path not in self._files:
            self._files[path] = next(self._serials)
        return self._files[path]

    def _half(self, path: Path) -> bytes:
        data, synced = path.read_bytes(), self._synced.get(self._file(str(path)), b"")
        if not data.startswith(synced):
            return data[: len(data) // 2]
        return data[: len(synced) + (len(data) - len(synced)) // 2]

    def _safe(self, folder: str, prefix: str) -> Iterator[tuple[str, bytes | None]]:
        for name, file in sorted(self._names.get(folder, {}).items()):
            if file is None:
                yield prefix + name, None
                yield from self._safe(f"{folder}/{name}", f"{prefix}{name}/")
            elif not name.endswith("-shm"):
                yield prefix + name, self._synced.get(file, b"")


class Disks:
    """The disks of all machines of one process, and the fault that their operations meet."""

    def __init__(self) -> None:
        self.fault: Fault = Calm()
        self._disks: dict[str, Disk] = {}

    def add(self, root: Path) -> Disk:
        """Make a disk of a folder."""
        root.mkdir(parents=True, exist_ok=True)
        disk = self._disks[str(root)] = Disk(root)
        return disk

    def forget(self, root: Path) -> None:
        """A machine is no more."""
        del self._disks[str(root)]

    def hold(self, path: str) -> bool:
        """Tell whether a file is on one of the disks."""
        return any(path.startswith(root + "/") for root in self._disks)

    def at(self, kind: str, path: str, do: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        """Carry out an operation as the fault will have it."""
        for root, disk in self._disks.items():
            if path.startswith(root + "/") or path == root:
                if disk.dead:
                    raise PowerCut
                return self.fault.at(disk, Operation(kind, path), partial(self._done, disk, kind, path, do), half)
        return do()

    def _done(self, disk: Disk, kind: str, path: str, do: Callable[[], Any]) -> Any:
        result = do()
        match kind:
            case "sync" | "folder sync":
                disk.sync(path)
            case "commit":
                disk.committed(path)
            case "unlink":
                disk.removed(path)
            case "rename":
                disk.renamed(path, str(result))
        return result


class _Writer:
    """What os.fdopen gives: bytes go to the disk at a flush."""

    def __init__(self, disks: Disks, handle: int, path: str) -> None:
        self._disks, self._handle, self._path, self._held = disks, handle, path, b""

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def write(self, data: bytes) -> int:
        """Hold bytes until the flush."""
        self._held += data
        return len(data)

    def flush(self) -> None:
        """Write what is held."""
        data, self._held = self._held, b""
        self._disks.at(
            "write", self._path, lambda: os.write(self._handle, data), lambda: os.write(self._handle, data[: len(data) // 2])
        )

    def fileno(self) -> int:
        """Return the file's handle."""
        return self._handle


def _path_of(handle: int) -> str:
    return str(Path(f"/proc/self/fd/{handle}").readlink())


@contextmanager
def watched(patch: pytest.MonkeyPatch) -> Iterator[Disks]:
    """Give disks whose operations are seen as long as the patch lasts."""
    disks = Disks()
    wraps = [*_wrap_files(disks), *_wrap_names(disks), (DefaultDialect, "do_commit", _wrap_commit(disks))]
    for owner, name, wrapped in wraps:
        patch.setattr(owner, name, wrapped)
    yield disks


Wrapped = tuple[object, str, Callable[..., Any]]


def _wrap_files(disks: Disks) -> list[Wrapped]:
    real_open, real_fsync, real_pwrite, real_fdopen = os.open, os.fsync, os.pwrite, os.fdopen

    def open_(path: Any, flags: int, mode: int = 0o777, **how: Any) -> int:
        do = partial(real_open, path, flags, mode, **how)
        return int(disks.at("create", str(path), do) if flags & os.O_CREAT and not Path(path).exists() else do())

    def fsync(handle: int) -> None:
        path = _path_of(handle)
        disks.at("folder sync" if Path(path).is_dir() else "sync", path, lambda: real_fsync(handle))

    def pwrite(handle: int, data: bytes, offset: int) -> int:
        half = bytes(data)[: len(data) // 2]
        do = partial(real_pwrite, handle, data, offset)
        return int(disks.at("write", _path_of(handle), do, lambda: real_pwrite(handle, half, offset)))

    def fdopen(handle: int, *how: Any, **more: Any) -> Any:
        path = _path_of(handle)
        return _Writer(disks, handle, path) if disks.hold(path) else real_fdopen(handle, *how, **more)

    return [(os, "open", open_), (os, "fsync", fsync), (os, "pwrite", pwrite), (os, "fdopen", fdopen)]


def _wrap_names(disks: Disks) -> list[Wrapped]:
    real_replace, real_unlink, real_mkdir = Path.replace, Path.unlink, Path.mkdir

    def replace(self: Path, target: Path) -> Path:
        return Path(disks.at("rename", str(self), lambda: real_replace(self, target)))

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.exists() or not missing_ok:
            disks.at("unlink", str(self), lambda: real_unlink(self, missing_ok))

    def mkdir(self: Path, *how: Any, **more: Any) -> None:
        disks.at("mkdir", str(self), lambda: real_mkdir(self, *how, **more))

    return [(Path, "replace", replace), (Path, "unlink", unlink), (Path, "mkdir", mkdir)]


def _wrap_commit(disks: Disks) -> Callable[..., Any]:
    real_commit = DefaultDialect.do_commit

    def commit(self: Any, connection: Any) -> None:
        (path,) = [row[2] for row in connection.execute("PRAGMA database_list") if row[1] == "main"]
        do = partial(real_commit, self, connection)
        disks.at("commit", path, do, do)

    return commit
