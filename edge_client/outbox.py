"""The outbox: an update on disk from before its first offer, so that a restart offers it again and trains nothing twice."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ConfigDict, ValidationError

from edge_client.errors import StateError
from edge_client.work import Work
from protocol.messages import Offer, Sha256
from protocol.storage.blobs import BlobError, Blobs
from protocol.storage.files import lock_folder, write_atomic
from protocol.transfer.parcel import Parcel

log = logging.getLogger(__name__)


class _Note(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    work: Sha256
    offer: Offer


class Outbox:
    """The last update of a client, in a folder that one client at a time may use.

    outbox/offer.json            the offer, and what it was trained from
    outbox/SHA256.safetensors    the update
    """

    def __init__(self, folder: Path) -> None:
        """Take the state folder `folder`; raises StateError if another client is at work there or it cannot be written."""
        try:
            self._lock: IO[bytes] = lock_folder(folder)
        except BlockingIOError as error:
            raise StateError(f"another client is at work in {folder}: stop it, or give this one its own `state`") from error
        except OSError as error:
            raise StateError(f"{folder} cannot be used: {error}. Set `state` to a folder that can be written") from error
        self._note = folder / "outbox" / "offer.json"
        self._blobs = Blobs(folder / "outbox")

    def close(self) -> None:
        """Let another client in."""
        self._lock.close()

    def keep(self, work: Work) -> None:
        """Keep an update instead of the last one: the blob, then the note that names it. Raises OSError, and loses none."""
        digest = self._blobs.put(work.parcel.blob)
        note = _Note(work=work.key, offer=work.parcel.offer)
        write_atomic(self._note, note.model_dump_json().encode())
        self._blobs.sweep({digest})

    def load(self) -> Work | None:
        """Return what was kept, None if there is nothing that can be read: then the round is trained again."""
        try:
            note = _Note.model_validate_json(self._note.read_bytes())
            blob = self._blobs.get(note.offer.blob.sha256)
        except FileNotFoundError:
            return None
        except (OSError, ValidationError, BlobError) as error:
            log.warning("the outbox cannot be read, the round is trained again: %s", error)
            return None
        return Work(note.work, Parcel(note.offer, blob))
