"""The whole way: text -> embeddings -> bus -> quantised training -> upload -> aggregation -> broadcast -> ONNX -> answers.

By FedAlign: the text side is trained and every client has an adapter of its own, from which its rounds start. Once in
memory, once over the embedded broker, three times over a real Mosquitto, with a restarted and with a killed coordinator:
all must end in the same bits, the whole state folder.
"""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from clip_lora.algebra import mean_of_factors, mean_of_products, rank_of
from clip_lora.shapes import adapter_shapes, initial_adapter
from clip_lora.towers import load_sizes, one_thread
from coordinator.collection import Answer
from coordinator.config import CoordinatorConfig
from coordinator.config import load as load_config
from coordinator.errors import FederationError
from coordinator.personal import at_rank
from coordinator.recipe import FederationRecipe
from coordinator.records import RoundRecord
from coordinator.rounds import Federation
from coordinator.state.store import Store
from coordinator.text_bank import make_bank
from edge_client.config import ClientConfig
from edge_client.data import find_pictures
from edge_client.device import new_client
from edge_client.errors import ShutOutError, UnfitPlanError
from edge_client.inference.answering import Answering
from edge_client.inference.model import Model
from edge_client.inference.pictures import read_picture
from edge_client.outbox import Outbox
from edge_client.participate import participate
from edge_client.participation import Participation
from edge_client.train import TrainingStopped
from edge_client.trainer import Trainer
from export.artefact import export_artefact
from export.metadata import Source
from export.parity import Proof
from hardware_profiles.profile import Profile
from hardware_profiles.profile import load as load_profile
from protocol.bus import Bus, Delivery, MemoryBroker, Publish, Subscribe
from protocol.client_end import ClientEnd
from protocol.codec import decode_update, encode_adapter, encode_update
from protocol.coordinator_end import CoordinatorEnd
from protocol.envelope import decode, expect
from protocol.events import ClientSeen, OfferMade, PlanReady, UpdateArrived
from protocol.link import Link
from protocol.messages import BlobRef, Offer, RoundPlan, Status, TrainingResult, Update, Verdict
from protocol.mqtt import MqttBus
from protocol.observer import Observer
from protocol.settings import BrokerSettings
from protocol.topics import Topics, parse
from protocol.trust.gate import Pinned
from protocol.trust.signing import Signer, opened, signer_of

CLASSES = ("zero", "one", "two", "three")
GIVEN: dict[str, Any] = {
    "local_steps": 3,
    "batch_size": 8,
    "features_per_class": 2,
    "min_prototype_count": 1,
    "text": {"steps": 3, "aligning_round": False},
    "personal": {"start": "own", "closing_steps": 0},
}
RECIPE = FederationRecipe.model_validate(GIVEN)
DEPTH = load_sizes("tiny-clip").vision.blocks
PROFILE = load_profile("generic-cpu")
NARROW = PROFILE.model_copy(update={"max_rank": 2})
MEASURED = {"seconds", "bytes_up", "bytes_down"}
Connect = Callable[[str, Publish | None], Bus]
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Outcome:
    """How a federation went: its records, its store, and the files of its state as they were after each round."""

    records: list[RoundRecord]
    store: Store
    after: list[dict[str, bytes]]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path inside."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def state_of(store: Store) -> dict[str, bytes]:
    """The files whose bits must be the same wherever a federation runs: blobs, not when and in which run they were made."""
    return files_of(store.blobs.folder)


@pytest.fixture(scope="session")
def alone_on_one_thread() -> Iterator[None]:
    """As in processes of their own: here coordinator and clients share torch's number of threads, and each sets it."""
    with one_thread():
        yield


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory, alone_on_one_thread: None) -> list[Path]:
    """Two clients' folders: real digits, the first client without "three", the second without "zero"."""
    folder = tmp_path_factory.mktemp("pictures")
    digits = [picture for picture in find_pictures("digits") if picture.label in CLASSES]
    for client, missing in (("one", "three"), ("two", "zero")):
        own = [picture for picture in digits if picture.label != missing][: 24 if client == "one" else 12]
        for number, picture in enumerate(own):
            file = folder / client / picture.label / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.load().save(file)
    return [folder / "one", folder / "two"]


def client_config(name: str, home: Path) -> ClientConfig:
    return ClientConfig(id=name, federation="flow", data=str(home), bits=4, threads=1)


def a_plan(number: int) -> RoundPlan:
    """What the federation's plan of a round says to a trainer."""
    return RoundPlan(
        run="by-hand",
        start=1,
        round=number,
        state="open",
        classes="0" * 64,
        adapter=BlobRef(sha256="0" * 64, size=1),
        participants=("one", "two"),
        recipe=RECIPE.training(DEPTH),
        seed=7,
        deadline_s=60.0,
    )


