"""Two tiers of every proof: a quick one inside `make test`, the full one with `make test-faults`. And their score.

A proof prints one line `name value unit target pass`; the full tier keeps the lines in benchmarks/faults/results.json, which
README.md quotes.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.disk import Disks
from tests.faults.disk_calls import watched
from tests.faults.processes import Zygote

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "faults" / "results.json"


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """Whether this is the full tier."""
    return bool(pytestconfig.getoption("--full"))


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Start the process that forks the others; it leaves none behind."""
    running = Zygote()
    yield running
    running.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder that is gone after the test, also when it fails: a proof leaves hundreds of megabytes."""
    with tempfile.TemporaryDirectory(prefix="clipcast-faults-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def score(pytestconfig: pytest.Config, full: bool) -> Callable[..., None]:
    """Note what a proof has measured: `score("R5", "orders of arrival with another hash", 0, "", "0", passed=True)`."""
    reporter = pytestconfig.pluginmanager.getplugin("terminalreporter")

    def note(proof: str, name: str, value: float, unit: str, target: str, *, passed: bool) -> None:
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(" | ".join((f"{proof} {name}", shown, unit, target, "pass" if passed else "FAIL")))
        if full:
            _keep(f"{proof} {name}", {"value": value, "unit": unit, "target": target, "pass": passed, **_where()})
        assert passed, f"{proof} {name}: {shown} {unit}, target {target}"

    return note


def _keep(name: str, line: dict[str, Any]) -> None:
    """Write a line at once: a tier that is stopped after half an hour has lost nothing."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(dict(sorted({**known, name: line}.items())), indent=1) + "\n")


def _where() -> dict[str, str]:
    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    return {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "date": today}


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what a sync means there is up to the test's own disk (disk.py)."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="clipcast-faults-", dir=memory) as name:
        yield Path(name)


@pytest.fixture
def disks() -> Iterator[Disks]:
    """Disks whose every operation can be the last one, or fail."""
    logging.disable(logging.ERROR)  # what goes wrong there is what is wanted, many thousand times
    with pytest.MonkeyPatch.context() as patch, watched(patch) as found:
        yield found
    logging.disable(logging.NOTSET)
