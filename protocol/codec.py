"""The records of messages.py as blobs, and back: safetensors, never pickle. The format at rest is the format that travels.

Encoding is canonical (sorted names, no time stamps): equal records give equal bytes, so a blob's hash names its content.
Floats of adapters and features travel as float16; what is decoded is float32.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from protocol.errors import WireError
from protocol.messages import CHUNK_SIZE, Adapter, BlobRef, FloatArray, TextBank, Update

Array = NDArray[Any]
# Of a safetensors header: what costs too long to read is refused unread. The largest CLIPs' factors need 60 KB, all adapted;
# a class bank has its class names there.
MAX_HEADER, MAX_BANK_HEADER = 128 * 1024, 512 * 1024
INT8_STEPS = 127
HEADER_ENTRY, HEADER_REST = 160, 4096  # of a safetensors header: a tensor's entry besides its name, and all else
UPDATE_FACTORS = "adapter."  # what the names of an update's factors begin with


def sha256(data: bytes) -> str:
    """Return the hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def reference(blob: bytes, chunk_size: int = CHUNK_SIZE) -> BlobRef:
    """Return the reference by which a manifest names `blob`; raises WireError if it is too large for such chunks."""
    try:
        return BlobRef(sha256=sha256(blob), size=len(blob), chunk_size=chunk_size)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise WireError(f"a blob of {len(blob)} bytes cannot travel in chunks of {chunk_size}: {problem}") from error


def encode_adapter(adapter: Adapter) -> bytes:
    """Adapter -> blob, factors as float16."""
    return _encode(_pack_adapter(adapter), {"type": "adapter"})


def decode_adapter(blob: bytes) -> Adapter:
    """Blob -> adapter in float32; raises WireError."""
    arrays, _ = _decode(blob, "adapter")
    return _unpack_adapter(arrays)


def encode_bank(bank: TextBank) -> bytes:
    """Class bank -> blob: embeddings stay float32, names and templates travel in the metadata."""
    facts = {
        "version": bank.version,
        "classes": list(bank.classes),
        "templates": list(bank.templates),
        "logit_scale": bank.logit_scale,
        "model": bank.model,
        "model_digest": bank.model_digest,
    }
    return _encode({"embeddings": np.asarray(bank.embeddings, np.float32)}, {"type": "bank", "bank": _json(facts)})


