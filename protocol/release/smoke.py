"""The embedding in a release's smoke answer: its direction in a few hundred characters (manifests.py, Smoke)."""

from __future__ import annotations

import base64
import binascii

import numpy as np

from protocol.codec import INT8_STEPS
from protocol.errors import WireError
from protocol.messages import FloatArray


def pack_embedding(embedding: FloatArray) -> str:
    """Embedding (D,) -> text: int8, the largest absolute value 127, in base64; raises WireError if it has no direction."""
    largest = float(np.max(np.abs(embedding), initial=0.0))
    if not 0 < largest < np.inf:
        raise WireError("an embedding that is zero, or not finite, has no direction")
    return base64.b64encode(np.rint(embedding / largest * INT8_STEPS).astype(np.int8).tobytes()).decode()


def unpack_embedding(text: str) -> FloatArray:
    """Text -> embedding (D,) of unit length; raises WireError."""
    try:
        steps = np.frombuffer(base64.b64decode(text, validate=True), np.int8).astype(np.float32)
    except binascii.Error as error:
        raise WireError(f"an embedding that is not base64: {error}") from error
    length = float(np.linalg.norm(steps))
    if not length:
        raise WireError("an embedding that is zero has no direction")
    return np.asarray(steps / length, np.float32)
