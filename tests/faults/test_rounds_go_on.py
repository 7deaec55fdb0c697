"""What may not stop a federation, in virtual time: failing devices, a broker that is away, a commit nobody heard of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clip_lora.algebra import rank_of
from coordinator.errors import FederationError, NotKeptError
from coordinator.learning import Learner
from coordinator.planning import Planner
from coordinator.state.store import Store
from protocol.codec import encode_adapter, sha256
from protocol.messages import Notice, TrainingResult
from tests.faults import machines
from tests.faults.disk import Disks
from tests.faults.machines import COORDINATOR, WHOLE, ClientProcess, Scenario
from tests.faults.verdict import calm_outcome, problems, run_to_the_end
from tests.faults.world import World, manifest_in

TWO_OF_THREE = Scenario(rounds=8, per_round=2, quorum=2, recipe="fedlora+rank=2+projections=q_proj+features_per_class=1")
TWO_OF_FIVE = replace(TWO_OF_THREE, clients=("ann", "bob", "cid", "dan", "eve"), rounds=3)
SHORT = replace(WHOLE, deadline_s=100.0)


def somebody_trains(world: World) -> bool:
    """Whether a round is under way, and not yet answered by all."""
    return any(isinstance(process, ClientProcess) and process.is_training for process in world.running.values())


def test_a_device_that_always_fails_ends_no_federation(fast_path: Path, disks: Disks) -> None:
    with World(fast_path / "world", disks, TWO_OF_THREE) as world:
        world.start()
        cid = world.running["cid"]
        assert isinstance(cid, ClientProcess)

        def finished() -> bool:
            cid.spoils = True
            return world.finished

        world.run(finished)
        assert not world.ended
        with world.store() as store:
            records = store.records()
        assert any("cid" in record.failed for record in records)
        assert all("cid" not in record.accepted for record in records)
        assert sum(record.outcome == "aggregated" for record in records) >= 5


def test_a_restart_between_rounds_draws_the_same_clients(fast_path: Path, disks: Disks) -> None:
    calm = calm_outcome(fast_path, disks, TWO_OF_FIVE)
    with World(fast_path / "world", disks, TWO_OF_FIVE) as world:
        world.start()
        for done in (1, 2):
            world.run(lambda done=done: any(record.round == done for record in world.records))  # type: ignore[misc]
            world.kill(COORDINATOR)
            world.start(COORDINATOR)
        run_to_the_end(world)
        assert not problems(world, calm)


def test_a_round_s_deadline_stands_still_while_the_broker_is_away(fast_path: Path, disks: Disks) -> None:
    calm = calm_outcome(fast_path, disks, SHORT)
    with World(fast_path / "world", disks, SHORT) as world:
        world.start()
        for _ in range(SHORT.rounds):
            world.run(lambda: somebody_trains(world))
            world.stop_broker()
            world.pass_time(90.0)
            world.start_broker()
            world.pass_time(1.0)
        run_to_the_end(world)
        assert not problems(world, calm)


def test_a_broker_that_stays_away_is_named_and_the_round_goes_on_later(fast_path: Path, disks: Disks) -> None:
    calm = calm_outcome(fast_path, disks, SHORT)
    with World(fast_path / "world", disks, SHORT) as world:
        world.start()
        world.run(lambda: somebody_trains(world))
        world.stop_broker()
        world.run(lambda: bool(world.ended))
        (name, error), *_ = world.ended
        assert name == COORDINATOR
        assert "the broker at mqtt://localhost:1883 was away for 100 s" in str(error)
        world.ended.clear()
        world.start_broker()
        run_to_the_end(world)
        assert not problems(world, calm)


def test_fewer_clients_a_round_are_drawn_anew_in_the_open_round(fast_path: Path, disks: Disks) -> None:
    with World(fast_path / "world", disks, WHOLE) as world:
        world.start()
        world.run(lambda: bool(world.witness.plans))
        world.kill(COORDINATOR)
        world.scenario = replace(WHOLE, per_round=2, quorum=2)
        world.start(COORDINATOR)
        run_to_the_end(world)
        assert not world.ended
        assert {len(record.accepted) for record in world.records} == {2}


def test_an_update_that_the_journal_has_counts_though_nobody_heard_of_its_commit(
    fast_path: Path, disks: Disks, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = calm_outcome(fast_path, disks, WHOLE)
    keep, unheard = Store.keep, []

    def kept(store: Store, answer, blob, counts_in: int) -> None:  # type: ignore[no-untyped-def]
        keep(store, answer, blob, counts_in)
        if (answer.client, counts_in) not in unheard:
            unheard.append((answer.client, counts_in))
            raise NotKeptError("the connection was lost at the commit")

    monkeypatch.setattr(Store, "keep", kept)
    with World(fast_path / "world", disks, WHOLE) as world:
        world.start()
        run_to_the_end(world)
        assert len(unheard) == 6
        assert not problems(world, calm)


def test_updates_that_cannot_be_learned_from_cost_their_round_and_are_told(
    fast_path: Path, disks: Disks, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn, failures = Learner.learn, [2]

    def learned(learner: Learner, contributions, known):  # type: ignore[no-untyped-def]
        if failures[0]:
            failures[0] -= 1
            raise ValueError("nothing is finite")
        return learn(learner, contributions, known)

    monkeypatch.setattr(Learner, "learn", learned)
    with World(fast_path / "world", disks, replace(WHOLE, rounds=3)) as world:
        world.start()
        run_to_the_end(world)
        assert not world.ended
        assert [record.outcome for record in world.records] == ["failed", "failed", "aggregated"]
        assert all("nothing is finite; the largest update is " in record.problem for record in world.records[:2])
    failures[0] = 3
    with World(fast_path / "again", disks, replace(WHOLE, rounds=3)) as world:
        world.start()
        world.run(lambda: bool(world.ended))
        assert isinstance(world.ended[0][1], FederationError)
        assert "nothing is finite" in str(world.ended[0][1])


MIXED = replace(
    WHOLE, rounds=1, recipe="fedlora+rank=4+projections=q_proj+aggregation=mean_of_products+defence.norm_limit=inf"
)
OWN = replace(
    MIXED,
    clients=("ann", "bob", "cid", "dan", "eve", "fay", "gus", "hal"),
    rounds=2,
    per_round=8,
    quorum=8,
    recipe=MIXED.recipe + "+personal.query=R1+personal.start=own+personal.own_share=0.9",
)


@pytest.mark.parametrize("scenario", [replace(MIXED, rounds=2), OWN], ids=["the global adapter", "a client's own"])
def test_an_update_of_the_largest_numbers_costs_its_round_and_is_named(
    fast_path: Path, disks: Disks, monkeypatch: pytest.MonkeyPatch, scenario: Scenario
) -> None:
    """It is finite and travels; what is made of it does not. A restart meets it again: it is in the journal."""

    def blown(result: TrainingResult) -> TrainingResult:
        largest = {name: np.full_like(factor, 65504.0) for name, factor in result.update.adapter.items()}
        return replace(result, update=replace(result.update, adapter=largest))

    monkeypatch.setattr(machines, "_spoilt", blown)
    with World(fast_path / "world", disks, scenario) as world:
        world.start()
        world.running["bob"].spoils = True  # type: ignore[union-attr]
        run_to_the_end(world)
        assert not world.ended
        with world.store() as store:
            first, second = store.records()
            assert first.adapter_sha256 == sha256(encode_adapter(store.models.adapter(0)))
        assert (first.outcome, first.accepted, second.outcome) == ("failed", list(scenario.clients), "aggregated")
        assert "training diverged" in first.problem
        assert first.problem.endswith("the largest update is bob's")


@pytest.mark.parametrize("ranks", [(4, 2, 4), (4, 1, 4)])
def test_an_open_round_of_mixed_ranks_begins_anew_when_factors_are_to_be_averaged(
    fast_path: Path, disks: Disks, monkeypatch: pytest.MonkeyPatch, ranks: tuple[int, ...]
) -> None:
    with World(fast_path / "world", disks, MIXED) as world:
        with monkeypatch.context() as patch:
            drawn = iter(ranks)
            patch.setattr(Planner, "rank", lambda _planner, _status: next(drawn))
            world.start()
            world.run(lambda: any(client == "ann" for client, *_ in world.witness.accepted))
            world.kill(COORDINATOR)
        world.scenario = replace(MIXED, recipe=MIXED.recipe.replace("mean_of_products", "mean_of_factors"))
        world.start(COORDINATOR)
        run_to_the_end(world)
        assert not world.ended
        with world.store() as store:
            (record,) = store.records()
            assert rank_of(store.models.adapter(1)) == 4
        assert (record.outcome, record.accepted) == ("aggregated", list(MIXED.clients))
        plans = [plan for plan in world.witness.plans if plan.state == "open"]
        assert (plans[0].individual, plans[-1].individual) == (True, False)


def test_a_round_that_ends_before_an_unheard_commit_is_asked_about_counts_it_too(
    fast_path: Path, disks: Disks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a restart would: what the journal has, the round has."""
    keep, unheard = Store.keep, []

    def kept(store: Store, answer, blob, counts_in: int) -> None:  # type: ignore[no-untyped-def]
        keep(store, answer, blob, counts_in)
        if not unheard:
            unheard.append(answer.client)
            raise NotKeptError("the connection was lost at the commit")

    monkeypatch.setattr(Store, "keep", kept)
    with World(fast_path / "world", disks, replace(WHOLE, rounds=1, quorum=2)) as world:
        world.start()
        world.run(lambda: bool(unheard))
        world.kill(unheard[0])  # it does not offer again
        run_to_the_end(world)
        (record,) = world.records
        assert unheard[0] in record.accepted
        assert len(record.accepted) == 3


