"""What an artefact answers to one picture, by onnxruntime: what every device has to answer before it serves the artefact."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from edge_client.errors import InferenceError
from protocol.messages import FloatArray, TextBank
from protocol.release.manifests import Smoke
from protocol.release.smoke import pack_embedding

METADATA = "clipcast"
IMAGES, PROBABILITIES, EMBEDS, CLASS_EMBEDDINGS = "images", "probabilities", "image_embeds", "class_embeddings"
CPU = "CPUExecutionProvider"
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


def small_picture(path: Path | None) -> tuple[str, NDArray[np.uint8]]:
    """Return a picture as PNG in base64, made so small that it fits a manifest, and its pixels (H, W, 3).

    Without a path it is a drawing of ours. Raises InferenceError if it cannot be read.
    """
    picture = _drawing() if path is None else _read(path)
    for side in SIDES:
        smaller = picture.copy()
        smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        smaller.save(file, "PNG", optimize=True)
        text = base64.b64encode(file.getvalue()).decode()
        if len(text) <= MOST_PICTURE:
            return text, np.asarray(smaller)
    raise InferenceError(f"{path} does not become small enough for a release: name another picture")


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            found: Image.Image = picture.convert("RGB")
    except FileNotFoundError as error:
        raise InferenceError(f"{path}: no such picture") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InferenceError(f"{path} cannot be read as a picture: {error}") from error
    return found


def _drawing() -> Image.Image:
    """Draw a light disc before a dark ramp."""
    rows, columns = np.mgrid[0:64, 0:64]
    ramp = np.stack([rows, columns, rows + columns], -1) % 128
    disc = (rows - 28) ** 2 + (columns - 36) ** 2 < 18**2
    return Image.fromarray(np.where(disc[..., None], 230, ramp).astype(np.uint8))


def answer(artefact: Path, adapter: Path | None, bank: TextBank | None, pixels: NDArray[np.uint8]) -> Answered:
    """Run an artefact on one picture (H, W, 3); raises InferenceError."""
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(artefact.read_bytes(), options, providers=[CPU])
    except Exception as error:
        raise InferenceError(f"{artefact}: onnxruntime cannot load it: {error}") from error
    labels, feeds = _labels(session, artefact), {IMAGES: pixels[None]}
    if bank is not None:
        _check_bank(session, bank)
        feeds[CLASS_EMBEDDINGS] = np.asarray(bank.embeddings, np.float32)
        labels = bank.classes
    try:
        run = onnxruntime.RunOptions()
        if adapter is not None:
            loaded = onnxruntime.LoraAdapter()
            loaded.Load(str(adapter))
            run.add_active_adapter(loaded)
        probabilities, embeddings = session.run([PROBABILITIES, EMBEDS], feeds, run)
    except Exception as error:
        raise InferenceError(f"the artefact cannot be run on a picture: {error}") from error
    if probabilities.shape != (1, len(labels)):
        raise InferenceError(f"the artefact names {len(labels)} classes and answers with {probabilities.shape[-1]}")
    return Answered(labels, probabilities[0], embeddings[0])


def _facts(session: Any) -> dict[str, Any]:
    found = session.get_modelmeta().custom_metadata_map.get(METADATA)
    try:
        facts = json.loads(found or "null")
    except ValueError:
        facts = None
    return facts if isinstance(facts, dict) else {}


def _labels(session: Any, artefact: Path) -> tuple[str, ...]:
    labels = _facts(session).get("labels")
    if not isinstance(labels, list) or len(labels) < 2:
        raise InferenceError(
            f"{artefact} was not exported by clipcast: it names no labels. `clipcast export` makes one that does"
        )
    return tuple(map(str, labels))


def _check_bank(session: Any, bank: TextBank) -> None:
    """Raise InferenceError unless an artefact takes the classes of a bank."""
    facts = _facts(session)
    if facts.get("model_digest") != bank.model_digest:
        raise InferenceError("the artefact is of another base model than the classes: export it from this federation")
    if CLASS_EMBEDDINGS not in {given.name for given in session.get_overridable_initializers()}:
        raise InferenceError("the artefact takes no other classes: export it anew, or leave out --classes-from")


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
