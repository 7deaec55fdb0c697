"""Answer pictures with an exported model: onnxruntime, Pillow and numpy. Never imports torch."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

from edge_client.errors import InferenceError
from hardware_profiles.profile import Profile

METADATA = "clipcast"
IMAGES, PROBABILITIES = "images", "probabilities"
CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Answer:
    """The most probable classes of a picture, best first, and the milliseconds from decoded picture to answer."""

    picture: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    milliseconds: float


class Classifier:
    """An exported model, loaded once."""

    def __init__(self, path: Path, profile: Profile | None = None) -> None:
        """Load from bytes, which keeps onnxruntime from following references to other files; raises InferenceError."""
        try:
            # The first provider that this onnxruntime has, of those the board prefers; the CPU always works.
            wanted = (*(profile.onnx_providers if profile else ()), CPU)
            providers = [name for name in dict.fromkeys(wanted) if name in onnxruntime.get_available_providers()]
            self._session = onnxruntime.InferenceSession(path.read_bytes(), providers=providers)
        except FileNotFoundError as error:
            raise InferenceError(f"{path}: no such file. `clipcast export` makes one") from error
        except Exception as error:
            raise InferenceError(f"{path}: onnxruntime cannot load it: {error}") from error
        facts = self._session.get_modelmeta().custom_metadata_map.get(METADATA)
        if facts is None:
            raise InferenceError(
                f"{path} was not exported by clipcast: it names no labels. `clipcast export` makes one that does"
            )
        self.labels: tuple[str, ...] = tuple(json.loads(facts)["labels"])

    def classify(self, path: Path, top: int = 1) -> Answer:
        """Answer one picture file; raises InferenceError if it cannot be read."""
        try:
            with Image.open(path) as picture:
                array = np.asarray(picture.convert("RGB"))
        except FileNotFoundError as error:
            raise InferenceError(f"{path}: no such picture") from error
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InferenceError(f"{path} cannot be read as a picture: {error}") from error
        started = time.perf_counter()
        (probabilities,) = self._session.run([PROBABILITIES], {IMAGES: array[None]})
        elapsed = (time.perf_counter() - started) * 1000.0
        best = np.argsort(-probabilities[0], kind="stable")[:top]
        return Answer(
            str(path),
            tuple(self.labels[i] for i in best),
            tuple(float(probabilities[0][i]) for i in best),
            elapsed,
        )
