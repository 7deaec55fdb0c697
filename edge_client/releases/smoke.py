"""Whether a model says here what it said where the release was made."""

from __future__ import annotations

import base64
import binascii

import numpy as np

from edge_client.errors import InferenceError
from edge_client.inference.model import Model
from edge_client.inference.pictures import decode_picture
from protocol.errors import WireError
from protocol.release.manifests import Smoke
from protocol.release.smoke import unpack_embedding

MAX_PIXELS = 1_000_000


def smoke_problem(model: Model, smoke: Smoke) -> str:
    """Return how a model's answer to the smoke picture differs from the expected one; empty if it does not."""
    try:
        image = decode_picture(base64.b64decode(smoke.picture, validate=True), "the smoke picture", MAX_PIXELS)
        wanted = unpack_embedding(smoke.embedding)
        scores = model.run(image[None])
    except (InferenceError, WireError, binascii.Error) as error:
        return str(error)
    said = scores.embeddings[0]
    if said.shape != wanted.shape:
        return f"its embeddings have {said.size} values, {wanted.size} were expected"
    if not (np.isfinite(said).all() and np.isfinite(scores.probabilities).all()):
        return "its answer is not finite"
    label = model.labels[int(scores.probabilities[0].argmax())]
    if label != smoke.label:
        return f"it says {label!r}, {smoke.label!r} was expected"
    cosine = float(said @ wanted) / float(np.linalg.norm(said))
    return (
        "" if cosine >= smoke.min_cosine else f"cosine {cosine:.4f} to the expected embedding, {smoke.min_cosine} is asked"
    )
