"""The manifests of a release: `release` announces one, `want` asks for chunks of its blobs, `report` says how it goes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from protocol.messages import BlobRef, Count, Finite, LargeBlobRef, Manifest, Name, Sha256, Text

Version = Annotated[int, Field(ge=1, le=2**40)]
Share = Annotated[float, Field(ge=0, le=1)]
Phase = Literal["idle", "fetching", "staged", "trying", "committed", "refused", "rolled-back"]


class Smoke(BaseModel):
    """A picture, and what the model must say to it on a device before it may serve there.

    `picture` is a PNG in base64. `embedding` is the image embedding (D,) as int8, divided by its largest absolute value and
    times 127, in base64: only its direction is compared, with a cosine of at least `min_cosine`. `label` must come first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    picture: Annotated[str, Field(min_length=1, max_length=5000)]
    label: Annotated[str, Field(min_length=1, max_length=200)]
    embedding: Annotated[str, Field(min_length=4, max_length=2800)]
    min_cosine: Annotated[float, Field(gt=0, lt=1)] = 0.98


class Health(BaseModel):
    """What a device watches after it has switched, for `window_s` seconds and `min_answers` answers at least.

    It goes back if more than `max_error_share` of answers fail, if the median latency is above `max_latency_ratio` times
    that of the model before, or if both models give the same label to less than `min_agreement` of recent pictures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    window_s: Annotated[float, Field(gt=0, le=7 * 86400)] = 300.0
    min_answers: Annotated[int, Field(ge=0, le=100_000)] = 20
    max_error_share: Share = 0.02
    max_latency_ratio: Annotated[float, Field(ge=1, le=1000)] = 2.0
    min_agreement: Share = 0.5


class Release(Manifest):
    """A model for devices: an artefact, an adapter on top of it, other classes, or all of them.

    `version` only rises; with `rollback` a device goes to this one although it has seen later ones. It is for devices whose
    profile is one of `profiles` (none: all) and which are named in `devices`, or whose place (rings.place) lies below
    `percent`; of one version both only grow. Paused: who has not switched yet waits, staged. Aborted: who has not committed
    yet goes back, who has keeps it, and nobody begins.
    """

    kind: ClassVar[str] = "release"
    version: Version
    state: Literal["open", "paused", "aborted"] = "open"
    rollback: bool = False
    artefact: LargeBlobRef
    adapter: BlobRef | None = None
    classes: BlobRef | None = None
    profiles: Annotated[tuple[Name, ...], Field(max_length=32)] = ()
    devices: Annotated[tuple[Name, ...], Field(max_length=32)] = ()
    percent: Annotated[float, Field(ge=0, le=100)] = 100.0
    smoke: Smoke
    health: Health = Health()
    note: Text = ""

    @property
    def blobs(self) -> tuple[BlobRef | LargeBlobRef, ...]:
        """All that a device needs to have for it."""
        return tuple(ref for ref in (self.artefact, self.adapter, self.classes) if ref is not None)


class Want(Manifest):
    """The chunks of a release's blob that a device lacks: a bitmap as in `Need`.

    It is a kind of its own because its sender is another process than the one that trains.
    """

    kind: ClassVar[str] = "want"
    sha256: Sha256
    missing: Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$", max_length=8192)]


class Report(Manifest):
    """How it goes with a release on one device: retained, said again from time to time.

    `running` is the version that answers now, 0 for the model that the device was set up with; `release` the announced one
    that `phase` speaks of, None if there is none for this device. `reason` names why it was refused or rolled back.
    """

    kind: ClassVar[str] = "report"
    running: Count
    release: Version | None = None
    phase: Phase = "idle"
    profile: Name | None = None
    reason: Name | None = None
    detail: Text = ""
    answers: Count = 0
    errors: Count = 0
    latency_ms: Finite | None = None
    agreement: Share | None = None

    @model_validator(mode="after")
    def _speaks_of_a_release(self) -> Report:
        if self.release is None and self.phase != "idle":
            raise ValueError(f"phase {self.phase!r} of no release")
        return self
