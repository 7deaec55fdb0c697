"""Which model answers, which one before it, and what is being tried: one small file, replaced as a whole.

Whatever cuts the process off, the file names models whose blobs are on the disk: blobs are there before they are named, and
swept after they are named no more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_client.errors import StateError
from protocol.messages import BlobRef, Count, Name, Sha256
from protocol.release.follower_end import BLOBS, PARTIAL, partial_path
from protocol.release.manifests import Release, Version
from protocol.storage.files import write_atomic
from protocol.storage.large import file_sha256

Stage = Literal["idle", "fetching", "staged", "trying"]
Final = Literal["committed", "refused", "rolled-back"]


class Slot(BaseModel):
    """A model on this device, by the hashes of its blobs."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Version
    artefact: Sha256
    adapter: Sha256 | None = None
    classes: Sha256 | None = None

    @classmethod
    def of(cls, release: Release) -> Slot:
        """Return the slot of a release."""
        adapter, classes = release.adapter, release.classes
        return cls(
            version=release.version,
            artefact=release.artefact.sha256,
            adapter=adapter and adapter.sha256,
            classes=classes and classes.sha256,
        )

    @property
    def blobs(self) -> set[str]:
        """The hashes of all that it needs."""
        return {digest for digest in (self.artefact, self.adapter, self.classes) if digest is not None}


class Ended(BaseModel):
    """How the last release ended here that did not stay, or did: the phase that is reported, with the reason."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    version: Version
    rollback: bool
    phase: Final
    reason: Name | None = None
    detail: Annotated[str, Field(max_length=500)] = ""


class State(BaseModel):
    """What is on the disk. `current` is None while the model that the device was set up with answers.

    `release` is under way, in `stage`; while `trying` it is the current one, and `previous` is where it goes back to.
    `boots` counts the process's starts since then, and those that were ended in good order are taken back; of one that is
    `staged` the starts since it was last loaded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    current: Slot | None = None
    previous: Slot | None = None
    stage: Stage = "idle"
    release: Release | None = None
    boots: Count = 0
    ended: Ended | None = None

    @property
    def running(self) -> int:
        """The version that answers, 0 for the model that the device was set up with."""
        return 0 if self.current is None else self.current.version

    @property
    def blobs(self) -> set[str]:
        """The hashes of all that must stay."""
        slots = (self.current, self.previous, None if self.release is None else Slot.of(self.release))
        return set().union(*(slot.blobs for slot in slots if slot is not None))


class Slots:
    """The file, and the blobs beside it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "models.json"
        self._blobs = folder / BLOBS
        self._partial = folder / PARTIAL

    def load(self) -> State:
        """Return what is on the disk; raises StateError for what cannot be read."""
        try:
            return State.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return State()
        except (OSError, ValidationError) as error:
            raise StateError(
                f"{self._path} cannot be read: {error}. Remove it, and the model that is named on the command line answers "
                f"until the next release"
            ) from error

    def save(self, state: State) -> None:
        """Replace it; raises OSError, and then the old one stays."""
        write_atomic(self._path, state.model_dump_json().encode())

    def path(self, digest: str) -> Path:
        """Return where a blob lies."""
        return self._blobs / digest

    def has(self, digest: str) -> bool:
        """Whether a blob is here: it got its name when its hash had been seen to be right."""
        return self.path(digest).is_file()

    def missing_bytes(self, refs: Iterable[BlobRef]) -> int:
        """Return the bytes that the disk has to take for these blobs: what has come of them is there already."""
        return sum(max(0, ref.size - self._come(ref.sha256)) for ref in refs)

    def _come(self, digest: str) -> int:
        try:
            return partial_path(self._path.parent, digest).stat().st_blocks * 512  # it has holes
        except OSError:
            return 0

    def discard_damaged(self, slot: Slot) -> None:
        """Remove blobs of a slot that are not what their name says: then they can be fetched again."""
        for path in map(self.path, slot.blobs):
            with contextlib.suppress(OSError):
                if file_sha256(path) != path.name:
                    path.unlink()

    def sweep(self, state: State) -> None:
        """Remove what the state does not name."""
        kept = state.blobs
        for path in [*self._blobs.glob("*"), *self._partial.glob("*")]:
            if path.name.split(".")[0] not in kept:  # of a copy that was cut off the name begins with a dot
                path.unlink(missing_ok=True)
