"""How a new model fares over a window: errors, latency, agreement with the model before; judged by what the release asks."""

from __future__ import annotations

import contextlib
import statistics
import threading
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from edge_client.errors import InferenceError
from edge_client.inference.answering import Outcome
from edge_client.inference.model import Model
from edge_client.inference.pictures import Pixels
from protocol.release.manifests import Health

KEPT = 32  # pictures, and latencies times eight
MOST_SIDE = 512


@dataclass(frozen=True)
class Figures:
    """What was measured since the switch. Latencies are medians in seconds, None without any; so is `agreement`, a share."""

    seconds: float
    answers: int
    errors: int
    latency: float | None
    latency_before: float | None
    agreement: float | None = None


def judge(health: Health, found: Figures) -> tuple[bool, str | None, str]:
    """Return whether the trial is over, and if it ended badly a reason and a sentence.

    Errors end it as soon as there are too many of at least five answers; the rest is judged at the end.
    """
    if found.answers >= min(5, max(1, health.min_answers)) and found.errors > health.max_error_share * found.answers:
        return True, "errors", f"{found.errors} of {found.answers} answers failed"
    if not window_over(health, found):
        return False, None, ""
    if found.latency is not None and found.latency_before is not None:
        ratio = found.latency / found.latency_before if found.latency_before > 0 else 1.0
        if ratio > health.max_latency_ratio:
            return True, "slow", f"an answer takes {1000 * found.latency:.1f} ms, {ratio:.2f} times as long as before"
    if found.agreement is not None and found.agreement < health.min_agreement:
        return True, "disagrees", f"the same label as before on {found.agreement:.0%} of recent pictures"
    return True, None, ""


def window_over(health: Health, found: Figures) -> bool:
    """Whether it was watched for long enough. A window without enough answers goes on."""
    return found.seconds >= health.window_s and found.answers >= health.min_answers


@dataclass
class Watch:
    """Takes note of answers, before a switch and after it. Threads that answer call `note`; one thread reads.

    Of recent pictures at most 32 are kept, at most 512 pixels wide and high, to be shown to the model before.
    """

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _latencies: deque[float] = field(default_factory=lambda: deque(maxlen=8 * KEPT))
    _pictures: deque[tuple[Pixels, int]] = field(default_factory=lambda: deque(maxlen=KEPT))
    _measured: tuple[float, ...] = ()
    _before: float | None = None
    _version: int | None = None
    _answers: int = 0
    _errors: int = 0

    def begin(self, version: int) -> None:
        """Count from now on, for this version; what was measured so far is what it is compared with."""
        with self._lock:
            self._measured = tuple(self._latencies)
            self._before = statistics.median(self._measured) if self._measured else None
            self._version = version
            self._answers = self._errors = 0
            self._latencies.clear()
            self._pictures.clear()

    def end(self) -> None:
        """Count no more: the new model stays."""
        with self._lock:
            self._version = None
            self._pictures.clear()

    def back(self) -> None:
        """Count no more: the model before answers again, and what was measured of it is what counts."""
        with self._lock:
            self._version = None
            self._pictures.clear()
            self._latencies.clear()
            self._latencies.extend(self._measured)

    def note(self, outcome: Outcome) -> None:
        """Take in an answer; of another version's, one that was under way at the switch, nothing."""
        with self._lock:
            if self._version is not None and outcome.version != self._version:
                return
            self._answers += 1
            if outcome.scores is None:
                self._errors += 1
                return
            self._latencies.append(outcome.seconds)
            if self._version is not None:
                self._pictures.append((smaller(outcome.image), int(outcome.scores.probabilities[0].argmax())))

    def compare(self, now: Model, before: Model) -> float | None:
        """Ask the model before about the recent pictures; return the share of those with the same label, None without any.

        It takes as long as their answers, and meanwhile others take longer: so it is done once, after latency was measured.
        """
        with self._lock:
            pictures = list(self._pictures)
        same = []
        for image, index in pictures:
            with contextlib.suppress(InferenceError):
                scores = before.run(image[None])
                same.append(before.labels[int(scores.probabilities[0].argmax())] == now.labels[index])
        return sum(same) / len(same) if same else None

    def figures(self, seconds: float) -> Figures:
        """Return what was measured, `seconds` after the switch."""
        with self._lock:
            latency = statistics.median(self._latencies) if self._latencies else None
            return Figures(seconds, self._answers, self._errors, latency, self._before)


def smaller(image: Pixels) -> Pixels:
    """Return a picture of at most 512 pixels a side, every so manyth pixel of it: cheap, and to both models the same."""
    step = -(-max(image.shape[:2]) // MOST_SIDE)
    return np.ascontiguousarray(image[::step, ::step])
