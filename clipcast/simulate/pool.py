"""The pictures of a simulation: what the clients train on, by seed and partition, and what models are judged on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clip_lora.preprocess import Preprocessing
from clipcast.partition import Indices, split
from clipcast.simulate.settings import SimulateSettings
from edge_client.data import DIGIT_NAMES, Dataset, Picture, find_pictures, readable_pictures
from protocol.settings import SettingsError

HELD_OUT_SHARE = 0.2
VALIDATION_SEED = 20_000


@dataclass(frozen=True)
class Pool:
    """Training pictures and the untouched ones; labels (N,) index `classes`."""

    classes: tuple[str, ...]
    train: tuple[Picture, ...]
    test: tuple[Picture, ...]

    @classmethod
    def open(cls, settings: SimulateSettings) -> Pool:
        """Read a folder with train/ and test/, any other folder, or `digits`; raises DataError or SettingsError.

        Without a test/ folder a seeded 20 % are held out. With the split `validation` 20 % of the training pictures take
        the test pictures' place: settings are chosen there, never on the test pictures.
        """
        folder = Path(settings.data)
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            train, test = _read(str(folder / "train")), _read(str(folder / "test"))
        else:
            train, test = _hold_out(_read(settings.data), 0)
        if settings.split == "validation":
            train, test = _hold_out(train, VALIDATION_SEED)
        known = {picture.label for picture in train}
        names = DIGIT_NAMES if settings.data == "digits" else sorted(known)
        if settings.test_pictures is not None:
            test = _balanced(test, settings.test_pictures)
        test = [picture for picture in test if picture.label in known]
        if not test:
            raise SettingsError(f"--data {settings.data}: no pictures are left to judge models on")
        return cls(tuple(name for name in names if name in known), tuple(train), tuple(test))

    def labels(self, pictures: Sequence[Picture]) -> NDArray[np.int32]:
        """Return the pictures' classes as indices, (N,)."""
        index = {name: position for position, name in enumerate(self.classes)}
        return np.array([index[picture.label] for picture in pictures], np.int32)

    def shares(self, clients: int, partition: str, shots: int | None, seed: int) -> list[list[Picture]]:
        """Return each client's pictures: `shots` of each class over all clients (None: all), split by the partition."""
        chosen = np.arange(len(self.train))
        labels = self.labels(self.train)
        if shots is not None:
            rng = np.random.default_rng([seed, shots])
            parts = [rng.permutation(np.flatnonzero(labels == c))[:shots] for c in range(len(self.classes))]
            chosen = np.sort(np.concatenate(parts))
        parts = split(labels[chosen], clients, partition, seed, [self.train[i].domain for i in chosen])
        return [[self.train[i] for i in chosen[part]] for part in parts]

    def opener(self, pictures: Sequence[Picture]) -> partial[Dataset]:
        """Return what opens these pictures as a client's dataset; it can travel to another process."""
        return partial(_dataset, tuple(pictures), self.labels(pictures))


def _dataset(
    pictures: tuple[Picture, ...], labels: NDArray[np.int32], classes: Sequence[str], preprocessing: Preprocessing
) -> Dataset:
    del classes  # the pool's own, in the same order
    return Dataset(pictures, labels, preprocessing)


def _read(source: str) -> list[Picture]:
    return readable_pictures(find_pictures(source), source)


def _hold_out(pictures: list[Picture], seed: int) -> tuple[list[Picture], list[Picture]]:
    order: Indices = np.random.default_rng(seed).permutation(len(pictures))
    cut = int(len(pictures) * HELD_OUT_SHARE)
    return [pictures[i] for i in sorted(order[cut:])], [pictures[i] for i in sorted(order[:cut])]


def _balanced(pictures: list[Picture], limit: int) -> list[Picture]:
    """Return at most `limit` pictures, about as many of each class, always the same ones."""
    by_class: dict[str, list[Picture]] = {}
    for picture in pictures:
        by_class.setdefault(picture.label, []).append(picture)
    quota = max(1, limit // len(by_class))
    return [picture for _, members in sorted(by_class.items()) for picture in members[:quota]]
