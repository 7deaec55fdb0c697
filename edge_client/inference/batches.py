"""Many picture files, a batch at a time: equal sizes together, and what cannot be read told and passed over."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_client.errors import InferenceError
from edge_client.inference.answering import Answer, answer_of
from edge_client.inference.model import Model
from edge_client.inference.pictures import Pixels, read_picture


@dataclass(frozen=True)
class Told:
    """What is said to one file: an answer, or why there is none."""

    picture: Path
    answer: Answer | None = None
    problem: str = ""


def answer_files(model: Model, files: Iterable[Path], batch: int, top: int) -> Iterator[Told]:
    """Yield what the model says to each file, in their order.

    At most `batch` files of one size in a row are answered together; an answer's time is then its share.
    """
    waiting: list[tuple[Path, Pixels]] = []
    for file in files:
        try:
            image = read_picture(file)
        except InferenceError as error:
            yield from _answered(model, waiting, top)
            waiting = []
            yield Told(file, problem=str(error))
            continue
        if waiting and (len(waiting) == batch or waiting[0][1].shape != image.shape):
            yield from _answered(model, waiting, top)
            waiting = []
        waiting.append((file, image))
    yield from _answered(model, waiting, top)


def _answered(model: Model, waiting: list[tuple[Path, Pixels]], top: int) -> Iterator[Told]:
    if not waiting:
        return
    started = time.perf_counter()
    scores = model.run(np.stack([image for _, image in waiting]))
    share = (time.perf_counter() - started) / len(waiting)
    for row, (file, _) in enumerate(waiting):
        yield Told(file, answer_of(model.labels, scores, row, top, share))
