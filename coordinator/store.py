"""A federation at rest: what it knew after each round, and the record of every round. Every write is atomic.

state/adapter-0000.safetensors    the global adapter that round 1 starts from; adapter-0001 is what round 1 made, and so on
state/bank-0001.safetensors       version 1 of the class bank; a round that trains the text side makes the next version
state/text-0002.safetensors       the text adapter behind version 2
state/own-0001/<client>.safetensors   the clients' own adapters that round 1 made
state/rounds.jsonl                one line per round; it is written last, so whatever it names exists
state/run.json                    this run: its name, what it trains, how often the coordinator was started
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from clip_lora.errors import ModelError
from clip_lora.lora import Shapes, check_shapes
from coordinator.errors import FederationError
from coordinator.learning import NO_LESSON, Knowledge, Lesson
from coordinator.personal import Attention
from coordinator.text_side import TextLoss
from protocol.codec import decode_adapter, decode_bank, encode_adapter, encode_bank, sha256
from protocol.errors import WireError
from protocol.files import write_atomic
from protocol.messages import Adapter, TextBank

RECORDS = "rounds.jsonl"
FIRST_BANK = 1
RUN = "run.json"


class Refusal(BaseModel):
    """A rejected update."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    client: str
    reason: str
    detail: str


class TextRecord(BaseModel):
    """The text side's training: weighted CE before and after, number of samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    loss_before: float
    loss_after: float
    samples: int

    @classmethod
    def of(cls, loss: TextLoss) -> TextRecord:
        """Return how a training went."""
        return cls(loss_before=loss.before, loss_after=loss.after, samples=loss.samples)


class AttentionRecord(BaseModel):
    """Who listened to whom: weights by client (rows) and source, and each row's entropy in nats."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    clients: list[str]
    sources: list[str]
    weights: list[list[float]]
    entropy: list[float]

    @classmethod
    def of(cls, attention: Attention) -> AttentionRecord:
        """Return an attention as lists."""
        return cls(
            clients=list(attention.clients),
            sources=list(attention.sources),
            weights=attention.weights.tolist(),
            entropy=attention.entropy.tolist(),
        )


class RoundRecord(BaseModel):
    """What happened in a round. Bytes are payload bytes by client; loss and accuracy are the clients' own, weighted.

    `class_accuracy` is the share of the clients' own pictures of a class that they predicted correctly after training;
    `own` names the clients whose own adapters the round made; `bank_version` is the class bank that goes with `adapter`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    round: int
    outcome: Literal["aggregated", "quorum-missed"]
    accepted: list[str]
    rejected: list[Refusal]
    silent: list[str]
    samples: int
    loss: float | None
    train_accuracy: float | None
    seconds: float
    bytes_up: dict[str, int]
    bytes_down: dict[str, int]
    adapter: str
    adapter_sha256: str
    bank_version: int
    text: TextRecord | None = None
    own: list[str] = []
    attention: AttentionRecord | None = None
    class_accuracy: dict[str, float] = {}


class Identity(BaseModel):
    """What must not change between a federation's rounds; an adapter means something only together with it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    federation: str
    model_digest: str
    classes: tuple[str, ...]
    rank: int
    alpha: float
    projections: tuple[str, ...]
    first_block: int


