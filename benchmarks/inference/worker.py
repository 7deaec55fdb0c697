"""One contender: answers once for each batch size that it reads from stdin, and says how long that took."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.inference.contenders import CONTENDERS


def main() -> None:
    """Answer until stdin ends."""
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    pictures = list(np.load(folder / "pictures.npy"))
    batches = {size: [pictures[i % len(pictures)] for i in range(size)] for size in (1, 16)}
    answer = CONTENDERS[name](folder, threads)
    for line in sys.stdin:
        batch = batches[int(line)]
        started = time.perf_counter()
        answer(batch)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "peak_mb": peak_mb()}), flush=True)


def peak_mb() -> float:
    """Return this process's largest resident memory so far."""
    text = Path("/proc/self/status").read_text()
    return round(next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM")) / 1000, 1)


if __name__ == "__main__":
    main()
