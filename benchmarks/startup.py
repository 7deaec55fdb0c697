"""Seconds of `import clipcast` and `clipcast --help`, each as a whole process.

python benchmarks/startup.py [--runs 11]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time


def seconds(command: list[str], runs: int) -> float:
    """Return the median wall-clock seconds of a command, after one warm-up."""
    taken = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=11)
    runs = parser.parse_args().runs
    print(
        json.dumps(
            {
                "what": "median seconds of a whole process",
                "import clipcast": round(seconds([sys.executable, "-c", "import clipcast"], runs), 3),
                "clipcast --help": round(seconds([sys.executable, "-m", "clipcast", "--help"], runs), 3),
                "runs": runs,
                "machine": f"{platform.machine()}, Python {platform.python_version()}",
                "date": time.strftime("%Y-%m-%d"),
            }
        )
    )


if __name__ == "__main__":
    main()
