"""What an artefact answers to one picture, by onnxruntime: what every device has to answer before it serves the artefact."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from edge_client.errors import InferenceError
from edge_client.inference.model import Model
from edge_client.inference.pictures import Pixels, decode_picture, read_picture
from protocol.messages import FloatArray, TextBank
from protocol.release.manifests import Smoke
from protocol.release.smoke import pack_embedding

MOST_PICTURE = 5000  # characters of base64
SIDES = (224, 192, 160, 128, 96, 80, 64, 48, 32)
MARGIN = 0.02


@dataclass(frozen=True)
class Answered:
    """What an artefact says to a picture: labels with their probabilities (C,), and the embedding (D,)."""

    labels: tuple[str, ...]
    probabilities: FloatArray
    embedding: FloatArray


def smoke_of(
    artefact: Path, adapter: Path | None, bank: TextBank | None, picture: Path | None, classes: Collection[str]
) -> Smoke:
    """Run an artefact on a small picture; return what it has to say everywhere.

    `classes` are the federation's, which the artefact has to know unless a `bank` brings others. Raises InferenceError if
    it is not clipcast's, its answer is no answer, or so close that devices may differ.
    """
    text, pixels = small_picture(picture)
    said = answer(artefact, adapter, bank, pixels)
    if bank is None and sorted(said.labels) != sorted(classes):
        raise InferenceError(
            f"the artefact's classes are {_some(said.labels)}, the federation's {_some(classes)}: export it again, or give "
            f"it others by --classes-from"
        )
    if not (np.isfinite(said.probabilities).all() and np.isfinite(said.embedding).all()):
        raise InferenceError("the artefact's answer is not finite: export it again, from another round")
    second, first = np.sort(said.probabilities)[-2:]
    if first - second < MARGIN:
        raise InferenceError(
            f"the artefact can hardly tell what is on the picture ({first:.3f} against {second:.3f}), a sound device might "
            f"answer otherwise: name another one with --picture, of one of the classes"
        )
    label = said.labels[int(np.argmax(said.probabilities))]
    return Smoke(picture=text, label=label, embedding=pack_embedding(said.embedding))


def small_picture(path: Path | None) -> tuple[str, Pixels]:
    """Return a picture as PNG in base64, made so small that it fits a manifest, and its pixels (H, W, 3).

    Without a path it is a drawing of ours. Raises InferenceError if it cannot be read.
    """
    picture = _drawing() if path is None else Image.fromarray(read_picture(path))
    for side in SIDES:
        smaller = picture.copy()
        smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        smaller.save(file, "PNG", optimize=True)
        text = base64.b64encode(file.getvalue()).decode()
        if len(text) <= MOST_PICTURE:
            return text, decode_picture(file.getvalue(), "the picture, made smaller for a release,")  # as devices will
    raise InferenceError(f"{path} does not become small enough for a release: name another picture")


def _drawing() -> Image.Image:
    """Draw a light disc before a dark ramp."""
    rows, columns = np.mgrid[0:64, 0:64]
    ramp = np.stack([rows, columns, rows + columns], -1) % 128
    disc = (rows - 28) ** 2 + (columns - 36) ** 2 < 18**2
    return Image.fromarray(np.where(disc[..., None], 230, ramp).astype(np.uint8))


def answer(artefact: Path, adapter: Path | None, bank: TextBank | None, pixels: Pixels) -> Answered:
    """Run an artefact on one picture (H, W, 3); raises InferenceError."""
    model = Model.open(artefact, adapter=adapter, classes=bank)
    scores = model.run(pixels[None])
    if scores.probabilities.shape != (1, len(model.labels)):
        raise InferenceError(
            f"the artefact names {len(model.labels)} classes and answers with {scores.probabilities.shape[-1]}"
        )
    if len(model.labels) < 2:
        raise InferenceError("the artefact has one class: there is nothing that it could tell apart")
    return Answered(model.labels, scores.probabilities[0], scores.embeddings[0])


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