def take_part(
    connect: Connect,
    name: str,
    home: Path,
    stop: threading.Event,
    profile: Profile = PROFILE,
    folder: Path | None = None,
) -> None:
    """Run one client as it would run alone, until `stop`; `folder` may hold its key."""
    with tempfile.TemporaryDirectory() as new:
        state = folder or Path(new)
        outbox = Outbox(state)
        trainer, part, status = new_client(client_config(name, home), profile, outbox.load())
        end = ClientEnd("flow", name, random.Random(name), state)
        end.announce(status)
        try:
            participate(Link(connect(name, end.will()), end), end, trainer, part, stop, outbox)
        finally:
            outbox.close()


def coordinate(connect: Connect, state: Path, **settings: object) -> Outcome:
    """Run a coordinator as it would run alone, from its first round to its last."""
    fields = {"federation": "flow", "classes": CLASSES, "rounds": 2, "deadline_s": 60, "seed": 7, "recipe": RECIPE}
    config = CoordinatorConfig.model_validate({**fields, "seal_updates": False, "state": state, **settings})
    bus = connect("coordinator", None)
    try:
        end = CoordinatorEnd("flow", random.Random(0), seal_updates=config.seal_updates)
        bank = make_bank(config.model, config.classes, config.templates)
        store = Store(state)
        records, after = [], []
        try:
            for record in Federation(config, bank, Link(bus, end), end, store).run():
                records.append(record)
                after.append(files_of(state))
        finally:
            store.close()
    finally:
        bus.close()
    return Outcome(records, store, after)


def federate(
    connect: Connect, homes: list[Path], state: Path, profiles: Sequence[Profile] = (PROFILE, PROFILE), **settings: object
) -> Outcome:
    """Run a coordinator and two clients, each as it would run alone, on the given bus."""
    stop, threads, failures = threading.Event(), [], []

    def client(name: str, home: Path, profile: Profile) -> None:
        try:
            take_part(connect, name, home, stop, profile)
        except Exception as error:
            failures.append(error)
            raise

    for name, home, profile in zip(("one", "two"), homes, profiles, strict=False):
        threads.append(threading.Thread(target=client, args=(name, home, profile), name=name))
        threads[-1].start()
    try:
        outcome = coordinate(connect, state, **settings)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
    return outcome


def in_memory() -> Connect:
    broker = MemoryBroker()
    return lambda _name, will: broker.connect(will)


def over(url: str) -> Connect:
    return lambda name, will: MqttBus.open(BrokerSettings(url=url), f"flow-{name}", will)


