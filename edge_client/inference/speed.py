"""How fast a model answers on this device, and what that took of it: memory, and on a Jetson power mode and temperature."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_client.errors import InferenceError
from edge_client.inference.model import Model
from edge_client.monitor.readings import Readings

WARM_UP = 3
AT_LEAST = 10


@dataclass(frozen=True)
class Speed:
    """Answers to batches of `batch` pictures: milliseconds of one batch, from decoded pictures to probabilities.

    `peak_mb` is the largest resident memory meanwhile, of the whole process, in units of 10^6 bytes. What the board does
    not say is None.
    """

    batch: int
    answers: int
    p50_ms: float
    p99_ms: float
    pictures_per_s: float
    peak_mb: float
    power_mode: str | None
    temperature_c: float | None
    power_w: float | None


def measure(
    model: Model,
    picture: NDArray[np.uint8],
    batch: int,
    seconds: float,
    board: Callable[[], Readings],
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Answer `batch` copies of a picture (H, W, 3) again and again for `seconds` and at least 10 times.

    The board is asked right after, while it is as warm as the answers made it. Raises InferenceError.
    """
    images = np.repeat(picture[None], batch, axis=0)
    for _ in range(WARM_UP):
        model.run(images)
    taken: list[float] = []
    with peak_memory() as peak:
        end = clock() + seconds
        while len(taken) < AT_LEAST or clock() < end:
            started = clock()
            model.run(images)
            taken.append(clock() - started)
    said = board()
    return Speed(
        batch,
        len(taken),
        1000 * float(np.percentile(taken, 50)),
        1000 * float(np.percentile(taken, 99)),
        batch * len(taken) / sum(taken),
        peak(),
        said.power_mode,
        said.hottest_c,
        said.power_w,
    )


@contextmanager
def peak_memory(every_s: float = 0.01) -> Iterator[Callable[[], float]]:
    """Watch this process's resident memory; give a function that returns its largest so far, in MB."""
    largest, ended = [resident_mb()], threading.Event()

    def look() -> None:
        while not ended.wait(every_s):
            largest[0] = max(largest[0], resident_mb())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield lambda: largest[0]
    finally:
        ended.set()
        thread.join()


def resident_mb(status: Path = Path("/proc/self/status")) -> float:
    """Return this process's resident memory in MB; raises InferenceError where the kernel does not tell."""
    try:
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError as error:
        raise InferenceError(f"{status} cannot be read: {error}. `clipcast bench` needs Linux") from error
    raise InferenceError(f"{status} does not say how much memory is resident. `clipcast bench` needs Linux")
