"""A federation through any sequence of misfortunes: after each step what must always hold, and at last its end.

Real ends, state machines, outboxes, checkpoints, journal and files; virtual are the broker and the time. Hypothesis picks
the steps and shortens those that break something.
"""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from coordinator.errors import FederationError
from tests.faults.disk import LIVE, SAFE, TORN, Disks
from tests.faults.disk_faults import Filled
from tests.faults.machines import COORDINATOR, ClientProcess, Scenario
from tests.faults.test_s3_rogue_broker import OPERATIONS, documented
from tests.faults.twin import hashes
from tests.faults.verdict import counted_twice, lost_receipts
from tests.faults.world import World

WEEK_S, DAY_S = 7 * 86_400.0, 86_400.0
ROUGH = Scenario(clients=("ann", "bob", "cid", "dan"), rounds=4, per_round=3, quorum=2, deadline_s=120.0, step_s=2.0)
MACHINES = st.sampled_from((COORDINATOR, *ROUGH.clients))
CLIENTS = st.sampled_from(ROUGH.clients)
PAUSES = st.sampled_from((0.3, 1.0, 3.0, 10.0))


def reasons() -> set[str]:
    """The reasons of rejections that operators can look up."""
    table = OPERATIONS.read_text().split("| reason | cause | cure |")[1].split("\n\n")[0]
    return {name for row in table.splitlines()[2:] for name in re.findall("`([a-z-]+)`", row.split("|")[1])}


REASONS, VERDICTS = reasons(), documented()


