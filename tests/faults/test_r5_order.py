"""R5: updates in every order, ten times each, with old ones among them: always the same bits, nothing counted twice."""

from __future__ import annotations

import itertools
import math
import random
import secrets
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from clip_lora.shapes import initial_adapter
from coordinator.checks import Expectation, Start
from coordinator.collection import Collection
from coordinator.learning import Knowledge, Learner, stored
from coordinator.recipe import parse_recipe
from edge_client.checkpoint import Checkpoint
from protocol.bus import Publish
from protocol.codec import decode_update, encode_adapter, reference, sha256
from protocol.events import PlanReady, UpdateArrived
from protocol.messages import Adapter, RoundPlan
from protocol.transfer.parcel import pack
from tests.faults.disk import Disks
from tests.faults.machines import CLASSES, WHOLE, a_bank
from tests.faults.training import finish, training
from tests.faults.verdict import calm_outcome, problems, run_to_the_end
from tests.faults.world import World

CLIENTS = tuple("abcdefg")
SHAPES = {f"vision_model.encoder.layers.0.self_attn.q_proj.lora_{f}": s for f, s in (("A", (2, 6)), ("B", (6, 2)))}
RECIPES = ("mean_of_factors", "mean_of_products")
SEVEN = replace(WHOLE, clients=CLIENTS, per_round=7, quorum=7)


class Bench:
    """A round's plan, seven updates for it, and updates that are not for it."""

    def __init__(self, folder: Path, aggregation: str) -> None:
        self.recipe = parse_recipe(
            f"fedlora+rank=2+aggregation={aggregation}+features_per_class=1+personal.query=R1+personal.start=own"
        )
        self.known = Knowledge(a_bank(), stored(initial_adapter(SHAPES, 0)))
        self.learner = Learner(a_bank(), self.recipe, 0)
        base = reference(encode_adapter(self.known.adapter))
        plan = RoundPlan(
            run="run-1",
            start=1,
            round=3,
            state="open",
            classes="c" * 64,
            adapter=base,
            participants=CLIENTS,
            recipe=self.recipe.training(1),
            seed=0,
            deadline_s=100.0,
        )
        self.expected = Expectation(plan, {c: Start(base.sha256, SHAPES) for c in CLIENTS}, 8, len(CLASSES))
        self.updates = {client: self._update(folder, client, plan, self.known.adapter, base.sha256) for client in CLIENTS}
        one = self.updates["a"]
        self.stale = [
            replace(one, offer=one.offer.model_copy(update=change))
            for change in ({"round": 2}, {"round": 4}, {"run": "run-0"}, {"base": "b" * 64})
        ]

    def _update(self, folder: Path, client: str, plan: RoundPlan, adapter: Adapter, base: str) -> UpdateArrived:
        ready = PlanReady(plan, a_bank(), adapter, base)
        parcel = pack(finish(training(ready, client, Checkpoint(folder / client))), plan.run)
        return UpdateArrived(client, parcel.offer, decode_update(parcel.blob), parcel.blob)

    def hashes(self, arrivals: Iterable[UpdateArrived]) -> tuple[tuple[str, ...], list[bool]]:
        """Return the hashes of the global and the own adapters after these arrivals, and which of them were accepted."""
        collection = Collection(self.expected, len(CLIENTS), 0.0)
        accepted = [answer.verdict.accepted for answer in map(collection.take, arrivals)]  # type: ignore[union-attr]
        known, _ = self.learner.learn(collection.accepted, self.known)
        own = [sha256(encode_adapter(known.own[client])) for client in CLIENTS]
        return (sha256(encode_adapter(known.adapter)), *own), accepted


def test_every_order_of_seven_updates_gives_the_same_bits(tmp_path: Path, score: Callable[..., None]) -> None:
    orders, others = 0, 0
    for aggregation in RECIPES:
        bench = Bench(tmp_path, aggregation)
        calm, _ = bench.hashes(bench.updates.values())
        assert len(set(calm)) == 1 + len(CLIENTS)
        permutations = itertools.permutations(CLIENTS)
        for order in permutations if aggregation == RECIPES[0] else itertools.islice(permutations, 0, None, 61):
            hashes, accepted = bench.hashes(bench.updates[client] for client in order)
            others += hashes != calm
            orders += 1
            assert all(accepted)
    score("R5", "orders of arrival", orders, "orders", ">= 5040", passed=orders >= math.factorial(7))
    score("R5", "orders of arrival that gave other bits", others, "orders", "0", passed=others == 0)


def test_updates_that_come_ten_times_with_stale_ones_among_them_count_once(
    tmp_path: Path, full: bool, score: Callable[..., None]
) -> None:
    bench = Bench(tmp_path, RECIPES[0])
    calm, _ = bench.hashes(bench.updates.values())
    twice = stale = others = 0
    seeds = [*range(500 if full else 50), secrets.randbits(32)]
    for seed in seeds:
        arrivals = [*(10 * list(bench.updates.values())), *(5 * bench.stale)]
        random.Random(seed).shuffle(arrivals)
        hashes, accepted = bench.hashes(arrivals)
        counted = [arrival for arrival, taken in zip(arrivals, accepted, strict=True) if taken]
        stale += sum(arrival in bench.stale for arrival in counted)
        twice += len(counted) - len({arrival.client for arrival in counted})
        others += hashes != calm
    score("R5", "duplicates counted", twice, "updates", "0", passed=twice == 0)
    score("R5", "stale updates accepted", stale, "updates", "0", passed=stale == 0)
    sys.stderr.write(f"\nthe last seed was {seeds[-1]}")
    score("R5", "shuffles of duplicates that gave other bits", others, "shuffles", "0", passed=others == 0)


def test_messages_that_come_ten_times_late_and_in_disorder_change_nothing(
    fast_path: Path, disks: Disks, full: bool, score: Callable[..., None]
) -> None:
    """Through real ends, links and a real coordinator: every message's fate is drawn; at last all is said again."""
    calm = calm_outcome(fast_path, disks, SEVEN)
    seeds = [*range(60 if full else 6), secrets.randbits(32)]
    failed = []
    for seed in seeds:
        with World(fast_path / str(seed), disks, SEVEN) as world:
            rng = random.Random(seed)
            world.network.fates = (rng.choice(("deliver", "tenfold", "late")) for _ in itertools.count())
            world.start()
            world.run(lambda world=world: len(world.records) == 1)  # type: ignore[misc]
            say_again(world, world.network.published)
            run_to_the_end(world)
            say_again(world, world.network.published)
            world.pass_time(10.0)
            failed += [f"seed {seed}: {problem}" for problem in problems(world, calm)]
    sys.stderr.write("\n" + "\n".join([*failed, f"the last seed was {seeds[-1]}"]))
    score("R5", "federations with messages tenfold or late that ended otherwise", len(failed), "", "0", passed=not failed)


def say_again(world: World, messages: Sequence[Publish]) -> None:
    """As a broker that has recorded everything."""
    world.network.do("coordinator", list(messages))


def test_the_hashes_differ_if_an_update_does(tmp_path: Path) -> None:
    bench = Bench(tmp_path, RECIPES[0])
    calm, _ = bench.hashes(bench.updates.values())
    bent = dict(bench.updates)
    update = bent["a"].update
    adapter = {name: np.nextafter(factor, np.float32(9)) * 2 for name, factor in update.adapter.items()}
    bent["a"] = replace(bent["a"], update=replace(update, adapter=adapter))
    assert bench.hashes(bent.values())[0] != calm
