"""Releases without a model: bytes in the place of an artefact, and a smoke answer that is given."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordinator.releases.blobs import ReleaseBlobs
from coordinator.releases.book import Entry
from coordinator.releases.orders import Draft, Orders
from coordinator.state.store import Store
from protocol.release.desk_end import FOLDER
from protocol.release.manifests import Smoke
from protocol.release.rings import parse_rings

SMOKE = Smoke(picture="AAAA", label="fox", embedding="AAAA")


class Lab:
    """A coordinator's state folder, and orders to it."""

    def __init__(self, folder: Path, journal: str | None = None) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.journal = journal
        self.store = Store(self.state, journal)
        self.book = self.store.releases
        self.blobs = ReleaseBlobs(self.state / FOLDER / "blobs")
        self.orders = Orders("lab", self.book, self.blobs)

    def draft(self, name: str = "model.onnx", size: int = 5000, rings: str = "1,10%,100%", **fields: object) -> Draft:
        path = self.folder / name
        path.write_bytes(random.Random(f"{name} {size}").randbytes(size))
        return Draft(path, parse_rings(rings), **fields)  # type: ignore[arg-type]

    def make(self, name: str = "model.onnx", size: int = 5000, rings: str = "1,10%,100%", **fields: object) -> Entry:
        return self.orders.make(self.draft(name, size, rings, **fields), lambda *_: SMOKE)

    def complete(self) -> Entry:
        """Make the newest release one that has passed its rings."""
        entry = self.book.newest()
        assert entry is not None
        done = self.book.change(entry, entry.rollout.model_copy(update={"ring": len(entry.rollout.rings)}))
        assert done is not None
        return done

    def kept(self) -> set[str]:
        return {path.name for path in self.blobs.folder.iterdir()} - {"lock"}

    def close(self) -> None:
        self.store.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lab]:
    """On either database."""
    journal = request.getfixturevalue("postgres")() if request.param == "postgresql" else None
    made = Lab(tmp_path, journal)
    yield made
    made.close()


@pytest.fixture
def new_lab(tmp_path: Path) -> Iterator[Callable[[], Lab]]:
    """Make one with SQLite, again and again in the same folder."""
    made: list[Lab] = []

    def make() -> Lab:
        made.append(Lab(tmp_path))
        return made[-1]

    yield make
    for one in made:
        one.close()
