"""What a round costs beside training, and what the coordinator needs, with hundreds of clients: `make bench-load`.

    python -m benchmarks.load [--rounds 10] [--bytes 300000] [--fleets 50/50,100/100,200/200,1000/200]

One coordinator, one Mosquitto, and light clients (tests/faults/fleet.py) that answer a plan at once with an update of that
size: the time of a round is its overhead. A fleet is CONNECTED/SAMPLED. The clients need their share of this
machine, too. Writes benchmarks/load/results.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.conftest import wait_until
from tests.faults.cast import BROKER, COORDINATOR, Cast, Mosquitto
from tests.faults.evidence import fleet_lost, records, seconds_of_rounds
from tests.faults.light import recipe_of
from tests.faults.processes import Zygote

RESULTS = Path(__file__).parent / "load" / "results.json"
PROCESSES = 2
MB = 2**20


def measure(zygote: Zygote, connected: int, sampled: int, rounds: int, size: int) -> dict[str, Any]:
    """Run one federation; return its figures."""
    settings = {
        "federation": "load",
        "classes": ["cat", "dog"],
        "recipe": recipe_of(size, 2),
        "clients_per_round": sampled,
        "quorum": sampled,
        "deadline_s": 600,
        "rounds": rounds,
    }
    with tempfile.TemporaryDirectory(prefix="clipcast-load-") as name:
        folder = Path(name)
        with Cast(zygote, folder, settings, Mosquitto(zygote, folder / BROKER), (), by_command=True) as cast:
            cast.begin()
            cast.fleet([f"client-{number:04}" for number in range(connected)], PROCESSES)
            coordinator, peaks = cast.children[COORDINATOR], [0, 0]

            def over() -> bool:
                peaks[:] = [max(peaks[0], coordinator.memory()), max(peaks[1], cast.children[BROKER].memory())]
                return not coordinator.is_alive

            wait_until(over, 600.0, f"{rounds} rounds of {sampled} clients")
            if coordinator.wait() != 0:
                raise SystemExit(coordinator.tail())
            missing, told = fleet_lost(folder, cast.state, PROCESSES)
            seconds = sorted(seconds_of_rounds(cast.state))
            whole = sum(len(record["accepted"]) == sampled for record in records(cast.state))
    return {
        "connected": connected,
        "sampled": sampled,
        "rounds": whole,
        "receipts": told,
        "lost": len(missing),
        "round_p50_s": round(statistics.median(seconds), 2),
        "round_p99_s": round(seconds[math.ceil(0.99 * len(seconds)) - 1], 2),
        "coordinator_peak_mb": peaks[0] // MB,
        "broker_peak_mb": peaks[1] // MB,
    }


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--bytes", type=int, default=300_000)
    parser.add_argument("--fleets", default="50/50,100/100,200/200,1000/200")
    options = parser.parse_args()
    zygote, rows = Zygote(), []
    try:
        for fleet in options.fleets.split(","):
            connected, sampled = (int(part) for part in fleet.split("/"))
            rows.append(measure(zygote, connected, sampled, options.rounds, options.bytes))
            print(json.dumps(rows[-1]), flush=True)
    finally:
        zygote.close()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    about = {"update_bytes": options.bytes, "machine": machine, "date": time.strftime("%Y-%m-%d")}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**about, "fleets": rows}, indent=1) + "\n")
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