@pytest.mark.parametrize("missed", [False, True])
def test_a_late_update_that_ends_between_two_rounds_travels_once_and_is_told_if_its_round_is_missed(
    fast_path: Path, disks: Disks, monkeypatch: pytest.MonkeyPatch, missed: bool
) -> None:
    """The disk takes no end of round 1 for a while, in which the slower one's upload ends."""
    finish, refused = Store.finish, []

    def full_at_first(store: Store, record, known, lesson) -> object:  # type: ignore[no-untyped-def]
        if len(refused) < 4:
            refused.append(record.round)
            raise NotKeptError("no room")
        return finish(store, record, known, lesson)

    monkeypatch.setattr(Store, "finish", full_at_first)
    recipe = "fedlora+rank=2+projections=q_proj+features_per_class=1+late_rounds=1"
    scenario = Scenario(clients=("ann", "bob"), per_round=2, quorum=1, deadline_s=600.0, recipe=recipe)
    with World(fast_path / "world", disks, scenario) as world:
        world.start()
        world.run(lambda: len(world.witness.accepted) == 2)
        assert {number for _, number, _ in world.witness.accepted} == {1}
        assert refused == [1] * 4
        if missed:
            for client in scenario.clients:
                world.kill(client)
        world.run(lambda: len(world.records) == 2)
        first, second = world.records
        (slower,) = set(scenario.clients) - set(first.accepted)
        assert second.late == {slower: 1}
        assert second.outcome == ("quorum-missed" if missed else "aggregated")
        (digest,) = {digest for client, number, digest in world.witness.accepted if client == slower and number == 1}
        sent = [message.topic for message in world.network.published if f"{slower}/blob/{digest}/" in message.topic]
        assert sent
        assert len(sent) == len(set(sent))
        notices = [m for m in map(manifest_in, world.network.published) if isinstance(m, Notice)]
        assert [notice.reason for notice in notices] == (["round-missed"] if missed else [])
