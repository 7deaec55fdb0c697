"""What answers at this moment: the current model, which may be switched while others are answered; and who watches it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_client.errors import InferenceError, NoModelError
from edge_client.inference.model import Model, Scores
from edge_client.inference.pictures import Pixels


@dataclass(frozen=True)
class Answer:
    """The most probable classes of a picture, best first, and the milliseconds from decoded picture to answer.

    `version` is the release that answered, 0 if it was none.
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    milliseconds: float
    version: int = 0


@dataclass(frozen=True)
class Outcome:
    """How one picture (H, W, 3) was answered: scores of one row, or the error."""

    image: Pixels
    version: int
    seconds: float
    scores: Scores | None = None
    error: InferenceError | None = None


class Answering:
    """Holds the current model. Any number of threads may ask; `switch` takes effect for those that ask after it."""

    def __init__(self, model: Model | None, version: int = 0) -> None:
        self._lock = threading.Lock()
        self._current = (model, version)
        self._observer: Callable[[Outcome], None] | None = None

    def current(self) -> tuple[Model | None, int]:
        """Return the model and its version, of one moment; None while there is none yet."""
        with self._lock:
            return self._current

    def switch(self, model: Model | None, version: int) -> None:
        """Answer with another model from now on."""
        with self._lock:
            self._current = (model, version)

    def observe(self, observer: Callable[[Outcome], None] | None) -> None:
        """Tell `observer` of each answer, from the thread that asked: it must be quick and raise nothing."""
        self._observer = observer

    def classify(self, image: Pixels, top: int = 1) -> Answer:
        """Answer one picture, uint8 (H, W, 3); raises InferenceError, NoModelError while there is no model."""
        model, version = self.current()
        if model is None:
            raise NoModelError("there is no model yet: the first release brings one")
        started = time.perf_counter()
        try:
            scores = model.run(image[None])
        except InferenceError as error:
            self._tell(Outcome(image, version, time.perf_counter() - started, error=error))
            raise
        seconds = time.perf_counter() - started
        self._tell(Outcome(image, version, seconds, scores))
        return answer_of(model.labels, scores, 0, top, seconds, version)

    def _tell(self, outcome: Outcome) -> None:
        observer = self._observer
        if observer is not None:
            observer(outcome)


def answer_of(labels: tuple[str, ...], scores: Scores, row: int, top: int, seconds: float, version: int = 0) -> Answer:
    """Return the `top` best classes of one row of scores."""
    shares = scores.probabilities[row]
    best = np.argsort(-shares, kind="stable")[:top]
    return Answer(tuple(labels[i] for i in best), tuple(float(shares[i]) for i in best), 1000.0 * seconds, version)
