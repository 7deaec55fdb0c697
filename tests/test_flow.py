"""The whole way: text -> embeddings -> bus -> quantised training -> upload -> aggregation -> broadcast -> ONNX -> answers.

Once in memory, once over the embedded broker, twice over a real Mosquitto; all four must end in the same bits.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coordinator.config import CoordinatorConfig
from coordinator.rounds import Federation
from coordinator.store import RoundRecord, Store
from coordinator.text_bank import make_bank
from edge_client.config import ClientConfig
from edge_client.data import find_pictures
from edge_client.device import new_client
from edge_client.infer import Classifier
from edge_client.participate import participate
from export.artefact import Source, export_artefact
from hardware_profiles.profile import load as load_profile
from protocol.bus import Bus, MemoryBroker, Publish
from protocol.client_end import ClientEnd
from protocol.codec import decode_adapter
from protocol.coordinator_end import CoordinatorEnd
from protocol.events import ClientSeen
from protocol.link import Link
from protocol.messages import Recipe, Status
from protocol.mqtt import MqttBus
from protocol.observer import Observer
from protocol.settings import BrokerSettings

CLASSES = ("zero", "one", "two", "three")
RECIPE = Recipe(local_steps=3, batch_size=8, features_per_class=2)
Connect = Callable[[str, Publish | None], Bus]


@dataclass(frozen=True)
class Outcome:
    records: list[RoundRecord]
    store: Store


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
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


def take_part(connect: Connect, name: str, home: Path, stop: threading.Event) -> None:
    """Run one client as it would run alone, until `stop`."""
    settings = ClientConfig(id=name, federation="flow", data=str(home), bits=4, threads=1)
    trainer, part, status = new_client(settings, load_profile("generic-cpu"))
    end = ClientEnd("flow", name, random.Random(name))
    end.announce(status)
    participate(Link(connect(name, end.will()), end), end, trainer, part, stop)


def federate(connect: Connect, homes: list[Path], state: Path, **settings: object) -> Outcome:
    """Run a coordinator and two clients, each as it would run alone, on the given bus."""
    fields = {"federation": "flow", "classes": CLASSES, "rounds": 2, "deadline_s": 60, "seed": 7, "recipe": RECIPE}
    config = CoordinatorConfig.model_validate({**fields, "state": state, **settings})
    stop, threads, failures = threading.Event(), [], []

    def client(name: str, home: Path) -> None:
        try:
            take_part(connect, name, home, stop)
        except Exception as error:
            failures.append(error)
            raise

    for name, home in zip(("one", "two"), homes, strict=False):
        threads.append(threading.Thread(target=client, args=(name, home), name=name))
        threads[-1].start()
    bus = connect("coordinator", None)
    try:
        end = CoordinatorEnd("flow", random.Random(0))
        bank = make_bank(config.model, config.classes, config.templates)
        store = Store(state)
        records = list(Federation(config, bank, Link(bus, end), end, store).run())
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
        bus.close()
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
    return Outcome(records, store)


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
    first, second = (decode_adapter(calm.store.adapter_path(n).read_bytes()) for n in (1, 2))
    assert first.keys() == second.keys()
    assert any(not np.array_equal(first[name], second[name]) for name in first)


def test_from_adapter_to_answers(calm: Outcome, homes: list[Path], tmp_path: Path) -> None:
    bank = make_bank("tiny-clip", CLASSES, ("a photo of a {}",))
    adapter = decode_adapter(calm.store.adapter_path(2).read_bytes())
    files = sorted(homes[0].rglob("*.png"))[:6]
    out = tmp_path / "model.onnx"
    parity = export_artefact(Source(bank, adapter, RECIPE, "flow", 2), [Image.open(f) for f in files], 4, out)
    assert parity.cosine_min >= 0.999
    answer = Classifier(out).classify(files[0], top=4)
    assert set(answer.labels) == set(CLASSES)
    assert sum(answer.probabilities) == pytest.approx(1.0, abs=1e-4)


def check_same(outcome: Outcome, calm: Outcome) -> None:
    assert [r.adapter_sha256 for r in outcome.records] == [r.adapter_sha256 for r in calm.records]
    assert [r.accepted for r in outcome.records] == [r.accepted for r in calm.records]


def test_the_embedded_broker_gives_the_same_bits(calm: Outcome, homes: list[Path], embedded: str, tmp_path: Path) -> None:
    check_same(federate(over(embedded), homes, tmp_path / "state"), calm)


@pytest.mark.parametrize("limits", [(), ("max_packet_size 2000000",), ("max_packet_size 3000",)])
def test_mosquitto_gives_the_same_bits(
    calm: Outcome, homes: list[Path], mosquitto: Callable[..., str], limits: tuple[str, ...], tmp_path: Path
) -> None:
    check_same(federate(over(mosquitto(*limits)), homes, tmp_path / "state"), calm)


def test_a_restarted_coordinator_continues_after_the_last_round(calm: Outcome, homes: list[Path], tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    for name in ("bank.safetensors", "adapter-0000.safetensors", "adapter-0001.safetensors"):
        (state / name).write_bytes((calm.store.folder / name).read_bytes())
    (state / "rounds.jsonl").write_text(calm.records[0].model_dump_json() + "\n")
    outcome = federate(in_memory(), homes, state)
    assert [record.round for record in outcome.records] == [2]
    assert outcome.records[0].adapter_sha256 == calm.records[1].adapter_sha256


def test_a_coordinator_killed_in_a_round_gets_the_same_round_again(
    calm: Outcome, homes: list[Path], embedded: str, tmp_path: Path
) -> None:
    """The first client's update is accepted, then the coordinator dies: restarted, it ends with the calm run's bits."""
    settings = tmp_path / "coordinator.toml"
    recipe = "\n".join(f"{key} = {value}" for key, value in RECIPE.model_dump(mode="json").items())
    settings.write_text(
        f"federation = 'flow'\nclasses = {list(CLASSES)}\nrounds = 2\nseed = 7\n"
        f"[recipe]\n{recipe}\n[broker]\nurl = '{embedded}'\n"
    )
    command = [sys.executable, "-m", "clipcast", "coordinator", "run", str(settings)]
    stop, connect = threading.Event(), over(embedded)
    watch = Link(connect("watch", None), Observer("flow"))
    idle_end = ClientEnd("flow", "two", random.Random(0))
    idle = Link(connect("idle", None), idle_end)
    idle.poll(0.5)
    idle.do(idle_end.announce(Status(state="online")))
    threads = [threading.Thread(target=take_part, args=(connect, "one", homes[0], stop))]
    threads[0].start()
    try:
        with subprocess.Popen(command) as first:
            wait_for(watch, lambda seen: seen.client == "one" and "accepted" in seen.status.detail)
            first.kill()
        assert not (tmp_path / "state" / "rounds.jsonl").exists()
        idle.bus.close()
        threads.append(threading.Thread(target=take_part, args=(connect, "two", homes[1], stop)))
        threads[1].start()
        subprocess.run(command, check=True, timeout=120)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
        watch.bus.close()
    records = Store(tmp_path / "state").records()
    assert [record.adapter_sha256 for record in records] == [record.adapter_sha256 for record in calm.records]


def wait_for(link: Link[ClientSeen], wanted: Callable[[ClientSeen], bool]) -> None:
    deadline = time.monotonic() + 60
    while not any(wanted(seen) for seen in link.poll(1.0)):
        assert time.monotonic() < deadline, "waited 60 s"


def test_a_device_that_stays_away_does_not_stop_the_others(homes: list[Path], tmp_path: Path) -> None:
    outcome = federate(in_memory(), homes[:1], tmp_path / "state", rounds=1, quorum=1, deadline_s=10)
    assert [record.accepted for record in outcome.records] == [["one"]]
