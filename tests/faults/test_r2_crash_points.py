"""R2: every durable operation of a federation, on the coordinator and its clients, as the point where the power is cut.

Before the operation, amid it (a torn write, half of what is not synced), after it with nothing kept but what is synced,
and after it. What is left is what the machine starts with; the federation must end as the calm one.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.state.journal import FILE
from coordinator.state.store import Store
from tests.faults.disk import LIVE, SAFE, TORN, Calm, Disk, Disks, Image, Operation
from tests.faults.disk_faults import Cut
from tests.faults.machines import COORDINATOR, SMALL, WHOLE, Scenario
from tests.faults.verdict import SETTLE_S, calm_outcome, lost_receipts, problems, run_to_the_end
from tests.faults.world import World


def cuts_at(number: int, *, full: bool) -> list[tuple[str, bool]]:
    """How the power is cut at an operation: when, and whether of one machine or of all at once.

    After one operation is nearly before the next: the quick tier saves most of that.
    """
    one = [("torn", False), ("lost", False)]
    if not full:
        return one if number % 3 else [*one, ("before", False)]
    return [*one, ("before", False), ("after", False), ("torn" if number % 2 else "lost", True)]


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
        lost = start_from_what_is_left(world, fault, whole_site=whole_site)
        run_to_the_end(world)
        return [*lost, *problems(world, calm)]


def start_from_what_is_left(world: World, fault: Cut, *, whole_site: bool) -> list[str]:
    """Start the machines that lost their power; return the receipts that were given for what is not on the disk now."""
    (name,) = world.cut
    assert fault.left is not None
    images = {name: fault.left}
    if whole_site:
        how = {"torn": TORN, "lost": SAFE}.get(fault.when, LIVE)
        images |= {other: disk.image(how) for other, disk in world.disks.items() if other != name}
    for other, image in images.items():
        world.kill(other)
        world.disks[other].restore(image)
    lost = lost_receipts(world)
    world.pass_time(1.0)
    world.start(*images)
    return [f"at the cut there were receipts without an update: {lost}"] if lost else []


def test_every_durable_operation_as_a_crash_point(
    fast_path: Path, disks: Disks, full: bool, score: Callable[..., None]
) -> None:
    scenario = WHOLE if full else SMALL
    calm_outcome(fast_path, disks, scenario)
    points, failed, where, kinds = 0, [], Counter[str](), Counter[str]()
    for number in itertools.count(1):
        ran_out = False
        for when, whole_site in cuts_at(number, full=full):
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
    sys.stderr.write("\n" + "\n".join(failed[:9]))
    score("R2", "crash points after which the result was another", len(failed), "points", "0", passed=not failed)


@dataclass
class Commits:
    """Keeps what the journal's files hold before and after each commit."""

    found: list[tuple[Image, Image]] = field(default_factory=list)

    def at(self, disk: Disk, operation: Operation, do: Callable[[], Any], half: Callable[[], Any]) -> Any:
        """Carry it out."""
        del half
        if operation.kind != "commit":
            return do()
        before = disk.image(LIVE)
        result = do()
        self.found.append((before, disk.image(LIVE)))
        return result


def read(folder: Path, image: Image) -> tuple[Any, ...]:
    """What a coordinator finds in such a folder."""
    disk = Disk(folder)
    disk.restore(image)
    store = Store(folder)
    try:
        opened = store.opened()
        return store.run(), store.registry.devices(), store.records(), opened and (opened.plan, sorted(opened.accepted))
    finally:
        store.close()


def tails(before: bytes, after: bytes) -> Iterator[bytes]:
    """The log with its newest part cut off, zero or other bytes in its place, at ends of pages and amid them."""
    cuts = {len(before), *range(len(before) + 24, len(after), 1031), *range(len(before) + 4120, len(after), 4120)}
    for cut in sorted(cut for cut in cuts if cut < len(after)):
        yield after[:cut]
        yield after[:cut] + bytes(len(after) - cut)
        yield after[:cut] + bytes([255]) * 100


def test_whatever_is_left_of_the_last_transaction_it_happened_or_did_not(
    fast_path: Path, disks: Disks, score: Callable[..., None]
) -> None:
    """SQLite's log of a whole federation, cut off anywhere in each transaction."""
    disks.fault = commits = Commits()
    with World(fast_path / "commits", disks, SMALL) as world:
        world.start()
        run_to_the_end(world)
    log, cuts, changes, wrong = f"{FILE}-wal", 0, 0, []
    for number, (before, after) in enumerate(commits.found):
        old, new = read(fast_path / "old", before), read(fast_path / "new", after)
        changes += old != new
        for tail in tails(before.get(log) or b"", after.get(log) or b""):
            found = read(fast_path / "torn", {**after, FILE: before.get(FILE, after[FILE]), log: tail})
            cuts += 1
            if found not in (old, new):
                wrong.append(f"commit {number}, {len(tail)} bytes: {found}")
    assert changes > 5
    sys.stderr.write("\n" + "\n".join(wrong[:5]))
    score("R2", "places where the journal's log was cut off", cuts, "cuts", ">= 100", passed=cuts >= 100)
    score("R2", "cuts that left neither the old nor the new state", len(wrong), "cuts", "0", passed=not wrong)
