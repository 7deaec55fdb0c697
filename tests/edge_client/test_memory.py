"""Predicted memory beside measured: benchmarks/memory.py's smaller cases, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.parametrize(
    "case",
    [
        ["--shape", "vit-b-32", "--bits", "4", "--batch", "8"],
        ["--shape", "vit-b-32", "--bits", "8", "--batch", "8"],
        ["--shape", "vit-b-32", "--bits", "32", "--batch", "8"],
        ["--shape", "vit-b-32", "--bits", "4", "--batch", "8", "--checkpointing"],
        ["--shape", "vit-l-14", "--bits", "4", "--batch", "1"],
    ],
    ids=lambda case: "-".join(case[1::2]),
)
def test_a_trainings_peak_is_within_a_fifth_of_the_prediction(case):
    done = subprocess.run([sys.executable, str(SCRIPT), *case, "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert 0.8 <= found["predicted / measured"] <= 1.2, found
