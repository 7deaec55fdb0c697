"""Pictures from files and bytes to arrays, within limits: whoever sends one may mean harm."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from edge_client.errors import InferenceError, PictureTooLargeError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"))
MAX_PIXELS = 50_000_000
MOST_RATIO = 100
Pixels = NDArray[np.uint8]


def read_picture(path: Path, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Return a picture file as uint8 (height, width, 3); raises InferenceError that names the file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InferenceError(f"{path}: no such picture") from error
    except OSError as error:
        raise InferenceError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a zero byte, as where a list is not one name a line
        raise InferenceError(f"{str(path)[:80]!r} is no name of a file: names are given one a line") from error
    return decode_picture(data, str(path), max_pixels)


def decode_picture(data: bytes, name: str = "the picture", max_pixels: int = MAX_PIXELS) -> Pixels:
    """Return an encoded picture as uint8 (height, width, 3), upright, its first frame; raises InferenceError.

    Its size is looked at before anything is unpacked: a few bytes may claim to be gigabytes. A camera's note that the
    picture lies on its side is heeded, which training does not do: it trains on pictures as they are stored.
    """
    if not data:
        raise InferenceError(f"{name} cannot be read as a picture: it is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures and odd metadata; the limit here is our own
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                _check_size(name, picture.width, picture.height, max_pixels)
                upright = ImageOps.exif_transpose(picture) or picture
                return np.asarray(_eight_bits(upright).convert("RGB"))
    except PictureTooLargeError:
        raise
    except Image.DecompressionBombError as error:  # beyond Pillow's own limit it does not even say how large
        raise PictureTooLargeError(f"{name} has too many pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise InferenceError(f"{name} cannot be read as a picture: it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow's decoders raise what they like over broken files
        raise InferenceError(f"{name} cannot be read as a picture: {str(error) or type(error).__name__}") from error


def _check_size(name: str, width: int, height: int, most: int) -> None:
    if width * height > most:
        raise PictureTooLargeError(
            f"{name} has {width} x {height} pixels, at most {most / 1e6:g} million are taken: make it smaller"
        )
    if max(width, height) > MOST_RATIO * min(width, height):
        # The short side is enlarged to what the model sees, and the long one with it.
        raise PictureTooLargeError(f"{name} has {width} x {height} pixels: one side is over {MOST_RATIO} times the other")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Return a picture of 16 bits a pixel as one of 8: Pillow would cut off what is above 255."""
    if picture.mode.startswith("I;16") or picture.mode == "I":
        return Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).astype(np.uint8))
    return picture


def find_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield files as they are named, and of folders all pictures in them, at any depth, sorted; raises InferenceError."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not found:
            raise InferenceError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        yield from found
