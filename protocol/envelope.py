"""Manifests as bytes, and back.

An envelope is canonical JSON with sorted keys and no spaces: `{"v", "federation", "sender", "instance", "kind", "sequence",
"body"}`, and `"to"` if it is for one client. Everything that a signature has to bind is inside these exact bytes, and these
two functions are the only place where bytes become a manifest: trust/signing.py signs what `encode` returns, and
trust/gate.py checks the signature before `decode` reads it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protocol.errors import WireError
from protocol.messages import (
    ClassBankManifest,
    ClientAdapter,
    Manifest,
    Name,
    Need,
    Notice,
    Offer,
    Receipt,
    RoundPlan,
    Status,
    Successor,
)
from protocol.release.manifests import Release, Report, Want

VERSION = 1
MAX_MANIFEST = 12 * 1024  # signed, in base64url, 16 KB
COORDINATOR = "coordinator"
ENROL = "enrol"  # the name in the certificate with which boards ask to become devices (trust/claims.py)
RESERVED = (COORDINATOR, ENROL)

KINDS: dict[str, type[Manifest]] = {
    manifest.kind: manifest
    for manifest in (
        *(ClassBankManifest, RoundPlan, ClientAdapter, Offer, Need, Receipt, Notice, Status, Successor),
        *(Release, Want, Report),
    )
}
NOBODY = "0" * 16
Instance = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
AnyManifest = TypeVar("AnyManifest", bound=Manifest)


class _Frame(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    v: int
    federation: Name
    sender: Name
    kind: Name
    sequence: Annotated[int, Field(ge=0, le=2**53)]
    instance: Instance
    to: Name | None = None
    body: dict[str, Any]


@dataclass(frozen=True)
class Envelope:
    """A manifest with who says so, in which federation. `sequence` rises with everything that a sender says.

    `instance` is drawn by each process anew: it tells two that speak under one name apart. `to` is the one client that it is
    meant for, None if it is for all, or for the coordinator.
    """

    federation: str
    sender: str
    manifest: Manifest
    sequence: int = 0
    instance: str = NOBODY
    to: str | None = None


def encode(envelope: Envelope) -> bytes:
    """Return the exact bytes that travel; raises WireError above 12 KB."""
    frame = {
        "v": VERSION,
        "federation": envelope.federation,
        "sender": envelope.sender,
        "kind": envelope.manifest.kind,
        "sequence": envelope.sequence,
        "instance": envelope.instance,
        "body": envelope.manifest.model_dump(mode="json"),
        **({} if envelope.to is None else {"to": envelope.to}),
    }
    data = json.dumps(frame, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    if len(data) > MAX_MANIFEST:
        raise WireError(
            f"a {envelope.manifest.kind} manifest of {len(data)} bytes exceeds {MAX_MANIFEST}: use fewer or shorter names"
        )
    return data


def decode(data: bytes) -> Envelope:
    """Read an envelope; raises WireError for anything but a well-formed one of this version."""
    if len(data) > MAX_MANIFEST:
        raise WireError(f"manifest of {len(data)} bytes exceeds {MAX_MANIFEST}")
    try:
        frame = _Frame.model_validate_json(data)
    except ValidationError as error:
        raise WireError(f"not an envelope: {_first(error)}") from error
    if frame.v != VERSION:
        raise WireError(f"envelope version {frame.v}, this side speaks {VERSION}: upgrade the older side")
    schema = KINDS.get(frame.kind)
    if schema is None:
        raise WireError(f"unknown kind of manifest {frame.kind!r}")
    try:
        manifest = schema.model_validate(frame.body)
        return Envelope(frame.federation, frame.sender, manifest, frame.sequence, frame.instance, frame.to)
    except ValidationError as error:
        raise WireError(f"bad {frame.kind} manifest: {_first(error)}") from error


def expect(envelope: Envelope, schema: type[AnyManifest]) -> AnyManifest:
    """Return the manifest if it is a `schema`, else raise WireError."""
    if not isinstance(envelope.manifest, schema):
        raise WireError(f"expected a {schema.kind} manifest, got {envelope.manifest.kind}")
    return envelope.manifest


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where}: {problem['msg']}" if where else problem["msg"]
