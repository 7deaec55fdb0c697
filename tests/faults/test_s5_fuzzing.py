"""S5: any bytes, for the readers that meet the wire first: they raise what they may raise, fast and in little memory."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.fuzz_targets import TARGETS, seeds

ROOT = Path(__file__).parent.parent.parent
RUNS = {"envelope": 200_000, "chunk": 300_000, "blob": 300_000, "partial": 200_000}
MOST_MS, MOST_MB = 50.0, 64.0
SEEDS = seeds()


@st.composite
def changed(draw: st.DrawFn, target: str) -> bytes:
    """True input, spliced, cut and with some bytes changed."""
    data = bytearray(draw(st.sampled_from(SEEDS[target])))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.integers(0, 3)):
            case 0:
                data[place : place + 1] = draw(st.binary(max_size=8))
            case 1:
                del data[place : place + draw(st.integers(1, 64))]
            case 2:
                other = draw(st.sampled_from(SEEDS[target]))
                data[place:] = other[draw(st.integers(0, len(other))) :]
            case _:
                data[place:place] = data[place : place + draw(st.integers(1, 64))]
    return bytes(data)


numbers = st.one_of(st.integers(-3, 40), st.integers(), st.floats(), st.none(), st.booleans(), st.just("1"))
tensors = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F16", "F32", "I32", "I8", "BF16", "F8_E4M3", "BOOL", "f16", "", 1]),
        "shape": st.one_of(st.lists(numbers, max_size=4), numbers),
        "data_offsets": st.one_of(st.lists(numbers, max_size=3), st.just([0, 0]), st.just([0, 8])),
        "more": numbers,
    },
)
names = st.sampled_from(
    ["prototypes", "features", "labels", "feature_scales", "prototype_classes", "embeddings", "adapter.x.lora_A", "", "ä"]
)
metadata = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["update", "bank", "adapter", 1]),
        "clipcast": st.sampled_from(['{"type":"bank","bank":"{}"}', '{"type":"update"}', "[]", "x", '{"type":1}', 5]),
    },
)


@st.composite
def headed(draw: st.DrawFn) -> bytes:
    """A safetensors file whose header is JSON, but otherwise what chance will have."""
    header: dict[str, object] = dict(draw(st.dictionaries(names, tensors, max_size=4)))
    if draw(st.booleans()):
        header["__metadata__"] = draw(metadata)
    text = json.dumps(header).encode()
    return (
        struct.pack("<Q", len(text) + draw(st.sampled_from([0, 0, 0, -1, 1, 2**40]))) + text + draw(st.binary(max_size=64))
    )


@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes_are_read_or_refused(target: str, full: bool) -> None:
    inputs = [st.binary(max_size=400), changed(target), *([headed()] if target == "blob" else [])]

    @settings(max_examples=6000 if full else 600, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.one_of(inputs))
    def look(data: bytes) -> None:
        TARGETS[target](data)

    look()


def test_a_refusal_costs_little(score: Callable[..., None]) -> None:
    said = subprocess.run([sys.executable, "-m", "tests.faults.bombs"], cwd=ROOT, check=True, capture_output=True, text=True)
    costs = [json.loads(line) for line in said.stdout.splitlines()]
    sys.stderr.write("\n" + "\n".join(f"{cost['what']}: {cost['ms']:.1f} ms, {cost['mb']:.1f} MB" for cost in costs))
    assert len(costs) > 30
    slowest, largest = max(cost["ms"] for cost in costs), max(cost["mb"] for cost in costs)
    score("S5", "dearest refusal", slowest, "ms CPU", "<= 50", passed=slowest <= MOST_MS)
    score("S5", "largest refusal", largest, "MB", "<= 64", passed=largest <= MOST_MB)


def test_a_million_executions(full: bool, score: Callable[..., None]) -> None:
    """Led by coverage. What ends a run early is what this looks for."""
    if not full:
        pytest.skip("the full tier; the quick one has Hypothesis")
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris has no wheel for this machine or Python: pip install -c constraints.txt '.[fuzz]'")
    total, crashes = 0, []
    for target, runs in RUNS.items():
        how = [f"-runs={runs}", "-max_len=20000", "-rss_limit_mb=1024", "-timeout=10", "-artifact_prefix=/dev/null"]
        command = [sys.executable, "-m", "tests.faults.fuzz_targets", target, *how]
        run = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        found = re.search(r"Done (\d+) runs", run.stderr + run.stdout)
        total += int(found[1]) if found else 0
        if run.returncode != 0 or found is None:
            crashes.append(f"{target}: {run.stdout[-1500:]} {run.stderr[-1500:]}")
    sys.stderr.write("\n" + "\n".join(crashes))
    score("S5", "executions of four readers on fuzzed input", total, "executions", ">= 1000000", passed=total >= 1_000_000)
    score("S5", "readers that raised what they must not", len(crashes), "readers", "0", passed=not crashes)
