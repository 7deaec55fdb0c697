"""The ledger: every disclosure of a device under differential privacy, on the disk before its noise is drawn.

ledger.json    the disclosures, and a checksum over them
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edge_client.errors import LedgerError
from protocol.messages import Sha256
from protocol.storage.files import write_atomic

Part = Literal["adapter", "prototypes"]


class Disclosure(BaseModel):
    """One noisy result that may have left the device.

    `work` is the training that it is of (work.py). `mark` is a keyed hash of the result before its noise: the same training
    repeated to the same bits is the same disclosure, to other bits another one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    work: Sha256
    part: Part
    mark: Sha256
    noise_multiplier: Annotated[float, Field(ge=1e-3, le=1e6)]


class _Book(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    disclosures: tuple[Disclosure, ...]
    checksum: Sha256

    @model_validator(mode="after")
    def _is_whole(self) -> _Book:
        if self.checksum != _checksum(self.disclosures):
            raise ValueError("its checksum is that of other disclosures")
        return self


class Ledger:
    """The disclosures of a device so far, oldest first; in memory alone without a path."""

    def __init__(self, path: Path | None = None) -> None:
        """Read the ledger, empty if there is no file. Raises LedgerError if it cannot be read: nothing may be forgotten."""
        self.path = path
        self.disclosures: tuple[Disclosure, ...] = () if path is None else _read(path)

    def add(self, disclosure: Disclosure) -> None:
        """Add one, unless it is there; it is on the disk when this returns. Raises OSError, and then it is not there."""
        if disclosure not in self.disclosures:
            self.keep((*self.disclosures, disclosure))

    def keep(self, disclosures: Sequence[Disclosure]) -> None:
        """Replace what the ledger holds, on the disk first; raises OSError."""
        book = _Book(disclosures=tuple(disclosures), checksum=_checksum(disclosures))
        if self.path is not None:
            write_atomic(self.path, book.model_dump_json(indent=1).encode())
        self.disclosures = book.disclosures


def _read(path: Path) -> tuple[Disclosure, ...]:
    try:
        return _Book.model_validate_json(path.read_bytes()).disclosures
    except FileNotFoundError:
        return ()
    except (OSError, ValidationError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise LedgerError(
            f"{path} cannot be read: {problem}. It says what this device has disclosed of its pictures; without it nothing "
            f"more may leave. Restore its last state; an older one would count too little (docs/operations.md)"
        ) from error


def _checksum(disclosures: Sequence[Disclosure]) -> str:
    text = json.dumps([disclosure.model_dump() for disclosure in disclosures], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
