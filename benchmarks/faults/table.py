"""Print benchmarks/faults/results.json as the table of README.md: `python benchmarks/faults/table.py`."""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")
PROOFS = {
    "R1": "any process killed at any time",
    "R2": "power cut at every write, sync and rename",
    "R3": "a broker that forgets",
    "R4": "a slow link that breaks",
    "R5": "any order, duplicates, old messages",
    "R6": "stopped, cut off, crashed, slow",
    "R7": "a fleet that comes back at once",
    "R8": "everybody uploads at once",
    "R9": "a disk that fails at every write",
    "R10": "clocks that are wrong",
    "R11": "a device's service killed during releases",
    "SM": "random histories of all that",
    "S1": "TLS and certificates",
    "S2": "who may say and hear what",
    "S3": "a broker that lies",
    "S5": "fuzzed input",
    "S6": "two devices of ten that lie",
    "S9": "a stolen device, renewed keys",
}


def rows(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line of Markdown for each proof: its figures with their targets, but for those that are told only."""
    named = [(*name.split(" ", 1), figure) for name, figure in sorted(results.items()) if figure["target"] != "told"]
    named.sort(key=lambda line: (re.sub(r"\d", "", line[0]), int(re.sub(r"\D", "", line[0]) or 0)))
    return [
        f"| {proof}, {PROOFS[proof]} | {'; '.join(_told(name, figure) for _, name, figure in lines)} |"
        for proof, lines in groupby(named, key=lambda line: line[0])
    ]


def _told(name: str, figure: dict[str, Any]) -> str:
    value = figure["value"]
    shown = f"{value:.3g}" if isinstance(value, float) else f"{value:,}"
    target = f" ({figure['target']})" if figure["target"] else ""
    text = f"{name} **{shown}**{' ' + figure['unit'] if figure['unit'] else ''}{target}"
    return text if figure["pass"] else f"{text} MISSED"


if __name__ == "__main__":
    print("\n".join(rows(json.loads(RESULTS.read_text()))))
