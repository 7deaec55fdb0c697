"""An adapter that stays in its file: the same values as decoded, one factor at a time, and damage is noticed at reading."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from protocol.codec import decode_adapter, decode_update, encode_adapter, encode_update
from protocol.messages import Update
from protocol.storage.at_rest import StoredAdapter
from protocol.storage.blobs import BlobError, Blobs

LAYERS = [f"layer.{block}" for block in (0, 1, 10)]


def factors(rank: int = 3, width: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rank)
    shapes = {".lora_A": (rank, width), ".lora_B": (width, rank)}
    return {
        layer + end: rng.normal(size=shape).astype(np.float32) for layer in reversed(LAYERS) for end, shape in shapes.items()
    }


def update() -> Update:
    rows, numbers = np.eye(2, 5, dtype=np.float32), np.array([1, 1], np.int32)
    return Update(factors(), rows, np.array([0, 1], np.int32), numbers, numbers, rows, np.array([0, 1], np.int32))


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path)


@pytest.fixture(params=["adapter", "update"])
def stored(request, blobs):
    """An adapter at rest, alone or as part of an update, and its decoded twin."""
    if request.param == "adapter":
        blob = encode_adapter(factors())
        return StoredAdapter(blobs.path(blobs.put(blob)), blob), decode_adapter(blob)
    blob = encode_update(update())
    return StoredAdapter.of_update(blobs.path(blobs.put(blob)), blob), decode_update(blob).adapter


def test_it_holds_what_decoding_gives_in_the_same_order(stored):
    lazy, twin = stored
    assert list(lazy) == list(twin)
    assert len(lazy) == len(twin)
    for name, factor in twin.items():
        assert lazy[name].tobytes() == factor.tobytes()
        assert (lazy[name].shape, lazy[name].dtype) == (factor.shape, factor.dtype)


def test_what_is_read_may_be_changed_without_a_trace(stored):
    lazy, twin = stored
    name = next(iter(lazy))
    lazy[name][:] = 0
    assert np.array_equal(lazy[name], twin[name])


def test_a_factor_that_it_does_not_have_is_a_key_error(stored):
    with pytest.raises(KeyError):
        stored[0]["prototypes"]


def test_every_flipped_byte_of_a_factor_is_noticed_when_it_is_read(stored):
    lazy, twin = stored
    good = lazy.path.read_bytes()
    noticed = 0
    for position in range(len(good)):  # what is not a factor's is not read again
        lazy.path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        bad = [name for name in lazy if not same(lazy, twin, name)]
        noticed += len(bad)
        assert len(bad) <= 1
    assert noticed == sum(factor.size * 2 for factor in twin.values())


def same(lazy, twin, name) -> bool:
    """Whether a factor is read as it was; a damaged one must raise, never be another."""
    try:
        factor = lazy[name]
    except BlobError as error:
        assert lazy.path.name in str(error)  # noqa: PT017 - the loop counts them
        return False
    assert np.array_equal(factor, twin[name])
    return True


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_file_that_is_cut_or_gone_is_named(stored, damage):
    lazy, _ = stored
    name = list(lazy)[-1]
    lazy.path.unlink() if damage == "gone" else lazy.path.write_bytes(lazy.path.read_bytes()[:60])
    with pytest.raises(BlobError, match=rf"{lazy.path.name} (is damaged|cannot be read)"):
        lazy[name]


def test_it_weighs_nothing_until_it_is_read_and_then_one_factor(blobs):
    blob = encode_adapter(factors(rank=16, width=4096))
    path, size = blobs.path(blobs.put(blob)), len(blob)
    tracemalloc.start()
    try:
        many = [StoredAdapter(path, blob) for _ in range(20)]
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for lazy in many:
            for name in lazy:
                assert lazy[name].any()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert held < 20 * 10_000
    assert peak - held < size  # a factor is a sixth of it, as float16 and as float32