class _BankFacts(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    version: int
    classes: list[str]
    templates: list[str]
    logit_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    model: str
    model_digest: str


def decode_bank(blob: bytes) -> TextBank:
    """Blob -> class bank; raises WireError if names and embeddings disagree or an embedding is not of unit length."""
    arrays, metadata = _decode(blob, "bank")
    try:
        facts = _BankFacts.model_validate_json(metadata.get("bank", ""))
    except ValidationError as error:
        raise WireError(
            f"class bank with unreadable metadata: {error.errors()[0]['loc']} {error.errors()[0]['msg']}"
        ) from error
    embeddings = _take(arrays, "embeddings", np.float32, 2)
    if len(facts.classes) != len(embeddings) or not facts.classes:
        raise WireError(f"class bank names {len(facts.classes)} classes but holds {len(embeddings)} embeddings")
    if not np.allclose(np.linalg.norm(embeddings.astype(np.float64), axis=1), 1.0, atol=1e-3):
        raise WireError("class bank holds embeddings that are not of unit length")
    return TextBank(
        facts.version,
        tuple(facts.classes),
        tuple(facts.templates),
        embeddings,
        facts.logit_scale,
        facts.model,
        facts.model_digest,
    )


def encode_update(update: Update) -> bytes:
    """Update -> blob: factors and prototypes as float16, features as int8 with one scale a row (half a KB at 512-d)."""
    if not np.all(np.isfinite(update.features)):
        raise WireError("features hold values that are not finite: training diverged, lower the learning rate")
    scale = np.max(np.abs(update.features), axis=1, initial=0.0, keepdims=True) / INT8_STEPS
    scale = np.maximum(scale, np.finfo(np.float32).tiny).astype(np.float32)
    arrays = {UPDATE_FACTORS + name: array for name, array in _pack_adapter(update.adapter).items()}
    arrays |= {
        "prototypes": _half(update.prototypes, "prototypes"),
        "prototype_classes": update.prototype_classes.astype(np.int32),
        "prototype_counts": update.prototype_counts.astype(np.int32),
        "prototype_correct": update.prototype_correct.astype(np.int32),
        "features": np.rint(update.features / scale).astype(np.int8),
        "feature_scales": scale[:, 0],
        "labels": update.labels.astype(np.int32),
    }
    return _encode(arrays, {"type": "update"})


def largest_update(shapes: Mapping[str, tuple[int, ...]], width: int, classes: int, features_per_class: int) -> int:
    """Return an upper bound in bytes of the blob of an update with factors of these shapes; `width` is that of features."""
    factors = sum(2 * math.prod(shape) for shape in shapes.values())
    prototypes = classes * (2 * width + 3 * 4)
    features = classes * features_per_class * (width + 2 * 4)
    names = sum(len(json.dumps(name)) + HEADER_ENTRY for name in shapes)
    return factors + prototypes + features + names + HEADER_REST


def decode_update(blob: bytes) -> Update:
    """Blob -> update; raises WireError if the arrays do not fit each other. Values are checked by the coordinator."""
    arrays, _ = _decode(blob, "update")
    adapter = {name.removeprefix(UPDATE_FACTORS): a for name, a in arrays.items() if name.startswith(UPDATE_FACTORS)}
    prototypes = _take(arrays, "prototypes", np.float16, 2)
    classes = _take(arrays, "prototype_classes", np.int32, 1)
    counts = _take(arrays, "prototype_counts", np.int32, 1)
    correct = _take(arrays, "prototype_correct", np.int32, 1)
    features = _take(arrays, "features", np.int8, 2)
    scales = _take(arrays, "feature_scales", np.float32, 1)
    labels = _take(arrays, "labels", np.int32, 1)
    told = len(correct) in (0, len(prototypes))
    if not (told and len(prototypes) == len(classes) == len(counts)) or not len(features) == len(scales) == len(labels):
        raise WireError("update whose prototypes, counts, features and labels differ in number")
    if not np.all((scales > 0) & (scales <= 1.0)):
        raise WireError("update whose feature scales are not above 0 and at most 1")
    return Update(
        _unpack_adapter(adapter),
        prototypes.astype(np.float32),
        classes,
        counts,
        correct,
        features.astype(np.float32) * scales[:, None],
        labels,
    )


def _pack_adapter(adapter: Adapter) -> dict[str, Array]:
    return {name: _half(array, name) for name, array in adapter.items()}


def _unpack_adapter(arrays: Mapping[str, Array]) -> Adapter:
    for name, array in arrays.items():
        if array.ndim != 2 or array.dtype != np.float16:
            raise WireError(f"adapter factor {name} is {array.dtype} of {array.ndim} dimensions, expected float16 of 2")
    return {name: arrays[name].astype(np.float32) for name in sorted(arrays)}


def _half(array: FloatArray, name: str) -> Array:
    """Round to float16; values that float16 cannot hold are a training failure and must not travel."""
    limit = float(np.finfo(np.float16).max)
    if not np.all(np.isfinite(array)) or np.any(np.abs(array) > limit):
        raise WireError(f"{name} holds values that are not finite or exceed {limit:g}: training diverged, lower the rate")
    return np.asarray(array).astype(np.float16)


def _take(arrays: Mapping[str, Array], name: str, dtype: type[np.generic], ndim: int) -> Array:
    array = arrays.get(name)
    if array is None or array.ndim != ndim or array.dtype != dtype:
        found = "nothing" if array is None else f"{array.dtype} of {array.ndim} dimensions"
        raise WireError(f"{name} should be {np.dtype(dtype)} of {ndim} dimensions, found {found}")
    return array


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _encode(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    # safetensors orders tensors by dtype and name, and writes the metadata map in the order given: sorted is canonical.
    ordered = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
    if len(metadata) > 1:
        # its map of several entries has no fixed order: one JSON entry has.
        metadata = {"clipcast": _json(dict(metadata))}
    return bytes(save(ordered, dict(metadata)))


def _decode(blob: bytes, kind: str) -> tuple[dict[str, Array], dict[str, str]]:
    names, metadata = _header(blob, MAX_BANK_HEADER if kind == "bank" else MAX_HEADER)
    if metadata.get("type") != kind:
        raise WireError(f"expected a blob of type {kind!r}, got {metadata.get('type')!r}")
    if kind == "bank" and names != {"embeddings"}:
        raise WireError(f"a class bank with {len(names)} tensors, it has its embeddings alone")
    try:
        return load(blob), metadata
    except (SafetensorError, KeyError, ValueError) as error:
        raise WireError(f"unreadable {kind} blob: {error}") from error


def _header(blob: bytes, longest: int) -> tuple[set[str], dict[str, str]]:
    """Read the tensors' names, and the metadata that safetensors' own loader drops: 8 bytes of length, then JSON."""
    if len(blob) < 8:
        raise WireError(f"blob of {len(blob)} bytes is too short to be safetensors")
    (length,) = struct.unpack("<Q", blob[:8])
    if length > min(longest, len(blob) - 8):
        raise WireError(f"safetensors header of {length} bytes: the blob is truncated or not ours")
    try:
        header = _object(blob[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        metadata = _object(metadata["clipcast"]) if "clipcast" in metadata else metadata
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise WireError("safetensors header is not JSON") from error
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WireError("safetensors metadata is not a map of strings")
    return set(header), metadata


def _object(text: str | bytes) -> Any:
    """Read JSON in which every key stands once: of two, the next reader might take the other."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found
