"""What a round costs in memory must not grow with clients times the size of an update: arrays are counted, not seconds."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from coordinator import personal
from coordinator.checks import Expectation, Start
from coordinator.collection import Collection
from coordinator.errors import FederationError
from coordinator.learning import Knowledge, Learner, stored
from coordinator.on_demand import OnDemand, each
from coordinator.recipe import parse_recipe
from coordinator.records import Identity
from coordinator.state.store import Store
from protocol.codec import decode_update, encode_adapter, encode_update, reference, sha256
from protocol.events import UpdateArrived
from protocol.messages import Offer, Recipe, RoundPlan, TextBank, Update
from protocol.storage.at_rest import StoredAdapter
from tests.coordinator.conftest import a_record

LAYERS, RANK, SIDE, WIDTH, CLASSES = 24, 4, 1024, 8, 3
SHAPES = {
    f"vision_model.encoder.layers.{block}.self_attn.q_proj.lora_{end}": (RANK, SIDE) if end == "A" else (SIDE, RANK)
    for block in range(LAYERS)
    for end in "AB"
}
WHOLE = 4 * 2 * LAYERS * RANK * SIDE  # bytes of an adapter in float32
IDENTITY = Identity(
    federation="lab", model_digest="a" * 64, classes=("a", "b", "c"), rank=RANK, alpha=8.0, projections=("q_proj",),
    first_block=0,
)  # fmt: skip


def an_adapter(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def an_update(seed: int) -> Update:
    rows = np.eye(CLASSES, WIDTH, k=seed % 3, dtype=np.float32)
    counts, classes = np.full(CLASSES, 2, np.int32), np.arange(CLASSES, dtype=np.int32)
    return Update(an_adapter(seed), rows, classes, counts, counts, rows[:0], classes[:0])


class Round:
    """One round of a coordinator with real updates in a real store, without a wire."""

    def __init__(self, folder, recipe: str, clients: int) -> None:
        self.names = [f"client-{number:02}" for number in range(clients)]
        self.store, self.learner = Store(folder), Learner(a_bank(), parse_recipe(recipe), 0)
        self.store.begin(IDENTITY)
        self.known = Knowledge(a_bank(), stored(an_adapter(99)))
        self.store.start(self.known)
        ref = reference(encode_adapter(self.known.adapter))
        self.plan = RoundPlan(
            run="run-1", start=1, round=1, state="open", classes="c" * 64, adapter=ref, participants=tuple(self.names),
            recipe=Recipe(rank=RANK, min_prototype_count=1), seed=0, deadline_s=100.0,
        )  # fmt: skip
        self.store.open(self.plan, dict.fromkeys(self.names, RANK), dict.fromkeys(self.names, ref.sha256))
        starts = {name: Start(ref.sha256, SHAPES) for name in self.names}
        self.collection = Collection(Expectation(self.plan, starts, WIDTH, CLASSES), clients, 0.0)

    def collect(self) -> None:
        for number, name in enumerate(self.names):
            blob = encode_update(an_update(number))
            offer = Offer(
                round=1, base=self.plan.adapter.sha256, blob=reference(blob), samples=6, loss=1.0, accuracy=0.5,
                train_seconds=1.0, bytes_received=0,
            )  # fmt: skip
            update = decode_update(blob)
            answer = self.collection.take(UpdateArrived(name, offer, update, blob))
            assert answer.verdict.accepted
            self.store.keep(answer, blob, 1)
            self.collection.rest(answer, self.store.at_rest(update, blob))

    def learn(self) -> None:
        with self.store.models.intact():
            known, lesson = self.learner.learn(self.collection.accepted, self.known)
        made = sha256(encode_adapter(known.adapter))
        record = a_record(1, accepted=self.names, own=list(lesson.renewed), adapter_sha256=made)
        self.known = self.store.finish(record, known, lesson)


def a_bank() -> TextBank:
    return TextBank(1, ("a", "b", "c"), ("a {}",), np.eye(CLASSES, WIDTH, dtype=np.float32), 14.0, "tiny-clip", "d" * 64)


def peak_of(folder, recipe: str, clients: int) -> int:
    """Bytes at the highest point of a round, above what it began with."""
    one = Round(folder, recipe, clients)
    tracemalloc.start()
    try:
        one.collect()
        one.learn()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        one.store.close()


@pytest.mark.parametrize("recipe", ["fedlora", "fedlora+aggregation=mean_of_products", "fedalign+text.steps=0", "local"])
def test_sixteen_clients_take_no_more_memory_than_four_but_for_a_layer_of_each(tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(personal, "TOGETHER_BYTES", 2 * WHOLE)
    few, many = (peak_of(tmp_path / str(clients), recipe, clients) for clients in (4, 16))
    assert few > WHOLE, "one update at least is whole in memory, when it arrives"
    assert many - few < 2 * WHOLE, "all twelve more would be twelve"


def test_after_a_round_and_after_a_restart_adapters_are_on_the_disk_alone(tmp_path):
    one = Round(tmp_path, "fedalign+text.steps=0", 5)
    one.collect()
    assert all(isinstance(c.update.adapter, StoredAdapter) for c in one.collection.accepted.values())
    assert all(isinstance(c.update.adapter, StoredAdapter) for c in one.store.opened().accepted.values())
    one.learn()
    again = one.store.models.knowledge()
    assert list(one.known.own) == list(again.own) == one.names
    for own in (one.known.own, again.own):
        assert all(isinstance(adapter, StoredAdapter) for adapter in own.values())
    assert all(encode_adapter(one.known.own[name]) == encode_adapter(again.own[name]) for name in one.names)
    one.store.close()


@pytest.mark.parametrize("recipe", ["fedlora", "fedalign+text.steps=0"])
def test_an_accepted_update_that_is_damaged_on_the_disk_ends_the_round_with_its_name_and_changes_nothing(tmp_path, recipe):
    one = Round(tmp_path, recipe, 3)
    one.collect()
    path = one.collection.accepted["client-01"].update.adapter.path
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    with pytest.raises(FederationError, match=rf"{path.name} is damaged.*restore it, or move .* aside"):
        one.learn()
    with pytest.raises(FederationError, match=path.name):  # and so does a restart
        one.store.opened()
    assert one.store.records() == []
    one.store.close()


def test_adapters_on_demand_are_made_in_groups_and_only_the_newest_group_is_kept():
    made = []

    def make(clients):
        made.append(tuple(clients))
        return [{"layer.lora_A": np.full((1, 1), ord(client), np.float32)} for client in clients]

    adapters = OnDemand("edcba", make, 2)
    assert list(adapters) == ["a", "b", "c", "d", "e"]
    assert len(adapters) == 5
    assert "f" not in adapters
    assert [chr(int(adapter["layer.lora_A"][0, 0])) for adapter in adapters.values()] == list("abcde")
    assert made == [("a", "b"), ("c", "d"), ("e",)]
    assert adapters["b"]["layer.lora_A"][0, 0] == ord("b")
    assert made[3:] == [("a", "b")]
    with pytest.raises(KeyError):
        adapters["f"]


def test_of_adapters_made_one_by_one_none_is_kept():
    made = []
    adapters = OnDemand("ba", each(lambda client: made.append(client) or {}))
    assert [adapters["a"], adapters["a"], adapters["b"]] == [{}, {}, {}]
    assert made == ["a", "a", "b"]
