"""A federation at rest: class bank, one global adapter per round, and the record of every round. Every write is atomic.

state/bank.safetensors            the newest class bank
state/adapter-0000.safetensors    the adapter that round 1 starts from; adapter-0001 is what round 1 made, and so on
state/rounds.jsonl                one line per round
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
from protocol.codec import decode_adapter, encode_adapter, encode_bank, sha256
from protocol.errors import WireError
from protocol.files import write_atomic
from protocol.messages import Adapter, TextBank

RECORDS = "rounds.jsonl"
BANK = "bank.safetensors"
RUN = "run.json"


class Refusal(BaseModel):
    """A rejected update."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    client: str
    reason: str
    detail: str


class RoundRecord(BaseModel):
    """What happened in a round. Bytes are payload bytes by client; loss and accuracy are the clients' own, weighted."""

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

    def resume(self, shapes: Shapes) -> tuple[int, Adapter | None]:
        """Return the number of rounds done and the newest adapter (None at the start); raises FederationError."""
        records = self.records()
        number = records[-1].round if records else 0
        path = self.adapter_path(number)
        if not path.exists():
            if records:
                raise FederationError(
                    f"{path} is missing although {RECORDS} names it: restore it, or move {self.folder} aside"
                )
            return 0, None
        try:
            adapter = decode_adapter(path.read_bytes())
            check_shapes(adapter, shapes)
        except (WireError, ModelError) as error:
            raise FederationError(
                f"{self.folder} holds the state of another federation ({error}): set `state` to a new folder"
            ) from error
        return number, adapter

    def adapter_path(self, number: int) -> Path:
        """Return where the adapter after round `number` is kept."""
        return self.folder / f"adapter-{number:04d}.safetensors"

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

    @property
    def bank_path(self) -> Path:
        """Where the class bank is kept."""
        return self.folder / BANK

    def save_bank(self, bank: TextBank) -> None:
        """Keep the class bank."""
        write_atomic(self.bank_path, encode_bank(bank))

    def save_adapter(self, number: int, adapter: Adapter) -> tuple[str, str]:
        """Keep the adapter after round `number`; return its file name and SHA-256."""
        blob = encode_adapter(adapter)
        path = self.adapter_path(number)
        write_atomic(path, blob)
        return path.name, sha256(blob)

    def save_record(self, record: RoundRecord) -> None:
        """Keep a round's record. It is written after its adapter, so whatever it names exists."""
        lines = [item.model_dump_json() for item in [*self.records(), record]]
        write_atomic(self.folder / RECORDS, ("\n".join(lines) + "\n").encode())
