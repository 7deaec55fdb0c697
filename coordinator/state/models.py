"""What rounds have made and is still kept: adapters and class banks, named in the journal, on the disk as blobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, delete, insert, or_, select

from coordinator.errors import FederationError
from coordinator.learning import Knowledge
from coordinator.state.journal import KEPT, Journal
from protocol.codec import decode_adapter, decode_bank
from protocol.errors import WireError
from protocol.messages import Adapter, TextBank
from protocol.storage.at_rest import StoredAdapter
from protocol.storage.blobs import BlobError, Blobs

ADAPTER, BANK, TEXT, OWN = "adapter", "bank", "text", "own"


class Models:
    """The models of one federation, by round, client and version. The store (store.py) says what is written, and when."""

    def __init__(self, folder: Path, journal: Journal, blobs: Blobs) -> None:
        self._folder = folder
        self._journal = journal
        self._blobs = blobs

    def knowledge(self) -> Knowledge | None:
        """Return what is known after the last finished round, None before the first start; raises FederationError."""
        newest: dict[tuple[str, str], str] = {}
        versions: list[int] = []
        with self._journal.reading() as connection:
            if connection is None:
                return None
            for row in connection.execute(select(KEPT).order_by(KEPT.c.number)):
                newest[row.kind, row.name] = row.sha256
                if row.kind == BANK:
                    versions.append(int(row.name))
        if not newest:
            return None
        version = str(versions[-1])
        text = newest.get((TEXT, version))
        return Knowledge(
            self._bank(newest[BANK, version]),
            self._adapter(newest[ADAPTER, ""]),
            self._adapter(text) if text is not None else None,
            {name: self._stored(digest) for (kind, name), digest in sorted(newest.items()) if kind == OWN},
        )

    def adapter(self, number: int) -> Adapter:
        """Return the global adapter after round `number`, 0 for the initial one; raises FederationError."""
        return self._adapter(self._find(ADAPTER, "", number))

    def own(self, number: int, client: str) -> Adapter:
        """Return the adapter of its own that round `number` made for a client; raises FederationError."""
        return self._adapter(self._find(OWN, client, number))

    def bank(self, version: int) -> TextBank:
        """Return a class bank by its version, which a round's record names; raises FederationError."""
        return self._bank(self._find(BANK, str(version)))

    def _find(self, kind: str, name: str, number: int | None = None) -> str:
        query = select(KEPT.c.sha256).where(KEPT.c.kind == kind, KEPT.c.name == name)
        if number is not None:
            query = query.where(KEPT.c.number == number)
        with self._journal.reading() as connection:
            found = None if connection is None else connection.scalar(query)
        if found is None:
            what = " ".join(part for part in (name, kind) if part) + (f" of round {number}" if number is not None else "")
            made = "never made (`[recipe.personal]` makes them)" if kind == OWN else "never made"
            raise FederationError(f"{self._folder} holds no {what}: {made}, or no longer kept (`keep_rounds`)")
        return str(found)

    def _adapter(self, digest: str) -> Adapter:
        return self._decoded(digest)[0]

    def _stored(self, digest: str) -> Adapter:
        """Return an adapter that stays on the disk, and that was whole a moment ago."""
        return StoredAdapter(self._blobs.path(digest), self._decoded(digest)[1])

    def _decoded(self, digest: str) -> tuple[Adapter, bytes]:
        blob = self.blob(digest)
        try:
            return decode_adapter(blob), blob
        except WireError as error:
            raise self.of_another_federation(error) from error

    def _bank(self, digest: str) -> TextBank:
        try:
            return decode_bank(self.blob(digest))
        except WireError as error:
            raise self.of_another_federation(error) from error

    def blob(self, digest: str) -> bytes:
        """Return a blob that the journal names; raises FederationError."""
        with self.intact():
            return self._blobs.get(digest)

    @contextmanager
    def intact(self) -> Iterator[None]:
        """Around whatever reads adapters that stay on the disk: raises FederationError if one was damaged meanwhile."""
        try:
            yield
        except BlobError as error:
            raise FederationError(
                f"the journal names a blob that cannot be used ({error}): restore it, or move {self._folder} aside"
            ) from error

    def of_another_federation(self, error: Exception) -> FederationError:
        """Return what to raise where a model is not of this federation's kind."""
        return FederationError(
            f"{self._folder} holds the state of another federation ({error}): set `state` to a new folder"
        )

    def write(self, connection: Connection, number: int, digests: Mapping[tuple[str, str], str]) -> None:
        """Note what round `number` made, by kind and name, instead of what it had made before; the blobs are there."""
        connection.execute(delete(KEPT).where(KEPT.c.number == number))
        rows = [{"number": number, "kind": kind, "name": name, "sha256": d} for (kind, name), d in digests.items()]
        connection.execute(insert(KEPT), rows)

    def prune(self, connection: Connection, until: int) -> None:
        """Drop what rounds 1 to `until` made, but for what is still the newest."""
        newer = KEPT.alias()
        surpassed = select(newer.c.number).where(
            newer.c.kind == KEPT.c.kind,
            newer.c.number > KEPT.c.number,
            or_(KEPT.c.kind != OWN, newer.c.name == KEPT.c.name),
            # A class bank stays until rounds which are still kept name none but newer ones.
            or_(KEPT.c.kind.not_in((BANK, TEXT)), newer.c.number <= until),
        )
        old = KEPT.c.number.between(1, until)
        connection.execute(delete(KEPT).where(old, surpassed.exists()))

    def named(self, connection: Connection) -> set[str]:
        """Return the hashes of the blobs of all models that are kept."""
        return set(connection.scalars(select(KEPT.c.sha256)))