class Run(BaseModel):
    """One run of a federation, over all starts of its coordinator."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    starts: int
    identity: Identity


class Store:
    """The state folder of one federation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def records(self) -> list[RoundRecord]:
        """Return the rounds so far; raises FederationError if they cannot be read."""
        path = self.folder / RECORDS
        if not path.exists():
            return []
        try:
            return [RoundRecord.model_validate_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        except (ValidationError, UnicodeDecodeError) as error:
            raise FederationError(
                f"{path} is damaged or of another version: move {self.folder} aside to start anew"
            ) from error

    def resume(self, shapes: Shapes, text_shapes: Shapes | None) -> tuple[int, Knowledge | None]:
        """Return the number of rounds done and what is known (None at the start); raises FederationError."""
        records = self.records()
        if not records and not self.adapter_path(0).exists():
            return 0, None
        known = self.knowledge()
        try:
            check_shapes(known.adapter, shapes)
            if known.text is not None and text_shapes is not None:
                check_shapes(known.text, text_shapes)
        except ModelError as error:
            raise self._foreign(error) from error
        return records[-1].round if records else 0, known

    def knowledge(self) -> Knowledge:
        """Return what is known after the last finished round; raises FederationError."""
        records = self.records()
        version = records[-1].bank_version if records else FIRST_BANK
        own = {client: record.round for record in records for client in record.own}
        return Knowledge(
            self.bank(version),
            self._adapter(self.adapter_path(records[-1].round if records else 0)),
            self._adapter(self.text_path(version)) if self.text_path(version).exists() else None,
            {client: self._adapter(self.own_path(number, client)) for client, number in own.items()},
        )

    def _adapter(self, path: Path) -> Adapter:
        try:
            return decode_adapter(self._read(path))
        except WireError as error:
            raise self._foreign(error) from error

    def _foreign(self, error: Exception) -> FederationError:
        return FederationError(f"{self.folder} holds the state of another federation ({error}): set `state` to a new folder")

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise FederationError(
                f"{path} is missing although {RECORDS} names it: restore it, or move {self.folder} aside"
            ) from error

    def adapter_path(self, number: int) -> Path:
        """Return where the adapter after round `number` is kept."""
        return self.folder / f"adapter-{number:04d}.safetensors"

    def bank_path(self, version: int) -> Path:
        """Return where a version of the class bank is kept."""
        return self.folder / f"bank-{version:04d}.safetensors"

    def text_path(self, version: int) -> Path:
        """Return where the text adapter behind a version of the class bank is kept."""
        return self.folder / f"text-{version:04d}.safetensors"

    def own_path(self, number: int, client: str) -> Path:
        """Return where a client's own adapter is kept that round `number` made."""
        return self.folder / f"own-{number:04d}" / f"{client}.safetensors"

    def begin(self, identity: Identity) -> tuple[str, int]:
        """Return the name of this run of the federation, made once, and how often the coordinator was started in it.

        Raises FederationError if the folder holds the state of a federation with another identity.
        """
        run = self.run() or Run(name=secrets.token_hex(8), starts=0, identity=identity)
        changed = [key for key in Identity.model_fields if getattr(run.identity, key) != getattr(identity, key)]
        if changed:
            raise FederationError(
                f"{self.folder} holds the state of a federation with another {', '.join(changed)}: set `state` to a new "
                f"folder, or change the settings back"
            )
        run = run.model_copy(update={"starts": run.starts + 1})
        write_atomic(self.folder / RUN, run.model_dump_json().encode())
        return run.name, run.starts

    def run(self) -> Run | None:
        """Return what is known of this run, None before its first start; raises FederationError if it is damaged."""
        path = self.folder / RUN
        try:
            return Run.model_validate_json(path.read_bytes()) if path.exists() else None
        except ValidationError as error:
            raise FederationError(
                f"{path} is damaged or of another version: move {self.folder} aside to start anew"
            ) from error

    def bank(self, version: int) -> TextBank:
        """Return a class bank by its version, which a round's record names; raises FederationError."""
        path = self.bank_path(version)
        try:
            return decode_bank(self._read(path))
        except WireError as error:
            raise FederationError(f"{path} cannot be read ({error}): restore it") from error

    def save(self, number: int, known: Knowledge, lesson: Lesson = NO_LESSON) -> tuple[str, str]:
        """Keep what round `number` changed; return the global adapter's file name and SHA-256."""
        version = known.bank.version
        if number == 0 or lesson.text is not None:
            if known.text is not None:
                write_atomic(self.text_path(version), encode_adapter(known.text))
            write_atomic(self.bank_path(version), encode_bank(known.bank))
        for client in lesson.renewed:
            write_atomic(self.own_path(number, client), encode_adapter(known.own[client]))
        blob = encode_adapter(known.adapter)
        path = self.adapter_path(number)
        write_atomic(path, blob)
        return path.name, sha256(blob)

    def save_record(self, record: RoundRecord) -> None:
        """Keep a round's record. It is written after its adapter, so whatever it names exists."""
        lines = [item.model_dump_json() for item in [*self.records(), record]]
        write_atomic(self.folder / RECORDS, ("\n".join(lines) + "\n").encode())