class Misfortunes(RuleBasedStateMachine):
    """One federation. `prepare` says where it lives."""

    folder: Path
    disks: Disks
    numbers = itertools.count()
    steps = itertools.count()
    finished = itertools.count()
    real_time = staticmethod(time.time)
    patch: pytest.MonkeyPatch

    @initialize()
    def begin(self) -> None:
        """All are started, but not all at once."""
        self.disks.fault = self.full = Filled()
        self.world = World(self.folder / str(next(self.numbers)), self.disks, ROUGH)
        self.world.start()

    @rule(seconds=st.sampled_from((1.0, 5.0, 30.0)))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.world.pass_time(seconds)

    @rule(name=MACHINES, pause=PAUSES)
    def kill(self, name: str, pause: float) -> None:
        """A process dies."""
        self.world.kill(name)
        self.world.pass_time(pause)

    @rule(name=MACHINES, how=st.sampled_from((LIVE, SAFE, TORN)), pause=PAUSES)
    def cut_power(self, name: str, how: str, pause: float) -> None:
        """A machine loses its power, and its disk what was not safe."""
        self.world.cut_power(name, how)
        self.world.pass_time(pause)

    @rule(name=MACHINES, pause=PAUSES)
    def start(self, name: str, pause: float) -> None:
        """A process is started (again), in the place of one that may be running."""
        self.world.kill(name)
        self.world.start(name)
        self.world.pass_time(pause)

    @rule(name=CLIENTS, pause=PAUSES)
    def return_after_a_week(self, name: str, pause: float) -> None:
        """A client is away for a week, in which the others go on."""
        self.world.kill(name)
        until = self.world.network.now + WEEK_S
        while self.world.network.now < until:
            self.world.step(WEEK_S / 50)
        self.world.start(name)
        self.world.pass_time(pause)

    @rule(name=MACHINES, pause=PAUSES)
    def part_or_heal(self, name: str, pause: float) -> None:
        """A machine loses its network, or has it again."""
        (self.world.heal if name in self.world.parted else self.world.part)(name)
        self.world.pass_time(pause)

    @rule(pause=PAUSES)
    def stop_or_start_broker(self, pause: float) -> None:
        """The broker dies and forgets, or is back."""
        (self.world.stop_broker if self.world.broker_up else self.world.start_broker)()
        self.world.pass_time(pause)

    @rule(fates=st.lists(st.sampled_from(("lose", "twice", "tenfold", "late")), min_size=1, max_size=20), pause=PAUSES)
    def disturb(self, fates: list[str], pause: float) -> None:
        """The next messages are lost, repeated or held up."""
        self.world.network.fates = iter(fates)
        self.world.pass_time(pause)

    @rule(days=st.integers(-400, 400), pause=PAUSES)
    def set_clock(self, days: int, pause: float) -> None:
        """Somebody sets the clocks. Nothing may depend on them."""
        self.patch.setattr(time, "time", lambda: self.real_time() + days * DAY_S)
        self.world.pass_time(pause)

    @rule(name=MACHINES, pause=PAUSES)
    def fill_or_free_disk(self, name: str, pause: float) -> None:
        """A disk is full, or there is room again."""
        self.full.full ^= {name}
        self.world.pass_time(pause)

    @rule(name=CLIENTS, pause=PAUSES)
    def spoil_training(self, name: str, pause: float) -> None:
        """What a client trains next is of no use."""
        process = self.world.running.get(name)
        if isinstance(process, ClientProcess):
            process.spoils = True
        self.world.pass_time(pause)

    @invariant()
    def what_is_promised_holds(self) -> None:
        """Receipts are kept, nobody counts twice, rounds follow each other, refusals have reasons, nobody just dies."""
        world = self.world
        next(self.steps)
        assert lost_receipts(world) == []
        assert counted_twice(world) == []
        assert world.witness.changed == []
        assert {receipt.reason for receipt in world.witness.receipts.values()} <= REASONS | {"accepted"}
        for process in world.running.values():
            assert process.end is None or process.end.gate.counts.keys() <= VERDICTS
        assert [(name, error) for name, error in world.ended if not isinstance(error, FederationError)] == []
        self.chain_is_whole()

    def chain_is_whole(self) -> None:
        """Round numbers never fall, and each round began with what the one before had made."""
        with self.world.store() as store:
            records = store.records()
        made = {record.round: record.adapter_sha256 for record in records}
        refused = {refusal.reason for record in records for refusal in record.rejected}
        assert refused <= REASONS
        plans = self.world.witness.plans
        assert [plan.round for plan in plans] == sorted(plan.round for plan in plans)
        assert len({plan.run for plan in plans}) <= 1
        first = {plan.adapter.sha256 for plan in plans if plan.round == 1}
        assert len(first) <= 1
        for plan in plans:
            before = plan.round - 1 if plan.state == "open" else plan.round
            assert before == 0 or made[before] == plan.adapter.sha256

    def teardown(self) -> None:
        """All is mended: the federation finishes, or says why not; what it made is what its twin makes."""
        world = self.world
        try:
            self.full.full.clear()
            world.network.fates = iter(())
            world.start_broker()
            for name in world.disks:
                world.heal(name)
                if name not in world.running:
                    world.start(name)
            limit = (ROUGH.rounds + 1) * 4 * ROUGH.deadline_s
            world.run(lambda: world.finished, limit)
            world.pass_time(60.0)
            self.what_is_promised_holds()
            self.result_is_the_twins()
            next(self.finished)
        finally:
            world.__exit__()

    def result_is_the_twins(self) -> None:
        """Who was accepted in which round decides every bit."""
        with self.world.store() as store:
            records = store.records()
        assert [record.round for record in records] == list(range(1, ROUGH.rounds + 1))
        plans = {plan.round: plan for plan in self.world.witness.plans if plan.state == "open"}
        config = ROUGH.config(self.world.state, self.world.model)
        initial, *made = hashes(config, records, plans, self.world.state.parent)
        assert 1 not in plans or plans[1].adapter.sha256 == initial
        assert [record.adapter_sha256 for record in records] == made
        for record in records:
            assert not record.accepted or set(record.accepted) <= set(plans[record.round].participants)
            assert (record.outcome == "aggregated") == (len(record.accepted) >= ROUGH.quorum)
        for process in self.world.running.values():
            assert not (isinstance(process, ClientProcess) and process.is_training)


def test_any_sequence_of_misfortunes(
    fast_path: Path, disks: Disks, full: bool, score: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"folder": fast_path, "disks": disks, "patch": monkeypatch}
    machine = type("Machine", (Misfortunes,), {**fields, "steps": itertools.count(), "finished": itertools.count()})
    how = settings(
        max_examples=150 if full else 60,
        stateful_step_count=35 if full else 25,
        deadline=None,
        derandomize=not full,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        database=None,
        phases=(Phase.generate, Phase.shrink),
    )
    run_state_machine_as_test(machine, settings=how)
    steps, finished = next(machine.steps), next(machine.finished)  # type: ignore[attr-defined]
    sys.stderr.write(f"\n{steps} steps, {finished} federations")
    score(
        "SM",
        "steps of random histories after which all that is promised held",
        steps,
        "steps",
        ">= 500",
        passed=steps >= 500,
    )
    score("SM", "histories whose federation ended as its twin", finished, "federations", ">= 50", passed=finished >= 50)
