"""New pictures in a folder. Who puts them there may be writing still, and on a share nobody tells: so it is looked at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from edge_client.errors import InferenceError
from edge_client.inference.pictures import SUFFIXES

Stamp = tuple[int, int]  # modification time in ns, size


class Folder:
    """Finds each picture of a folder once, when it has stopped changing; written anew, it is found anew.

    A file is taken when it is the same at two looks after each other and not empty. What lies there at the first look counts
    as known unless `existing`.
    """

    def __init__(self, path: Path, *, existing: bool = False) -> None:
        self._path = path
        self._done: dict[str, Stamp] = {}
        self._seen: dict[str, Stamp] = {} if existing else self._look()
        if not existing:
            self._done = dict(self._seen)

    def ready(self) -> list[Path]:
        """Look once; return what has become ready since the last look, sorted. Raises InferenceError."""
        now = self._look()
        found = [name for name, stamp in now.items() if self._seen.get(name) == stamp != self._done.get(name) and stamp[1]]
        self._seen = now
        # What is gone is forgotten: a camera that numbers its pictures anew begins at 1 again.
        self._done = {name: stamp for name, stamp in self._done.items() if name in now}
        self._done |= {name: now[name] for name in found}
        return [self._path / name for name in sorted(found)]

    def _look(self) -> dict[str, Stamp]:
        try:
            return dict(self._entries())
        except OSError as error:
            raise InferenceError(f"{self._path} cannot be watched: {error.strerror}. Name a folder, or a camera") from error

    def _entries(self) -> Iterator[tuple[str, Stamp]]:
        with os.scandir(self._path) as entries:
            for entry in entries:
                if entry.name.startswith(".") or Path(entry.name).suffix.lower() not in SUFFIXES:
                    continue
                try:
                    if entry.is_file():
                        status = entry.stat()
                        yield entry.name, (status.st_mtime_ns, status.st_size)
                except FileNotFoundError:  # renamed or removed just now
                    continue