@pytest.fixture(scope="session")
def calm(homes: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The federation in memory, which the others are compared with."""
    return federate(in_memory(), homes, tmp_path_factory.mktemp("calm"))


def test_two_rounds_in_memory(calm: Outcome) -> None:
    assert [record.outcome for record in calm.records] == ["aggregated", "aggregated"]
    for record in calm.records:
        assert record.accepted == ["one", "two"]
        assert not record.rejected
        assert record.samples == 36
        assert record.loss is not None
        assert all(count > 70_000 for count in record.bytes_up.values())
        assert record.bytes_down.keys() == {"one", "two"}
    first, second = (calm.store.models.adapter(n) for n in (1, 2))
    assert first.keys() == second.keys()
    assert any(not np.array_equal(first[name], second[name]) for name in first)


def test_the_text_side_learns_and_every_client_gets_an_adapter_of_its_own(calm: Outcome) -> None:
    assert [record.bank_version for record in calm.records] == [2, 3]
    embeddings = [calm.store.models.bank(version).embeddings for version in (1, 2, 3)]
    assert not any(np.array_equal(one, other) for one, other in itertools.combinations(embeddings, 2))
    for number, record in enumerate(calm.records, start=1):
        assert record.text is not None
        assert record.text.loss_after < record.text.loss_before
        assert record.own == ["one", "two"]
        assert record.attention is not None
        assert np.sum(record.attention.weights, axis=1) == pytest.approx(1.0)
        assert record.class_accuracy.keys() == set(CLASSES)
        adapters = [calm.store.models.adapter(number), *(calm.store.models.own(number, client) for client in ("one", "two"))]
        assert len({encode_adapter(adapter) for adapter in adapters}) == 3
    assert len(state_of(calm.store)) == 3 + 3 + 2 + 4  # global adapters, banks, text adapters, own adapters


def test_a_round_starts_each_client_from_its_own_adapter_and_the_trained_bank(calm: Outcome, homes: list[Path]) -> None:
    """Round 2 again, by hand: what each device makes of its own adapter of round 1, averaged, is the global adapter."""
    results = []
    for name, home in zip(("one", "two"), homes, strict=True):
        trainer, _, _ = new_client(client_config(name, home), PROFILE)
        own = calm.store.models.own(1, name)
        results.append(trainer.run(PlanReady(a_plan(2), calm.store.models.bank(2), own, "0" * 64), lambda: False))
    adapters = [decode_update(encode_update(result.update)).adapter for result in results]
    mean = mean_of_factors(adapters, [result.samples for result in results])
    assert encode_adapter(mean) == encode_adapter(calm.store.models.adapter(2))
    assert calm.records[1].loss == sum(r.loss * r.samples for r in results) / 36


def test_from_adapter_to_answers(calm: Outcome, homes: list[Path], tmp_path: Path) -> None:
    bank = calm.store.models.bank(calm.records[-1].bank_version)
    adapter = calm.store.models.adapter(2)
    files = sorted(homes[0].rglob("*.png"))[:6]
    out = tmp_path / "model.onnx"
    parity = export_artefact(
        Source(bank, adapter, RECIPE.training(DEPTH), "flow", 2), Proof([Image.open(f) for f in files]), 4, out
    )
    assert parity.cosine_min >= 0.999
    answer = Answering(Model.open(out)).classify(read_picture(files[0]), top=4)
    assert set(answer.labels) == set(CLASSES)
    assert sum(answer.probabilities) == pytest.approx(1.0, abs=1e-4)


def test_the_rounds_so_far_are_shown_also_of_a_federation_that_is_at_work(calm: Outcome, tmp_path: Path) -> None:
    settings = tmp_path / "coordinator.toml"
    settings.write_text(f"federation = 'flow'\nclasses = {list(CLASSES)}\nstate = '{calm.store.folder}'\n")
    command = [sys.executable, "-m", "clipcast", "coordinator", "rounds", str(settings)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split(",")[0] for line in lines] == ["round 1: aggregated", "round 2: aggregated"]
    assert calm.records[1].adapter_sha256[:12] in lines[1]
    printed = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert [RoundRecord.model_validate_json(line) for line in printed] == calm.records
    settings.write_text(f"federation = 'flow'\nclasses = {list(CLASSES)}\nstate = '{tmp_path / 'none'}'\n")
    nothing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert nothing.startswith("no round yet in ")
    assert not (tmp_path / "none").exists()


def check_same(store: Store, calm: Outcome) -> None:
    """The state is bit for bit the calm run's, and its records say the same but for what was measured."""
    assert [record.model_dump(exclude=MEASURED) for record in store.records()] == [
        record.model_dump(exclude=MEASURED) for record in calm.records
    ]
    state, expected = state_of(store), state_of(calm.store)
    assert state.keys() == expected.keys()
    assert [name for name in expected if state[name] != expected[name]] == []


def test_the_embedded_broker_gives_the_same_bits(calm: Outcome, homes: list[Path], embedded: str, tmp_path: Path) -> None:
    check_same(federate(over(embedded), homes, tmp_path / "state").store, calm)


def test_sealed_updates_give_the_same_bits(calm: Outcome, homes: list[Path], tmp_path: Path) -> None:
    check_same(federate(in_memory(), homes, tmp_path / "state", seal_updates=True).store, calm)


@pytest.mark.parametrize("limits", [(), ("max_packet_size 2000000",), ("max_packet_size 3000",)])
def test_mosquitto_gives_the_same_bits(
    calm: Outcome, homes: list[Path], mosquitto: Callable[..., str], limits: tuple[str, ...], tmp_path: Path
) -> None:
    check_same(federate(over(mosquitto(*limits)), homes, tmp_path / "state").store, calm)


def test_a_restarted_coordinator_continues_after_the_last_round(calm: Outcome, homes: list[Path], tmp_path: Path) -> None:
    state = tmp_path / "state"
    for name, data in calm.after[0].items():
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).write_bytes(data)
    outcome = federate(in_memory(), homes, state)
    assert [record.round for record in outcome.records] == [2]
    check_same(outcome.store, calm)
    run = outcome.store.run()
    assert run is not None
    assert run.starts == 2


