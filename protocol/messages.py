"""The nouns that travel: frozen manifests (pydantic, JSON) and the records that their blobs hold (numpy).

A manifest is at most 16 KB. Anything larger is a blob, which a manifest names by SHA-256 (`BlobRef`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]
Adapter = Mapping[str, FloatArray]
"""LoRA factors by layer: `<module path>.lora_A` (rank, in) and `<module path>.lora_B` (out, rank). Perhaps not in memory."""

CHUNK_SIZE = 64 * 1024
MIN_CHUNK_SIZE = 1024
MAX_BLOB_SIZE = 256 * 1024 * 1024
MAX_LARGE_BLOB_SIZE = 2 * 1024 * 1024 * 1024
MAX_CHUNKS = 32_768  # a bitmap of so many bits, in hex, fits a manifest

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}$")]
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]
Text = Annotated[str, Field(max_length=500)]
Count = Annotated[int, Field(ge=0, le=2**40)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Projection = Literal["q_proj", "k_proj", "v_proj", "out_proj"]


class Manifest(BaseModel):
    """What every manifest has: it is frozen, knows its kind, and refuses fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: ClassVar[str]


class BlobRef(BaseModel):
    """A blob by content: its hash, its size in bytes, and how it is cut."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sha256: Sha256
    size: Annotated[int, Field(ge=1, le=MAX_BLOB_SIZE)]
    chunk_size: Annotated[int, Field(ge=MIN_CHUNK_SIZE, le=CHUNK_SIZE)] = CHUNK_SIZE

    @model_validator(mode="after")
    def _bitmap_fits(self) -> BlobRef:
        if self.chunks > MAX_CHUNKS:
            raise ValueError(
                f"{self.size} bytes in chunks of {self.chunk_size} make {self.chunks}, at most {MAX_CHUNKS} travel"
            )
        return self

    @property
    def chunks(self) -> int:
        """Number of chunks, the last one possibly shorter."""
        return -(-self.size // self.chunk_size)

    def length(self, index: int) -> int:
        """Return the exact number of bytes of chunk `index`."""
        return min(self.chunk_size, self.size - index * self.chunk_size)


class LargeBlobRef(BlobRef):
    """A blob that is too large for a device's memory, as a model is: it is received into a file."""

    size: Annotated[int, Field(ge=1, le=MAX_LARGE_BLOB_SIZE)]


class Privacy(BaseModel):
    """What one picture may show in all that a device sends, at most (docs/method.md, "Differential privacy").

    `clip` bounds the L2 norm of the adapter's change in a round. Noise is Gaussian, its standard deviation
    `noise_multiplier` times the sensitivity to one picture. No device goes beyond `epsilon` at `delta`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    noise_multiplier: Annotated[float, Field(ge=1e-3, le=1e6)]  # less is no noise to speak of, more no signal
    delta: Annotated[float, Field(gt=0, le=1e-3)]  # one in a thousand pictures told in full would be within a larger one
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Recipe(BaseModel):
    """How a client trains: the LoRA shape, the optimiser, and what it may upload (docs/method.md, steps 2 and 3)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    rank: Annotated[int, Field(ge=1, le=256)] = 4
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.0
    projections: tuple[Projection, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    first_block: Annotated[int, Field(ge=0)] = 0
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3e-3
    local_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 15
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    mu: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    features_per_class: Annotated[int, Field(ge=0, le=100_000)] = 16
    features_of: Literal["correct", "all"] = "all"
    features_from: Literal["start", "trained"] = "start"
    late_rounds: Annotated[int, Field(ge=0, le=100)] = 0
    min_prototype_count: Annotated[int, Field(ge=1, le=1_000_000)] = 5
    privacy: Privacy | None = None
    freeze_a: bool = False

    def at_rank(self, rank: int) -> Recipe:
        """Return the recipe for a device of another rank: alpha / rank stays, so that B A means the same everywhere."""
        return self if rank == self.rank else self.model_copy(update={"rank": rank, "alpha": self.alpha * rank / self.rank})

    @model_validator(mode="after")
    def _projections_are_a_set(self) -> Recipe:
        if not self.projections or len(set(self.projections)) != len(self.projections):
            raise ValueError("projections must name at least one projection, each once")
        return self

    @model_validator(mode="after")
    def _privacy_covers_all_that_leaves(self) -> Recipe:
        if self.privacy is not None and self.features_per_class:
            raise ValueError(
                "privacy needs features_per_class = 0: a feature is one picture's embedding, which no noise here covers; "
                "the text side then learns from prototypes"
            )
        return self


class ClassBankManifest(Manifest):
    """Points to the newest class bank."""

    kind: ClassVar[str] = "classes"
    version: Count
    blob: BlobRef


class RoundPlan(Manifest):
    """What a client needs to take part in a round.

    `run` names one run of the federation, from its first round to its last, restarts of the coordinator included; within
    it rounds only rise. `start` counts the coordinator's starts: what an earlier one accepted must
    be offered again. `classes` is the hash of the bank to train against. `adapter` is the global adapter; if
    `individual`, each participant starts from an adapter of its own instead, which a `ClientAdapter` names. With `seal_to`
    updates are sealed to that public key (trust/sealing.py).
    """

    kind: ClassVar[str] = "round"
    run: Name
    start: Count
    round: Count
    state: Literal["open", "finished"]
    classes: Sha256
    adapter: BlobRef
    individual: bool = False
    participants: tuple[Name, ...]
    recipe: Recipe
    seed: Count
    deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    seal_to: Key | None = None

    def takes_late(self, run: str | None, number: int) -> bool:
        """Whether an update for round `number` of a run may still come while this plan is the newest."""
        return self.state == "open" and run == self.run and 0 < self.round - number <= self.recipe.late_rounds


class ClientAdapter(Manifest):
    """Points to the adapter from which one client starts a round: personalised, or of this client's own rank."""

    kind: ClassVar[str] = "adapter"
    run: Name
    round: Count
    adapter: BlobRef


class Offer(Manifest):
    """A client has an update: what it is, and how the training went. The arrays are in the blob.

    Under the plan's `privacy` nothing is told of loss, accuracy and time; `samples` is what the noisy counts sum to, and
    `epsilon` is what this device has spent so far, with this update, at the plan's delta.
    """

    kind: ClassVar[str] = "offer"
    run: Name | None = None
    round: Count
    base: Sha256
    blob: BlobRef
    samples: Annotated[int, Field(ge=1, le=2**40)]
    loss: Finite | None = None
    accuracy: Finite | None = None
    train_seconds: Finite | None = None
    epsilon: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    bytes_received: Count


class Need(Manifest):
    """The chunks of a blob that the receiver lacks: a bitmap in hex, chunk 0 the highest bit of the first byte."""

    kind: ClassVar[str] = "need"
    sha256: Sha256
    missing: Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$", max_length=8192)]


class Receipt(Manifest):
    """The coordinator's verdict on an update; the only meaning of "accepted"."""

    kind: ClassVar[str] = "receipt"
    round: Count
    sha256: Sha256
    accepted: bool
    reason: Name
    detail: Text = ""


class Notice(Manifest):
    """What the coordinator tells one client besides verdicts; `reason` names it (docs/operations.md)."""

    kind: ClassVar[str] = "notice"
    reason: Name
    detail: Text = ""


class Successor(Manifest):
    """Names the coordinator's next key, in base64url; signed by the one before (trust/succession.py). Says nothing else."""

    kind: ClassVar[str] = "key"
    next: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]


