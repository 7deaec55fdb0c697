"""Pictures on this device: a folder with one sub-folder per class, or the named dataset `digits`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clip_lora.preprocess import Pixels, Preprocessing
from edge_client.config import DIGITS
from edge_client.errors import DataError
from edge_client.inference.pictures import SUFFIXES

log = logging.getLogger(__name__)

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CACHE_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True)
class Picture:
    """One picture: where it is from, its class, and how to decode it.

    `version` tells a file from another of the same name: its modification time in ns and its size, when it was found.
    `domain` is the sub-folder of the class folder that it lies in, empty if in none.
    """

    name: str
    label: str
    load: Callable[[], Image.Image]
    version: tuple[int, ...] = ()
    domain: str = ""

    @property
    def key(self) -> Hashable:
        """What identifies the picture's content within a process."""
        return self.name, self.version


@dataclass
class Dataset:
    """Pictures preprocessed to uint8 on demand, kept in memory up to a budget. `labels` (N,) index the class bank."""

    pictures: Sequence[Picture]
    labels: NDArray[np.int32]
    preprocessing: Preprocessing
    budget: int = CACHE_BYTES
    _kept: dict[int, Pixels] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def kept(self) -> int:
        """Number of pictures that are in memory."""
        return len(self._kept)

    def keys(self, indices: Sequence[int]) -> list[Hashable]:
        """Return what identifies the pixels of the given pictures: no augmentation, a picture has exactly one view."""
        cut = (self.preprocessing.short_side, self.preprocessing.crop)
        return [(self.pictures[int(index)].key, cut) for index in indices]

    def digest(self) -> str:
        """Return a hash of which pictures these are, of which classes, and how they are cut; not of their content."""
        about = [(repr(key), int(label)) for key, label in zip(self.keys(range(len(self))), self.labels, strict=True)]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def pixels(self, indices: Sequence[int], *, keep: bool = True) -> Pixels:
        """Return the given pictures, uint8 (batch, height, width, 3); `keep=False` for those that are needed once."""
        return np.stack([self._one(int(index), keep) for index in indices])

    def _one(self, index: int, keep: bool) -> Pixels:
        if index in self._kept:
            return self._kept[index]
        pixels: Pixels = self.preprocessing.pixels([self.pictures[index].load()])[0]
        if keep and (len(self._kept) + 1) * pixels.nbytes <= self.budget:
            self._kept[index] = pixels
        return pixels


def open_dataset(source: str, classes: Sequence[str], preprocessing: Preprocessing) -> Dataset:
    """Open this device's pictures against the federation's classes.

    A picture that cannot be read is left out with a warning that names it. Raises DataError for a folder that is not
    there or holds no readable pictures, and for a class that the class bank does not know.
    """
    found = find_pictures(source)
    index = {name: position for position, name in enumerate(classes)}
    unknown = sorted({picture.label for picture in found} - index.keys())
    if unknown:
        raise DataError(
            f"{source} has pictures of {', '.join(map(repr, unknown))}, which the federation's class bank does not know "
            f"(it knows {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}): rename or move these folders, or "
            f"add the classes to the coordinator's settings"
        )
    readable = readable_pictures(found, source)
    return Dataset(readable, np.array([index[picture.label] for picture in readable], np.int32), preprocessing)


def find_pictures(source: str) -> list[Picture]:
    """List the pictures of a folder, or of `digits`, in a fixed order; raises DataError."""
    if source == DIGITS:
        return _digits()
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. `data` names a folder of pictures with one sub-folder per class")
    files = [
        file
        for label in sorted(folder.iterdir())
        if label.is_dir() and not label.name.startswith(".")
        for file in sorted(label.rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise DataError(f"{folder} holds no pictures: put them in one sub-folder per class, e.g. {folder / 'cat' / '1.jpg'}")
    places = [file.relative_to(folder).parts for file in files]
    return [
        Picture(str(file), place[0], _opener(file), _version(file), place[1] if len(place) > 2 else "")
        for file, place in zip(files, places, strict=True)
    ]


def readable_pictures(found: Sequence[Picture], source: str) -> list[Picture]:
    """Leave out what cannot be read, with a warning that names it; raises DataError if nothing is left."""
    readable = [picture for picture in found if _is_readable(picture)]
    if not readable:
        raise DataError(f"{source}: none of its {len(found)} pictures can be read. Are they whole?")
    return readable


def _version(file: Path) -> tuple[int, ...]:
    try:
        status = file.stat()
    except OSError:  # a dangling link, say: reading it will tell
        return ()
    return status.st_mtime_ns, status.st_size


def _opener(file: Path) -> Callable[[], Image.Image]:
    def load() -> Image.Image:
        with Image.open(file) as picture:
            rgb: Image.Image = picture.convert("RGB")
            return rgb

    return load


def _is_readable(picture: Picture) -> bool:
    try:
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        log.warning("left out %s: it cannot be read as a picture (%s). Replace or remove it", picture.name, error)
        return False
    return True


def _digits() -> list[Picture]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the dataset `digits` needs scikit-learn: pip install 'clipcast[demo]'") from error
    data = load_digits()
    pictures = (data.images / 16.0 * 255.0).round().astype(np.uint8)  # 8x8, 17 grey levels
    return [
        Picture(f"digits/{number:04d}", DIGIT_NAMES[target], lambda array=array: Image.fromarray(array))  # type: ignore[misc]
        for number, (array, target) in enumerate(zip(pictures, data.target, strict=True))
    ]