def test_a_coordinator_killed_in_a_round_gets_the_same_round_again(
    calm: Outcome, homes: list[Path], embedded: str, tmp_path: Path
) -> None:
    """The first client's update is accepted, then the coordinator dies: restarted, it ends with the calm run's bits."""
    settings = tmp_path / "coordinator.toml"
    settings.write_text(
        f"federation = 'flow'\nclasses = {list(CLASSES)}\nrounds = 2\nseed = 7\n"
        f"recipe = {{ local_steps = 3, batch_size = 8, features_per_class = 2, min_prototype_count = 1, "
        f"text = {{ steps = 3, aligning_round = false }}, personal = {{ start = 'own', closing_steps = 0 }} }}\n"
        f"[broker]\nurl = '{embedded}'\n"
    )
    assert load_config(settings).recipe == RECIPE
    command = [sys.executable, "-m", "clipcast", "coordinator", "run", str(settings)]
    stop, connect = threading.Event(), over(embedded)
    watch = Link(connect("watch", None), Observer("flow"))
    idle_end = ClientEnd("flow", "two", random.Random(0), tmp_path / "two")
    idle = Link(connect("idle", None), idle_end)
    idle.poll(0.5)
    idle.do(idle_end.announce(Status(state="online")))
    threads = [threading.Thread(target=take_part, args=(connect, "one", homes[0], stop))]
    threads[0].start()
    try:
        with subprocess.Popen(command) as first:
            try:
                wait_for(watch, lambda seen: seen.client == "one" and "accepted" in seen.status.detail)
            finally:
                first.kill()
        opened = Store(tmp_path / "state").opened()
        assert opened is not None
        assert list(opened.accepted) == ["one"]
        shown = subprocess.run([*command[:-2], "rounds", str(settings)], check=True, capture_output=True, text=True).stdout
        assert shown == "round 1: open, 1 accepted, 0 rejected, no update yet of two\n"
        idle.bus.close()
        threads.append(threading.Thread(target=take_part, args=(connect, "two", homes[1], stop, PROFILE, tmp_path / "two")))
        threads[1].start()
        subprocess.run(command, check=True, timeout=120)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
        watch.bus.close()
    check_same(Store(tmp_path / "state"), calm)


def wait_for(link: Link[ClientSeen], wanted: Callable[[ClientSeen], bool], detail: str = "") -> None:
    deadline = time.monotonic() + 120
    while not any(wanted(seen) and detail in seen.status.detail for seen in link.poll(1.0)):
        assert time.monotonic() < deadline, "waited 120 s"


def uploads_on(bus: Bus) -> list[tuple[str, int, Update]]:
    """What went over a bus that listened to the clients: who offered which update, in which round."""
    offers: dict[tuple[str, str, int], None] = {}
    chunks: dict[tuple[str, str], dict[int, bytes]] = {}
    while (event := bus.receive(0.0)) is not None:
        if not isinstance(event, Delivery):
            continue
        address = parse(event.topic)
        client = str(address.client)
        if address.kind == "offer":
            offer = expect(decode(opened(event.payload, signer_of(event.payload))), Offer)
            offers[client, offer.blob.sha256, offer.round] = None
        elif address.kind == "blob":
            chunks.setdefault((client, str(address.sha256)), {})[int(address.index or 0)] = event.payload
    return [
        (client, number, decode_update(b"".join(data for _, data in sorted(chunks[client, digest].items()))))
        for client, digest, number in offers
    ]


def test_the_aligning_and_the_closing_round_follow_the_last(homes: list[Path], tmp_path: Path) -> None:
    """The aligning round moves the class bank alone, the closing one the clients' own adapters alone."""
    recipe = {**GIVEN, "text": {"steps": 3}, "personal": {"closing_steps": 2}}
    outcome = federate(in_memory(), homes, tmp_path / "state", rounds=1, recipe=recipe)
    training, aligning, closing = outcome.records
    assert training.adapter_sha256 == aligning.adapter_sha256 == closing.adapter_sha256
    assert [record.bank_version for record in outcome.records] == [2, 3, 3]
    assert [record.text is not None for record in outcome.records] == [True, True, False]
    assert [record.own for record in outcome.records] == [["one", "two"], [], ["one", "two"]]
    store = outcome.store
    for name, home in zip(("one", "two"), homes, strict=True):
        trainer, _, _ = new_client(client_config(name, home), PROFILE)
        start = store.models.own(1, name)
        how = RECIPE.training(DEPTH).model_copy(update={"local_steps": 2, "features_per_class": 0})
        plan = a_plan(3).model_copy(update={"recipe": how})
        update = trainer.run(PlanReady(plan, store.models.bank(3), start, "0" * 64), lambda: False).update
        assert encode_adapter(decode_update(encode_update(update)).adapter) == encode_adapter(store.models.own(3, name))


