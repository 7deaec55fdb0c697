"""R9: every operation of a federation that changes a disk finds no room or fails, once or for half a minute.

Nothing false is said or kept, nobody needs help, and the federation ends as the calm one. A process that cannot even be
started says what to do, and is started again as a service manager does.
"""

from __future__ import annotations

import errno
import itertools
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.faults.disk import Disks
from tests.faults.disk_faults import Full
from tests.faults.machines import SMALL, WHOLE, Scenario
from tests.faults.verdict import calm_outcome, problems, run_to_the_end
from tests.faults.world import World

LASTS_S = 30.0
CASES = [(errno.ENOSPC, LASTS_S), (errno.EIO, LASTS_S), (errno.EIO, 0.0)]


def fail_at(
    folder: Path, disks: Disks, scenario: Scenario, number: int, code: int, lasts_s: float
) -> tuple[Full, list[str]]:
    """Run with a disk that fails; return what was not as it must be."""
    calm = calm_outcome(folder.parent, disks, scenario)
    with World(folder, disks, scenario) as world:
        disks.fault = fault = Full(number, code, lasts_s, lambda: world.network.now)
        try:
            world.start()
            run_to_the_end(world)
        except Exception as error:  # noqa: BLE001 - a process that dies of it is what this looks for
            return fault, [f"nobody expected {error!r} {traceback.format_exc(-4)}"]
        return fault, problems(world, calm)


def test_whichever_operation_a_disk_refuses(fast_path: Path, disks: Disks, full: bool, score: Callable[..., None]) -> None:
    scenario = WHOLE if full else SMALL
    points, failed, kinds = 0, [], Counter[str]()
    for number in itertools.count(1):
        fault = None
        for code, lasts_s in CASES if full else (CASES[number % len(CASES)],):
            fault, found = fail_at(fast_path / f"{number}-{code}-{lasts_s}", disks, scenario, number, code, lasts_s)
            points += bool(fault.failed)
            kinds.update(operation.kind for operation in fault.failed)
            if found:
                failed.append(f"at {number} {errno.errorcode[code]} for {lasts_s} s, {fault.failed[0]}: {'; '.join(found)}")
        if fault is not None and not fault.failed:
            break
    assert set(kinds) == {"create", "write", "sync", "rename", "folder sync", "unlink", "mkdir", "commit"}
    score("R9", "operations that a disk refused", points, "points", ">= 200", passed=points >= 200)
    sys.stderr.write("\n" + "\n".join(failed[:9]))
    score(
        "R9", "refusals after which the result was another or help was needed", len(failed), "points", "0", passed=not failed
    )
