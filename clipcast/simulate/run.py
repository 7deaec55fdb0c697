"""One simulated federation: a recipe on a seed, from the first broadcast to its figures."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_lora.preprocess import load_preprocessing
from clip_lora.towers import default_device, load_sizes
from clipcast.simulate.engine import Engine, LocalEngine, place
from clipcast.simulate.evaluate import Judge, own_accuracy
from clipcast.simulate.fleet import CoordinatorBus, Fleet
from clipcast.simulate.pool import Pool
from clipcast.simulate.settings import SimulateSettings
from coordinator.config import CoordinatorConfig
from coordinator.learning import Knowledge
from coordinator.recipe import FederationRecipe, parse_recipe
from coordinator.records import RoundRecord
from coordinator.rounds import Federation
from coordinator.state.store import Store
from coordinator.text_bank import make_bank
from edge_client.data import Dataset, Picture
from edge_client.encoders import Encoders
from edge_client.trainer import OpenPictures
from protocol.bus import MemoryBroker
from protocol.coordinator_end import CoordinatorEnd
from protocol.link import Link
from protocol.messages import Recipe, TextBank

FEDERATION = "simulation"
PATIENCE_S = 7 * 24 * 3600.0
SHARED_ENCODERS = 4
Row = dict[str, Any]


@dataclass
class Bench:
    """What all runs of a process share: pictures, models, test pictures."""

    settings: SimulateSettings
    pool: Pool
    encoders: Encoders
    judge: Judge
    bank: TextBank
    depth: int

    @classmethod
    def open(cls, settings: SimulateSettings) -> Bench:
        """Load everything once; raises DataError, ModelError or SettingsError."""
        pool = Pool.open(settings)
        bank = make_bank(settings.model, pool.classes, settings.templates)
        encoders, device = Encoders(SHARED_ENCODERS), default_device()
        test = Dataset(pool.test, pool.labels(pool.test), load_preprocessing(settings.model))
        judge = Judge(encoders, test, settings.model, settings.bits, device)
        depth = load_sizes(settings.model).vision.blocks
        return cls(settings, pool, encoders, judge, bank, depth)

    def engine(self, pictures: Mapping[str, OpenPictures]) -> Engine:
        """Return who trains the clients."""
        if self.settings.engine == "ray":
            from clipcast.simulate.ray_engine import RayEngine

            return RayEngine(pictures, self.settings.bits, self.settings.threads)
        return LocalEngine(pictures, place(self.settings.bits, self.judge.device), self.encoders)

    def run(self, text: str, seed: int) -> Iterator[str | Row]:
        """Run a recipe on a seed: yield its name after each round, and at the end one entry of results.json."""
        recipe = parse_recipe(text)
        names = [f"client-{number:04d}" for number in range(1, self.settings.clients + 1)]
        shares = self.pool.shares(self.settings.clients, self.settings.partition, self.settings.shots, seed)
        engine = self.engine({name: self.pool.opener(share) for name, share in zip(names, shares, strict=True)})
        with tempfile.TemporaryDirectory(prefix="clipcast-") as folder:
            store = Store(Path(folder))
            rounds: list[Row] = []
            try:
                for record in self._federate(recipe, seed, names, engine, store):
                    rounds.append(self._judge_round(record, recipe, store))
                    yield text
                known = store.models.knowledge()
                assert known is not None
                # While the folder is there: own adapters are read from it.
                row = self._row(text, seed, names, shares, rounds, known, recipe.training(self.depth))
            finally:
                engine.close()
                store.close()
        yield row

    def _federate(
        self, recipe: FederationRecipe, seed: int, names: Sequence[str], engine: Engine, store: Store
    ) -> Iterator[RoundRecord]:
        """Yield the rounds of a federation of the same coordinator and clients as over MQTT."""
        settings = self.settings
        config = CoordinatorConfig(
            federation=FEDERATION,
            classes=self.pool.classes,
            templates=settings.templates,
            model=settings.model,
            rounds=settings.rounds,
            clients_per_round=len(names),
            quorum=len(names),
            deadline_s=PATIENCE_S,
            seed=seed,
            state=store.folder,
            recipe=recipe,
        )
        broker = MemoryBroker()
        fleet = Fleet(broker, FEDERATION, names, engine, settings.bits)
        end = CoordinatorEnd(FEDERATION, random.Random(seed))
        link = Link(CoordinatorBus(broker.connect(), fleet), end, fleet.clock)
        yield from Federation(config, self.bank, link, end, store).run()

    def _judge_round(self, record: RoundRecord, recipe: FederationRecipe, store: Store) -> Row:
        known = store.models.knowledge()
        assert known is not None
        shares = self.judge.by_class(known, known.adapter, recipe.training(self.depth))
        count = max(len(record.accepted), 1)
        return {
            "round": record.round,
            "global_accuracy": self.judge.overall(shares),
            "class_accuracy": {name: _number(s) for name, s in zip(known.bank.classes, shares, strict=True)},
            "train_class_accuracy": record.class_accuracy,
            "loss": record.loss,
            "train_accuracy": record.train_accuracy,
            "epsilon": max(record.epsilon.values(), default=None),
            "text": record.text.model_dump() if record.text else None,
            "attention": record.attention.model_dump() if record.attention else None,
            "bytes_up": sum(record.bytes_up.values()) / count,
            "bytes_down": sum(record.bytes_down.values()) / count,
            "seconds": record.seconds,
        }

    def _row(
        self,
        text: str,
        seed: int,
        names: Sequence[str],
        shares: Sequence[Sequence[Picture]],
        rounds: Sequence[Row],
        known: Knowledge,
        training: Recipe,
    ) -> Row:
        """Judge the clients' models, and sum up."""
        clients = []
        for name, share in zip(names, shares, strict=True):
            by_class = self.judge.by_class(known, known.own.get(name, known.adapter), training)
            own = own_accuracy(by_class, self.pool.labels(share))
            clients.append({"client": name, "pictures": len(share), "own": own, "all": self.judge.overall(by_class)})
        return {
            "recipe": text,
            "seed": seed,
            "partition": self.settings.partition,
            "shots": self.settings.shots,
            "bits": self.settings.bits,
            "global_accuracy": rounds[-1]["global_accuracy"],
            "personal_accuracy": float(np.mean([c["own"] for c in clients])),
            "personal_all_classes": float(np.mean([c["all"] for c in clients])),
            "bytes_up": float(np.mean([r["bytes_up"] for r in rounds])),
            "bytes_down": float(np.mean([r["bytes_down"] for r in rounds])),
            "seconds": float(np.mean([r["seconds"] for r in rounds])),
            "clients": clients,
            "rounds": list(rounds),
        }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
