"""Lays out real pictures as folders: one per client, and one held out. Existing files are linked, not copied."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipcast.demo.settings import DemoSettings
from clipcast.partition import split
from edge_client.data import DIGIT_NAMES, Picture, find_pictures, readable_pictures

HELD_OUT_SHARE = 0.2
HELD_OUT_MAX = 400


@dataclass(frozen=True)
class Layout:
    """Where the pictures lie."""

    classes: tuple[str, ...]
    clients: tuple[Path, ...]
    held_out: Path
    train_pictures: int
    held_out_pictures: int


def lay_out(settings: DemoSettings) -> Layout:
    """Split the data and write the folders below `settings.out`; raises DataError or SettingsError.

    A folder holding train/ and test/ is split that way, any other by a seeded share of 20 % held out. At most 400
    held-out pictures are used, an equal, seeded draw of each class.
    """
    folder = Path(settings.data)
    rng = np.random.default_rng(settings.seed)
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        train, test = (_readable(str(folder / part)) for part in ("train", "test"))
    else:
        everything = _readable(settings.data)
        order = rng.permutation(len(everything))
        cut = int(len(everything) * HELD_OUT_SHARE)
        test = [everything[i] for i in sorted(order[:cut])]
        train = [everything[i] for i in sorted(order[cut:])]
    known = {picture.label for picture in train}
    classes = tuple(name for name in DIGIT_NAMES if name in known) if settings.data == "digits" else tuple(sorted(known))
    held_out = _balanced([picture for picture in test if picture.label in known], rng)
    domains = [picture.domain for picture in train]
    parts = split(_labels(train, classes), settings.clients, settings.partition, settings.seed, domains)
    pictures = settings.out / "pictures"
    homes = tuple(pictures / f"client-{number + 1}" for number in range(settings.clients))
    for home, part in zip(homes, parts, strict=True):
        _write(home, [train[i] for i in part])
    _write(pictures / "held-out", held_out)
    return Layout(classes, homes, pictures / "held-out", len(train), len(held_out))


def _readable(source: str) -> list[Picture]:
    return readable_pictures(find_pictures(source), source)


def _labels(pictures: list[Picture], classes: tuple[str, ...]) -> NDArray[np.int32]:
    index = {name: position for position, name in enumerate(classes)}
    return np.array([index[picture.label] for picture in pictures], np.int32)


def _balanced(pictures: list[Picture], rng: np.random.Generator) -> list[Picture]:
    if len(pictures) <= HELD_OUT_MAX:
        return pictures
    by_class: dict[str, list[Picture]] = {}
    for picture in pictures:
        by_class.setdefault(picture.label, []).append(picture)
    quota = max(1, HELD_OUT_MAX // len(by_class))
    return [members[i] for _, members in sorted(by_class.items()) for i in sorted(rng.permutation(len(members))[:quota])]


def _write(home: Path, pictures: list[Picture]) -> None:
    for number, picture in enumerate(pictures):
        source = Path(picture.name).absolute()
        target = home / picture.label / f"{number:05d}-{source.name}"  # two folders may hold the same name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_file():
            target.unlink(missing_ok=True)
            target.symlink_to(source)
        else:
            picture.load().save(target.with_suffix(".png"))