def test_devices_of_different_ranks_learn_together_by_the_mean_of_products(homes: list[Path], tmp_path: Path) -> None:
    broker = MemoryBroker()
    watch = broker.connect()
    for topic_filter in Topics("flow").coordinator_filters():
        watch.do(Subscribe(topic_filter))
    recipe = {"rank": 8, "alpha": 16.0, "aggregation": "mean_of_products"}
    outcome = federate(
        lambda _name, will: broker.connect(will),
        homes,
        tmp_path / "state",
        (NARROW, PROFILE),
        recipe={**RECIPE.model_dump(), **recipe},
    )
    assert [(record.accepted, record.rejected) for record in outcome.records] == [(["one", "two"], [])] * 2
    uploads = uploads_on(watch)
    assert sorted((client, number, rank_of(update.adapter)) for client, number, update in uploads) == [
        ("one", 1, 2),
        ("one", 2, 2),
        ("two", 1, 8),
        ("two", 2, 8),
    ]
    known = outcome.store.models.knowledge()
    assert known is not None
    assert rank_of(known.adapter) == 8
    for number in (1, 2):
        for client, rank in (("one", 2), ("two", 8)):
            assert rank_of(outcome.store.models.own(number, client)) == rank
        sent = {client: update.adapter for client, sent_in, update in uploads if sent_in == number}
        mean = mean_of_products([sent["one"], sent["two"]], [24, 12], 8)
        assert encode_adapter(mean) == encode_adapter(outcome.store.models.adapter(number))


