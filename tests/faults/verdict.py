"""Whether a federation that was disturbed ended as the calm one, and told nobody what is not so."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.faults.disk import Calm, Disks
from tests.faults.machines import Scenario
from tests.faults.world import Outcome, World, outcome

SETTLE_S = 40.0  # longer than any offer waits to be repeated
_CALM: dict[Scenario, Outcome] = {}


def run_to_the_end(world: World) -> None:
    """Let the federation finish, and everybody hear of it."""
    world.run(lambda: world.finished)
    world.pass_time(SETTLE_S)


def calm_outcome(folder: Path, disks: Disks, scenario: Scenario) -> Outcome:
    """Return what the scenario comes to when nothing happens."""
    if scenario not in _CALM:
        disks.fault = Calm()
        with World(folder / "calm", disks, scenario) as world:
            world.start()
            run_to_the_end(world)
            assert not world.ended
            assert not world.not_started
            assert len(world.witness.accepted) == scenario.rounds * scenario.per_round
            _CALM[scenario] = outcome(world)
    return _CALM[scenario]


def problems(world: World, calm: Outcome) -> list[str]:
    """Return what is not as it must be, at the end."""
    found = []
    if (came_to := outcome(world)) != calm:
        found.append(f"ended in {came_to}, not {calm}")
    if lost := lost_receipts(world):
        found.append(f"receipts without an update: {lost}")
    if twice := counted_twice(world):
        found.append(f"counted twice: {twice}")
    if world.witness.changed:
        found.append(f"receipts taken back: {world.witness.changed}")
    if world.ended:
        found.append(f"gave up: {world.ended}")
    return found


def lost_receipts(world: World) -> list[tuple[str, int, str]]:
    """Return what was said to be accepted and is not in the journal: (client, round, hash)."""
    with world.store() as store:
        answers = {key: store.answered(key[0], world.witness.offers[key]) for key in sorted(world.witness.accepted)}
    return [key for key, answer in answers.items() if answer is None or not answer.verdict.accepted]


def counted_twice(world: World) -> list[tuple[int, str]]:
    """Return who counts more than once in a round: (round, client)."""
    with world.store() as store:
        records = store.records()
    numbers = [record.round for record in records]
    assert numbers == list(range(1, len(numbers) + 1)), f"rounds {numbers}"
    return [(record.round, client) for record in records for client, n in Counter(record.accepted).items() if n > 1]
