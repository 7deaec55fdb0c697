"""The calls by which the product makes files last, wrapped: each is an operation of a test's disk (disk.py)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine.default import DefaultDialect

from tests.faults.disk import Disks


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
