"""Disks that can lose power or room at any operation: what folders hold now, and what would be left of them after a cut.

The product's files are real. Wrapped are the calls by which it makes them last: a file is safe once it is synced, a name
(of a new, renamed or removed file) once its folder is, a transaction of SQLite once it is committed. A cut leaves all that
was asked for (`LIVE`), only what is safe (`SAFE`), or that with half of what came after (`TORN`).
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

LIVE, TORN, SAFE = "live", "torn", "safe"
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
        os.makedirs(self.root)  # noqa: PTH103 - not as one of its operations
        self._files.clear()
        self._synced.clear()
        self._names.clear()
        for name, data in image.items():
            path = self.root / name
            os.makedirs(path, exist_ok=True) if data is None else path.write_bytes(data)  # noqa: PTH103
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
        """SQLite has synced its files and, where they are new or gone, their names."""
        names = self._names.setdefault(str(self.root), {})
        for path in (database, f"{database}-wal"):
            if Path(path).exists():
                self.sync(path)
                names[Path(path).name] = self._file(path)
            else:
                names.pop(Path(path).name, None)
                self.removed(path)

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
