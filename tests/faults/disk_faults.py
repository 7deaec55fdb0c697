"""What befalls a disk: the power is cut at an operation, or operations are refused."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.faults.disk import LIVE, SAFE, TORN, Disk, Image, Operation, PowerCut


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
        """Carry it out, or fail."""
        self.seen += 1
        if self.seen == self.number:
            self.disk, self._until = disk, self.clock() + self.lasts_s
        elif disk is not self.disk or self.clock() >= self._until:
            return do()
        self.failed.append(operation)
        return _refuse(operation, half, self.code)


@dataclass
class Filled:
    """Those disks that are full take nothing, until they are freed."""

    full: set[str] = field(default_factory=set)  # by their folders' names

    def at(self, disk: Disk, operation: Operation, do: Callable[[], Any], half: Callable[[], Any]) -> Any:
        """Carry it out where there is room."""
        return _refuse(operation, half, errno.ENOSPC) if disk.root.name in self.full else do()


def _refuse(operation: Operation, half: Callable[[], Any], code: int) -> None:
    """Fail as the system and SQLite say it."""
    if operation.kind == "commit":
        raise sqlite3.OperationalError("database or disk is full" if code == errno.ENOSPC else "disk I/O error")
    if operation.kind == "write":
        half()
    raise OSError(code, os.strerror(code), operation.path)