def test_a_narrow_device_trains_at_the_same_scale(homes: list[Path]) -> None:
    """Alpha over rank is the federation's: the same B A is the same model, at rank 2 or padded to rank 8 with nothing."""
    plan = a_plan(1)
    wide = plan.recipe.model_copy(update={"rank": 8, "alpha": 16.0, "local_steps": 0})
    shapes = adapter_shapes(load_sizes("tiny-clip"), "vision", wide.at_rank(2))
    rng = np.random.default_rng(0)
    narrow = {name: rng.normal(0.0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    bank = make_bank("tiny-clip", CLASSES, ("a photo of a {}",))
    trainer, _, _ = new_client(client_config("one", homes[0]), PROFILE)
    updates = [
        trainer.run(PlanReady(plan.model_copy(update={"recipe": wide}), bank, start, "0" * 64), lambda: False).update
        for start in (narrow, at_rank(narrow, 8), at_rank(narrow, 1))
    ]
    assert [rank_of(update.adapter) for update in updates] == [2, 8, 1]
    np.testing.assert_allclose(updates[0].prototypes, updates[1].prototypes, atol=1e-4)
    assert np.abs(updates[0].prototypes - updates[2].prototypes).max() > 0.01


def test_a_device_whose_rank_is_too_small_for_the_mean_of_factors_ends_and_says_why(
    homes: list[Path], tmp_path: Path
) -> None:
    """The other client begins only when this one has ended: the round counts on both, one is the quorum."""
    connect = in_memory()
    watch = Link(connect("watch", None), Observer("flow"))
    watch.poll(0.0)  # connected: from now on it listens
    idle_end = ClientEnd("flow", "two", random.Random(0), tmp_path / "two")
    idle = Link(connect("idle", None), idle_end)
    idle.do(idle_end.announce(Status(state="online")))
    stop = threading.Event()
    recipe = {**RECIPE.model_dump(), "rank": 8, "aggregation": "mean_of_factors"}
    with ThreadPoolExecutor(2) as pool:
        federation = pool.submit(coordinate, connect, tmp_path / "state", rounds=1, quorum=1, recipe=recipe)
        try:
            sentence = r"trains rank 8, this device's profile allows 2: lower rank .* or name another profile"
            with pytest.raises(UnfitPlanError, match=sentence) as caught:
                take_part(connect, "one", homes[0], stop, NARROW)
            wait_for(watch, lambda seen: (seen.client, seen.status.phase) == ("one", "failed"), str(caught.value))
            stop.clear()
            idle.bus.close()
            other = pool.submit(take_part, connect, "two", homes[1], stop, PROFILE, tmp_path / "two")
            outcome = federation.result(60)
        finally:
            stop.set()
        assert other.exception(30) is None
    assert [(record.accepted, record.silent) for record in outcome.records] == [(["two"], ["one"])]


def test_a_device_that_stays_away_does_not_stop_the_others(homes: list[Path], tmp_path: Path) -> None:
    outcome = federate(in_memory(), homes[:1], tmp_path / "state", rounds=1, quorum=1, deadline_s=10)
    assert [record.accepted for record in outcome.records] == [["one"]]


def test_a_client_killed_before_its_receipt_offers_the_same_update_again_and_trains_nothing(
    homes: list[Path], embedded: str, tmp_path: Path
) -> None:
    """Nobody answers the first time: it is killed with its update in the outbox. Restarted, now with other pictures, it has
    the same update accepted.
    """
    pictures = tmp_path / "pictures"
    shutil.copytree(homes[0], pictures)
    settings = tmp_path / "one.toml"
    settings.write_text(
        f"id = 'one'\nfederation = 'flow'\ndata = '{pictures}'\nbits = 4\nthreads = 1\nprofile = 'generic-cpu'\n"
        f"[broker]\nurl = '{embedded}'\n"
    )
    connect = over(embedded)
    end = CoordinatorEnd("flow", random.Random(0))
    link = Link(connect("coordinator", None), end)
    link.poll(1.0)
    bank, actions = end.publish_bank(make_bank("tiny-clip", CLASSES, ("a photo of a {}",)))
    training = RECIPE.training(DEPTH)
    start = end.serve_adapter(initial_adapter(adapter_shapes(load_sizes("tiny-clip"), "vision", training), 0))
    plan = a_plan(1).model_copy(update={"classes": bank.sha256, "adapter": start, "participants": ("one",)})
    link.do([*actions, *end.publish_plan(plan)])
    command = [sys.executable, "-m", "clipcast", "client", "run", str(settings)]

    def next_event(kind: type[Kind]) -> Kind:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for event in link.poll(1.0):
                if isinstance(event, kind):
                    return event
        raise AssertionError(f"waited 120 s for {kind.__name__}")

    try:
        with subprocess.Popen(command) as first:
            try:
                offered = next_event(OfferMade)
            finally:
                first.kill()
        shutil.rmtree(pictures)
        shutil.copytree(homes[1], pictures)
        with subprocess.Popen(command) as second:
            try:
                again = next_event(OfferMade)
                end.fetch(again.client, again.offer)
                arrived = next_event(UpdateArrived)
                link.do(end.answer("one", arrived.offer, Verdict(accepted=True)))
                deadline = time.monotonic() + 60
                while not any(isinstance(e, ClientSeen) and "accepted" in e.status.detail for e in link.poll(1.0)):
                    assert time.monotonic() < deadline
                assert second.poll() is None
            finally:
                second.kill()
    finally:
        link.bus.close()
    assert again.offer.blob == offered.offer.blob == arrived.offer.blob
    assert (again.offer.round, again.offer.loss) == (offered.offer.round, offered.offer.loss)


def test_a_device_that_is_revoked_is_cut_off_and_its_round_ends(embedded: str, tmp_path: Path) -> None:
    """Only the revocation can end the round here: both are needed, neither trains, and the deadline is far."""
    settings = tmp_path / "coordinator.toml"
    settings.write_text(
        f"federation = 'flow'\nclasses = {list(CLASSES)}\nrounds = 1\ndeadline_s = 3600\nadmission = 'registered'\n"
        f"[broker]\nurl = '{embedded}'\n"
    )
    connect = over(embedded)
    ends = {name: ClientEnd("flow", name, random.Random(0), tmp_path / name) for name in ("one", "two", "eve")}
    links = {name: Link(connect(name, end.will()), end) for name, end in ends.items()}

    def command(*arguments: str) -> str:
        run = subprocess.run([sys.executable, "-m", "clipcast", *arguments], check=True, capture_output=True, text=True)
        return run.stdout

    for name in ("one", "two"):
        key = Signer.open(tmp_path / name).public
        assert key in command("device", "add", name, key, "--coordinator", str(settings))
    for name, link in links.items():
        link.poll(0.5)
        link.do(ends[name].announce(Status(state="online")))
    process = subprocess.Popen(
        [sys.executable, "-m", "clipcast", "coordinator", "run", str(settings)], stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not any(isinstance(event, PlanReady) for event in links["two"].poll(1.0)):
            assert time.monotonic() < deadline, "waited 120 s for the plan"
        assert "two is cut off" in command("device", "revoke", "two", "--coordinator", str(settings))
        assert " revoked" in command("device", "list", "--coordinator", str(settings)).splitlines()[1]
        while "round 1: quorum-missed" not in command("coordinator", "rounds", str(settings)):
            assert time.monotonic() < deadline, "waited 120 s for the round's end"
            assert process.poll() is None
    finally:
        process.terminate()
        _, log = process.communicate(timeout=60)
        for link in links.values():
            link.bus.close()
    assert "device two was revoked" in log
    assert "eve is not registered" in log


class Slow:
    """A trainer that holds each round's result back until it may go."""

    def __init__(self, trainer: Trainer, may_go: Mapping[int, threading.Event]) -> None:
        self._trainer = trainer
        self._may_go = may_go

    def run(self, ready: PlanReady, stopped: Callable[[], bool]) -> TrainingResult:
        result = self._trainer.run(ready, stopped)
        while not self._may_go[ready.plan.round].wait(0.01):
            if stopped():
                raise TrainingStopped
        return result


def test_an_update_of_the_last_round_counts_in_the_next_at_a_discount(homes: list[Path], tmp_path: Path) -> None:
    """Round 1 is over before `two` has trained; its update comes in round 2, which ends when `one` has trained."""
    two_waits, one_waits, never = threading.Event(), threading.Event(), threading.Event()
    at_once = threading.Event()
    at_once.set()
    gates = {"one": {1: at_once, 2: one_waits}, "two": {1: two_waits, 2: never}}
    broker, stop = MemoryBroker(), threading.Event()
    recipe = {**GIVEN, "late_rounds": 1, "late_discount": 0.25, "personal": {"start": "global", "closing_steps": 0}}
    config = CoordinatorConfig.model_validate(
        {"federation": "flow", "classes": CLASSES, "rounds": 2, "quorum": 1, "seed": 7, "recipe": recipe, "state": tmp_path}
    )

    def client(name: str, home: Path) -> None:
        trainer, part, status = new_client(client_config(name, home), PROFILE)
        end = ClientEnd("flow", name, random.Random(name))
        end.announce(status)
        slow = cast("Trainer", Slow(trainer, gates[name]))
        participate(Link(broker.connect(end.will()), end), end, slow, part, stop)

    threads = [threading.Thread(target=client, args=pair) for pair in zip(("one", "two"), homes, strict=True)]
    bus, end = broker.connect(), CoordinatorEnd("flow", random.Random(0))
    watch = Link(broker.connect(), Observer("flow"))
    seen = threading.Thread(
        target=lambda: (wait_for(watch, lambda s: s.client == "two" and s.status.round == 1, "accepted"), one_waits.set())
    )
    for thread in (*threads, seen):
        thread.start()
    store = Store(tmp_path)
    kept: dict[tuple[str, int], tuple[Offer, Update]] = {}

    def keep(answer: Answer, blob: bytes, counts_in: int) -> None:
        kept[answer.client, answer.offer.round] = (answer.offer, decode_update(blob))
        Store.keep(store, answer, blob, counts_in)

    store.keep = keep  # type: ignore[method-assign, assignment]
    try:
        records = []
        for record in Federation(
            config, make_bank("tiny-clip", CLASSES, config.templates), Link(bus, end), end, store
        ).run():
            records.append(record)
            two_waits.set()
    finally:
        stop.set()
        store.close()
        for thread in (*threads, seen):
            thread.join(60)
    assert [(record.accepted, record.late) for record in records] == [(["one"], {}), (["one"], {"two": 1})]
    updates = [kept["one", 2], kept["two", 1]]
    mean = mean_of_factors([update.adapter for _, update in updates], [updates[0][0].samples, 0.25 * updates[1][0].samples])
    assert encode_adapter(store.models.adapter(2)) == encode_adapter(mean)


class Idle:
    """A trainer that takes its time: until it is asked to stop."""

    def run(self, _ready: PlanReady, stopped: Callable[[], bool]) -> TrainingResult:
        while not stopped():
            time.sleep(0.01)
        raise TrainingStopped


def test_two_devices_with_one_identity_are_both_told_and_shut_out(mosquitto: Callable[..., str], tmp_path: Path) -> None:
    """A state folder was copied: the two take the link from each other, and each speaks as the other. The round ends."""
    settings, url = tmp_path / "coordinator.toml", mosquitto()
    settings.write_text(
        f"federation = 'flow'\nclasses = {list(CLASSES)}\nrounds = 2\ndeadline_s = 3600\n[broker]\nurl = '{url}'\n"
    )
    Signer.open(tmp_path / "two").public  # noqa: B018 - makes the key
    shutil.copytree(tmp_path / "two", tmp_path / "copy")
    command = [sys.executable, "-m", "clipcast"]
    stops = {folder: threading.Event() for folder in ("two", "copy")}

    def take_part_idly(folder: str) -> BaseException | None:
        end = ClientEnd("flow", "two", random.Random(folder), tmp_path / folder)
        end.announce(status := Status(state="online"))
        link = Link(over(url)("two", end.will()), end)
        try:
            participate(link, end, cast("Trainer", Idle()), Participation(status), stops[folder])
        except ShutOutError as error:
            return error
        return None

    one_end = ClientEnd("flow", "one", random.Random(0), tmp_path / "one")
    one = Link(over(url)("one", one_end.will()), one_end)
    one.do(one_end.announce(Status(state="online")))
    pool = ThreadPoolExecutor(2)
    process = subprocess.Popen([*command, "coordinator", "run", str(settings)], stderr=subprocess.PIPE, text=True)
    try:
        clones = [pool.submit(take_part_idly, folder) for folder in stops]
        deadline = time.monotonic() + 120
        while not all(clone.done() for clone in clones):
            assert time.monotonic() < deadline, "waited 120 s for both to be told"
            one.poll(0.1)
        assert all("two devices" in str(clone.result()) for clone in clones)
        listed = subprocess.run(
            [*command, "device", "list", "--coordinator", str(settings)], check=True, capture_output=True, text=True
        ).stdout
        assert [line.split()[::2] for line in listed.splitlines()] == [["one", "active"], ["two", "quarantined"]]
        rounds = [*command, "coordinator", "rounds", str(settings)]
        while "quorum-missed" not in subprocess.run(rounds, check=True, capture_output=True, text=True).stdout:
            assert time.monotonic() < deadline, "waited for the end of a round that can have no quorum"
    finally:
        for stop in stops.values():
            stop.set()
        process.terminate()
        _, log = process.communicate(timeout=60)
        pool.shutdown()
        one.bus.close()
    assert "two devices speak as two with one key" in log, log


def test_a_client_follows_no_other_coordinator_than_its_own(tmp_path: Path) -> None:
    """A second coordinator takes over the topics, with a key of its own: the client stays with the first one's plan."""
    broker = MemoryBroker()
    bank = make_bank("tiny-clip", CLASSES, ("a photo of a {}",))
    client = ClientEnd("flow", "one", random.Random(0), tmp_path, Pinned(tmp_path / "coordinator.key"))
    link = Link(broker.connect(), client)
    training = RECIPE.training(DEPTH)
    adapter = initial_adapter(adapter_shapes(load_sizes("tiny-clip"), "vision", training), 0)

    def plan_by(coordinator: CoordinatorEnd, number: int) -> None:
        other = Link(broker.connect(), coordinator)
        other.poll(0.0)
        ref, actions = coordinator.publish_bank(bank)
        plan = a_plan(number).model_copy(update={"classes": ref.sha256, "adapter": coordinator.serve_adapter(adapter)})
        other.do([*actions, *coordinator.publish_plan(plan)])
        for _ in range(20):
            other.poll(0.05)
            seen.extend(link.poll(0.05))

    seen: list[object] = []
    own, rogue = CoordinatorEnd("flow", random.Random(1), state=tmp_path / "own"), CoordinatorEnd("flow", random.Random(2))
    plan_by(own, 1)
    plan_by(rogue, 2)
    assert [event.plan.round for event in seen if isinstance(event, PlanReady)] == [1]
    assert client.gate.counts["wrong-key"] > 0
    plan_by(CoordinatorEnd("flow", random.Random(3), state=tmp_path / "own"), 3)  # the own one, restarted
    assert [event.plan.round for event in seen if isinstance(event, PlanReady)] == [1, 3]


def test_an_update_that_finds_no_room_gets_no_receipt_and_comes_again(
    calm: Outcome, homes: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, refused = Store.keep, []

    def full_at_first(store: Store, answer: Answer, blob: bytes | None, counts_in: int) -> None:
        if len(refused) < 3:
            refused.append(answer.client)
            raise FederationError("no room")
        keep(store, answer, blob, counts_in)

    monkeypatch.setattr(Store, "keep", full_at_first)
    check_same(federate(in_memory(), homes, tmp_path / "state").store, calm)
    assert len(refused) == 3


def test_links_that_are_cut_at_any_byte_give_the_same_bits(
    calm: Outcome,
    homes: list[Path],
    mosquitto: Callable[..., str],
    fault_proxy: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Every connection, the coordinator's too, is cut after 2 to 120 KB; an update has more than 70. Then the links heal."""
    url = mosquitto()
    proxy = fault_proxy(urlsplit(url).port, seed=1, cut_after=(2_000, 120_000))
    timer = threading.Timer(30.0, proxy.heal)
    timer.start()
    try:
        outcome = federate(over(f"mqtt://127.0.0.1:{proxy.port}"), homes, tmp_path / "state", deadline_s=600)
    finally:
        timer.cancel()
    check_same(outcome.store, calm)
    assert proxy.cuts > 5


def test_a_broker_that_is_killed_again_and_again_loses_no_update(
    calm: Outcome, homes: list[Path], mosquitto: Callable[..., Any], tmp_path: Path
) -> None:
    """It keeps nothing, and dies a second after it is back."""
    url = mosquitto()
    port, done, kills = urlsplit(url).port, threading.Event(), []

    def kill() -> None:
        broker = mosquitto.last  # type: ignore[attr-defined]
        while not done.wait(0.8) and len(kills) < 8:
            broker.kill()
            broker.wait()
            mosquitto(port=port)
            broker = mosquitto.last  # type: ignore[attr-defined]
            kills.append(1)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        outcome = federate(over(url), homes, tmp_path / "state", deadline_s=600)
    finally:
        done.set()
        killer.join(30)
    check_same(outcome.store, calm)
    assert len(kills) > 1
