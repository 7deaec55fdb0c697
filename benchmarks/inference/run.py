"""From decoded picture to label, ViT-B/32 on this machine's CPU: clipcast against others, side by side.

    python -m benchmarks.inference.run [--rounds 30] [--threads 2] [--open-clip oc/bin/python]

open_clip takes part with an environment of its own, as torchvision, which it wants, is not wanted beside transformers:
`python -m venv oc && oc/bin/pip install torch==2.13.0 open_clip_torch`; README's figures have it. Each contender lives in a
process of its own; in every round each answers once, one after the other, so that what disturbs the machine disturbs all.
Weights are random, of the real shape. The pictures are scikit-learn's two photographs at 640 x 427.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

BATCHES = (1, 16)
WARM_UP = 3
REST_S = 0.2  # threads of the one before spin for a while before they sleep
NAMES = ("transformers", "plain-onnx", "ready-pixels", "clipcast-fp32", "clipcast-int8")
RESULTS = Path(__file__).with_name("results.json")


class Contender:
    """One contender's process: `ask(batch)` makes it answer once and returns the seconds."""

    def __init__(self, name: str, folder: Path, threads: int, python: str) -> None:
        command = [python, "-m", "benchmarks.inference.worker", name, str(folder), str(threads)]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ask(self, batch: int) -> dict[str, Any]:
        """Return what the process says of one answer: `seconds`, and its `peak_mb` so far."""
        time.sleep(REST_S)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(batch, file=self._process.stdin, flush=True)
        said: dict[str, Any] = json.loads(self._process.stdout.readline())
        return said

    def close(self) -> None:
        """Let the process end."""
        self._process.communicate()


@contextmanager
def contenders(names: dict[str, str], folder: Path, threads: int) -> Iterator[dict[str, Contender]]:
    """Start the processes, and end them."""
    with ExitStack() as stack:
        started = {}
        for name, python in names.items():
            started[name] = Contender(name, folder, threads, python)
            stack.callback(started[name].close)
        yield started


def measure(names: dict[str, str], folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Return by contender and batch the seconds of each answer, and the peak of memory in MB."""
    seconds: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in BATCHES} for name in names}
    peaks: dict[str, float] = {}
    with contenders(names, folder, threads) as started:
        for batch in BATCHES:
            for _ in range(WARM_UP):
                for one in started.values():
                    one.ask(batch)
            for turn in range(rounds):
                for name in names if turn % 2 else reversed(list(names)):
                    said = started[name].ask(batch)
                    seconds[name][batch].append(said["seconds"])
                    peaks[name] = said["peak_mb"]
    return {"seconds": seconds, "peak_mb": peaks}


def summary(measured: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """Return medians, and the ratios that README quotes: the median of the ratios of each round, not of the medians."""
    seconds = measured["seconds"]

    def ratio(left: str, right: str, batch: int) -> float | None:
        if left not in seconds or right not in seconds:
            return None
        pairs = zip(seconds[left][batch], seconds[right][batch], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    return {
        "median_ms": {
            name: {str(batch): round(1000 * statistics.median(times), 2) for batch, times in by_batch.items()}
            for name, by_batch in seconds.items()
        },
        "peak_mb": measured["peak_mb"],
        "size_int8_to_fp32": round(sizes["int8"] / sizes["fp32"], 4),
        "size_mb": {name: round(size / 1e6, 1) for name, size in sizes.items()},
        "ratios": {
            str(batch): {
                "transformers / clipcast-int8": ratio("transformers", "clipcast-int8", batch),
                "open_clip / clipcast-int8": ratio("open_clip", "clipcast-int8", batch),
                "clipcast-fp32 / plain-onnx": ratio("clipcast-fp32", "plain-onnx", batch),
                "clipcast-fp32 / ready-pixels": ratio("clipcast-fp32", "ready-pixels", batch),
            }
            for batch in BATCHES
        },
    }


def main() -> None:
    """Prepare, measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open-clip", help="a Python that has open_clip")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, help="keep the models here, and take what is here already")
    given = parser.parse_args()
    names = dict.fromkeys(NAMES, sys.executable) | ({"open_clip": given.open_clip} if given.open_clip else {})
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        subprocess.run([sys.executable, "-m", "benchmarks.inference.prepare", str(folder)], check=True)
        sizes = {flavour: (folder / f"{flavour}.onnx").stat().st_size for flavour in ("fp32", "int8")}
        found = summary(measure(names, folder, given.threads, given.rounds), sizes)
    found |= {"date": datetime.now(timezone.utc).date().isoformat(), "cpu": cpu(), "threads": given.threads}
    found |= {"rounds": given.rounds, "python": platform.python_version()}
    given.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def cpu() -> str:
    """Return what this machine's processor calls itself, and what it has for eight bits."""
    text = Path("/proc/cpuinfo").read_text()
    name = next(
        (line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), platform.machine()
    )
    has = [flag for flag in ("avx2", "avx512_vnni", "amx_int8", "asimddp") if flag in text.split()]
    return f"{name} ({', '.join(has)})"


if __name__ == "__main__":
    main()