class Board(BaseModel):
    """How a client's board was when it spoke; None is what the board does not say.

    The hottest zone in degrees Celsius, W, the GPU's load from 0 to 1, MiB, and throttlings for over-current since it
    started.
    `fallback` is what the client does other than its settings and profile ask for, and why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    platform: Name | None = None
    l4t: Name | None = None
    power_mode: Name | None = None
    temperature_c: Finite | None = None
    power_w: Finite | None = None
    gpu_load: Finite | None = None
    memory_available_mib: Count | None = None
    over_current_events: Count | None = None
    fallback: Text = ""


class Status(Manifest):
    """A client's presence: retained, with an offline twin as the last will. A hint, never an input to correctness."""

    kind: ClassVar[str] = "status"
    state: Literal["online", "offline"]
    phase: Literal["waiting", "training", "uploading", "failed", "stopped"] = "waiting"
    round: Count | None = None
    profile: Name | None = None
    bits: Literal[4, 8, 32] | None = None
    device: Name | None = None
    max_rank: Annotated[int, Field(ge=1, le=256)] | None = None
    detail: Text = ""
    board: Board | None = None


@dataclass(frozen=True)
class TextBank:
    """Class names with their unit-length text embeddings (C, D), and the scale that turns cosines into logits."""

    version: int
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    embeddings: FloatArray
    logit_scale: float
    model: str
    model_digest: str


@dataclass(frozen=True)
class Update:
    """What a client learned: adapter, unit class prototypes (P, D) with counts, unit features (F, D) with labels.

    `prototype_classes` (P,) and `labels` (F,) are indices into the class bank; of the `prototype_counts` (P,) samples of
    a class, `prototype_correct` (P,), or (0,) if the client does not tell, were predicted correctly. P is 0 if no class has
    `min_prototype_count` samples.
    """

    adapter: Adapter
    prototypes: FloatArray
    prototype_classes: IntArray
    prototype_counts: IntArray
    prototype_correct: IntArray
    features: FloatArray
    labels: IntArray


@dataclass(frozen=True)
class Verdict:
    """The answer to an update: accepted, or rejected with a reason (docs/operations.md lists them) and a sentence."""

    accepted: bool
    reason: str = "accepted"
    detail: str = ""


@dataclass(frozen=True)
class TrainingResult:
    """An update with what its offer tells about it; None is not told."""

    round: int
    base: str
    update: Update
    samples: int
    loss: float | None
    accuracy: float | None
    train_seconds: float | None
    epsilon: float | None = None
