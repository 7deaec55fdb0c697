"""Pictures of all kinds to arrays; and what is refused, before anything is unpacked."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_client.errors import InferenceError, PictureTooLargeError
from edge_client.inference.pictures import decode_picture, find_files, read_picture

RAINBOW = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG", **more: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **more)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_give_the_very_pixels(kind: str) -> None:
    data = encoded(Image.fromarray(RAINBOW), kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decode_picture(data), RAINBOW)


def test_grey_palette_alpha_one_bit_and_sixteen_bits_become_colours() -> None:
    grey = Image.fromarray(RAINBOW[..., 0])
    np.testing.assert_array_equal(decode_picture(encoded(grey)), np.repeat(RAINBOW[..., :1], 3, axis=2))
    assert decode_picture(encoded(Image.fromarray(RAINBOW).convert("P"))).shape == (5, 7, 3)
    assert decode_picture(encoded(Image.fromarray(RAINBOW).convert("1"))).shape == (5, 7, 3)
    alpha = Image.fromarray(np.dstack([RAINBOW, np.full((5, 7), 9, np.uint8)]))
    np.testing.assert_array_equal(decode_picture(encoded(alpha)), RAINBOW)
    deep = Image.fromarray(RAINBOW[..., 0].astype(np.uint16) * 257)
    np.testing.assert_array_equal(decode_picture(encoded(deep)), np.repeat(RAINBOW[..., :1], 3, axis=2))


def test_of_an_animation_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_picture(data)[0, 0].tolist() == [255, 0, 0]


def test_a_picture_on_its_side_is_put_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # its top is at the right
    data = encoded(Image.fromarray(RAINBOW), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_picture(data), np.rot90(RAINBOW, -1))


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    tracemalloc.start()
    with pytest.raises(PictureTooLargeError, match=r"x has 12000 x 9000 pixels, at most 50 million are taken"):
        decode_picture(bomb(12000, 9000), "x")
    with pytest.raises(PictureTooLargeError, match="x has too many pixels"):
        decode_picture(bomb(60000, 60000), "x")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    for narrow in ((1, 60_000), (60_000, 1)):  # 60,000 times the model's side would be gigabytes
        with pytest.raises(PictureTooLargeError, match="over 100 times the other"):
            decode_picture(bomb(*narrow))
    with pytest.raises(PictureTooLargeError):
        decode_picture(encoded(Image.fromarray(RAINBOW)), max_pixels=34)
    assert decode_picture(encoded(Image.fromarray(RAINBOW)), max_pixels=35).shape == (5, 7, 3)


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n....", encoded(Image.fromarray(RAINBOW), "JPEG")[:150], b"%PDF-1.4"],
)
def test_what_is_no_whole_picture_is_named(data: bytes) -> None:
    with pytest.raises(InferenceError, match=r"^here cannot be read as a picture: ."):
        decode_picture(data, "here")


def test_files_are_named_when_they_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InferenceError, match=r"none\.png: no such picture"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(InferenceError, match="cannot be read"):
        read_picture(tmp_path)
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    with pytest.raises(InferenceError, match=r"cut\.png cannot be read as a picture"):
        read_picture(tmp_path / "cut.png")


def test_folders_are_looked_through_at_any_depth_and_files_taken_as_named(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "a.png", "b/c/1.webp", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in find_files([tmp_path, tmp_path / "b/notes.txt"])]
    assert found == ["a.png", "b/2.JPG", "b/c/1.webp", "b/notes.txt"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InferenceError, match="empty holds no pictures"):
        list(find_files([tmp_path / "empty"]))
