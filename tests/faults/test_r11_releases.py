"""R11: kill -9 of a device's service at random moments of releases: it answers with the old or the new model, never neither.

A real Mosquitto, the coordinator's desk, and the real `clipcast serve --releases`, asked over HTTP. Releases come one after
the other, each another adapter or another whole artefact: a kill may hit fetching, staging, smoke test, switch or trial.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from clipcast.smoke import smoke_of
from coordinator.config import CoordinatorConfig
from coordinator.releases.blobs import ReleaseBlobs
from coordinator.releases.book import Entry
from coordinator.releases.desk import desk
from coordinator.releases.orders import Draft, Orders
from coordinator.state.store import Store
from edge_client.inference.model import Model
from edge_client.releases.slots import Slots
from export.artefact import export_artefacts
from export.flavours import Flavour
from export.metadata import Source
from export.parity import Proof
from protocol.release.desk_end import FOLDER
from protocol.release.manifests import Health
from protocol.release.rings import parse_rings
from protocol.settings import BrokerSettings
from tests.conftest import wait_until
from tests.edge_client.inference.serving import Serving, encoded, serving
from tests.export.making import RECIPE, bank_of, photographs, trained_adapter

CLASSES = ("pagoda", "flower", "car")
QUICK, FULL = 6, 50
PICTURE = load_sample_images().images[0][::8, ::8].copy()
HEALTH = Health(window_s=0.5, min_answers=0, min_agreement=0.0, max_latency_ratio=1000)


class Lab:
    """A coordinator that releases two artefacts and two adapters in turn, and what each version says to one picture."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.config = CoordinatorConfig(
            federation="lab", classes=CLASSES, state=folder / "state", broker=BrokerSettings(url=url)
        )
        self.store = Store(self.config.state)
        self.orders = Orders("lab", self.store.releases, ReleaseBlobs(self.config.state / FOLDER / "blobs"))
        self.models = list(self._models())
        self.turns = itertools.cycle(range(len(self.models)))
        self.says: dict[int, np.ndarray] = {}
        (folder / "client.toml").write_text(f'id = "one"\nfederation = "lab"\n[broker]\nurl = "{url}"\n')

    def _models(self) -> Iterator[tuple[Path, Path | None]]:
        wanted: tuple[Flavour, ...] = ("int8", "adapter")
        for seed in (1, 2):
            adapter = trained_adapter("tiny-clip", seed=seed, spread=0.01)
            source = Source(bank_of("tiny-clip", CLASSES), adapter, RECIPE, "lab", seed)
            files = {name: self.folder / f"{name}-{seed}.onnx" for name in wanted}
            list(export_artefacts(source, Proof(photographs()), 32, files))
        base = self.folder / "adapter-1.onnx"
        yield self.folder / "int8-1.onnx", None
        yield base, self.folder / "adapter-1.onnx_adapter"
        yield base, self.folder / "adapter-2.onnx_adapter"
        yield self.folder / "int8-2.onnx", None

    def release(self) -> int:
        """Announce the next release; what is under way is ended first."""
        newest = self.newest()
        if newest is not None and newest.rollout.under_way:
            self.orders.abort()
        artefact, adapter = self.models[next(self.turns)]
        (self.folder / "picture.png").write_bytes(encoded(PICTURE, "PNG"))
        draft = Draft(artefact, parse_rings("100%"), adapter, health=HEALTH)
        made = self.orders.make(draft, partial(smoke_of, picture=self.folder / "picture.png", classes=CLASSES))
        self.says[made.version] = Model.open(artefact, adapter=adapter).run(PICTURE[None]).probabilities[0]
        return made.version

    def newest(self) -> Entry | None:
        return self.store.releases.newest()

    def over(self) -> bool:
        newest = self.newest()
        return newest is None or not newest.rollout.under_way or newest.rollout.release.state != "open"

    @contextmanager
    def device(self) -> Iterator[Serving]:
        with serving(self.folder / "base.onnx", "--releases", str(self.folder / "client.toml")) as service:
            yield service

    def asked(self, service: Serving) -> int:
        """Ask, compare the answer with what its version says, and return the version."""
        status, told = service.form(encoded(PICTURE, "PNG"), top=3)
        assert status == 200, told
        (answer,) = told["answers"]
        shares = dict(zip(answer["labels"], answer["probabilities"], strict=True))
        np.testing.assert_allclose([shares[name] for name in CLASSES], self.says[answer["version"]], atol=2e-3)
        return int(answer["version"])

    def stage(self) -> str:
        """Return how far the device is, by its file."""
        return Slots(self.folder / "one-state" / "answers").load().stage


@pytest.fixture
def lab(folder: Path, mosquitto: Callable[..., str]) -> Iterator[Lab]:
    made = Lab(folder, mosquitto("max_queued_bytes 0"))
    (folder / "base.onnx").hardlink_to(made.models[0][0])
    made.says[0] = Model.open(folder / "base.onnx").run(PICTURE[None]).probabilities[0]
    with desk(made.config):
        yield made
    made.store.close()


@pytest.mark.slow
def test_a_service_killed_anywhere_answers_with_the_old_or_the_new_model(lab: Lab, full: bool, score: Callable) -> None:
    rng, kills = random.Random(11), FULL if full else QUICK
    hit: Counter[str] = Counter()
    neither = 0
    started = time.monotonic()
    running = 0
    for _ in range(kills):
        with lab.device() as service:
            before = lab.asked(service)
            neither += before not in {0, *lab.says} or before < running - len(lab.models)
            if lab.over():
                lab.release()
            allowed = {before, max(lab.says)}
            end = time.monotonic() + rng.uniform(0.0, 2.0)
            while time.monotonic() < end:
                running = lab.asked(service)
                went_back = running < before  # a trial that was cut off too often
                neither += running not in allowed and not went_back
            hit[lab.stage()] += 1
            service.process.kill()
            service.process.wait()
    with lab.device() as service:
        lab.asked(service)
        wait_until(lambda: not lab.says or (lab.asked(service) >= 0 and lab.over()), 60, "the end of what was under way")
        last = lab.release()
        wait_until(lambda: lab.asked(service) == last and lab.over(), 60, "the last release")
    print(json.dumps({"killed while": hit}))
    score("R11", "kill -9 of a service during releases", kills, "kills", f"{FULL if full else QUICK}", passed=True)
    score("R11", "answers of neither the old nor the new model", neither, "answers", "0", passed=neither == 0)
    score("R11", "time", round(time.monotonic() - started), "s", "", passed=True)
    assert len(hit) >= (3 if full else 1)
