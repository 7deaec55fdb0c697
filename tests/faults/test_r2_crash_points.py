"""R2: every durable operation of a federation, on the coordinator and its clients, as the point where the power is cut.

Before the operation, amid it (a torn write, half of what is not synced), after it with nothing kept but what is synced,
and after it. What is left is what the machine starts with; the federation must end as the calm one.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.faults.disk import LIVE, SAFE, TORN, Calm, Cut, Disks
from tests.faults.machines import COORDINATOR, SMALL, WHOLE, Scenario
from tests.faults.verdict import SETTLE_S, calm_outcome, problems, run_to_the_end
from tests.faults.world import World

# One machine loses its power, or all at once. After one operation is nearly before the next: the quick tier saves that.
CUTS = [("torn", False), ("lost", False), ("before", False), ("after", False), ("torn", True), ("lost", True)]


def cut_at(folder: Path, disks: Disks, scenario: Scenario, fault: Cut, *, whole_site: bool) -> list[str] | None:
    """Run with a cut, start again from what is left, run on; None if the federation ended before."""
    calm = calm_outcome(folder.parent, disks, scenario)
    with World(folder, disks, scenario) as world:
        disks.fault = fault
        world.start()
        world.run(lambda: bool(world.cut) or world.finished)
        if not world.cut:
            world.pass_time(SETTLE_S)
        if not world.cut:
            return None
        disks.fault = Calm()
        start_from_what_is_left(world, fault, whole_site=whole_site)
        run_to_the_end(world)
        return problems(world, calm)


def start_from_what_is_left(world: World, fault: Cut, *, whole_site: bool) -> None:
    (name,) = world.cut
    assert fault.left is not None
    images = {name: fault.left}
    if whole_site:
        how = {"torn": TORN, "lost": SAFE}.get(fault.when, LIVE)
        images |= {other: disk.image(how) for other, disk in world.disks.items() if other != name}
    for other, image in images.items():
        world.kill(other)
        world.disks[other].restore(image)
    world.pass_time(1.0)
    world.start(*images)


def test_every_durable_operation_as_a_crash_point(
    fast_path: Path, disks: Disks, full: bool, score: Callable[..., None]
) -> None:
    scenario = WHOLE if full else SMALL
    calm_outcome(fast_path, disks, scenario)
    points, failed, where, kinds = 0, [], Counter[str](), Counter[str]()
    for number in itertools.count(1):
        ran_out = False
        for when, whole_site in CUTS if full else CUTS[:2] if number % 4 else CUTS[:3]:
            fault = Cut(number, when)
            found = cut_at(fast_path / f"{number}-{when}-{whole_site}", disks, scenario, fault, whole_site=whole_site)
            if found is None:
                ran_out = True
                break
            assert fault.disk is not None
            assert fault.operation is not None
            points += 1
            where["coordinator" if fault.disk.root.name == COORDINATOR else "client"] += 1
            kinds[fault.operation.kind] += 1
            if found:
                failed.append(f"{number} {when} {fault.operation}: {'; '.join(found)}")
        if ran_out:
            break
    assert set(kinds) == {"create", "write", "sync", "rename", "folder sync", "unlink", "mkdir", "commit"}
    assert min(where["coordinator"], where["client"]) > 100
    score("R2", "crash points", points, "points", ">= 500", passed=points >= 500)
    sys.stderr.write("\n".join(failed[:9]))
    score("R2", "crash points after which the result was another", len(failed), "points", "0", passed=not failed)
