"""What has arrived of a large blob, through every order, torn files, other bytes on the disk, and a full one."""

from __future__ import annotations

import random
import resource
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import sha256
from protocol.storage.large import SPARE_BYTES, LargePartial, copy_atomic, file_sha256, room_for

BLOB = random.Random(0).randbytes(10_000)
PIECES = [(start, start + 1000) for start in range(0, 10_000, 1000)]


def fill(partial: LargePartial, *pieces: tuple[int, int]) -> None:
    for start, end in pieces:
        partial.add(start, BLOB[start:end])


def here(partial: LargePartial) -> list[tuple[int, int]]:
    return [piece for piece in PIECES if partial.has(piece[0], 1000)]


@given(st.permutations(PIECES), st.integers(0, 10))
@settings(deadline=None, max_examples=50)
def test_another_process_goes_on_where_the_last_one_was_killed(
    tmp_path_factory: pytest.TempPathFactory, order: list[tuple[int, int]], killed_after: int
) -> None:
    folder = tmp_path_factory.mktemp("large")
    fill(LargePartial(folder / "x.part", len(BLOB)), *order[:killed_after])
    again = LargePartial(folder / "x.part", len(BLOB))
    assert here(again) == sorted(order[:killed_after])
    fill(again, *order[killed_after:])
    assert again.finish(sha256(BLOB), folder / "blobs" / "x")
    assert (folder / "blobs" / "x").read_bytes() == BLOB
    assert [path.name for path in folder.iterdir()] == ["blobs"]


def test_a_log_torn_or_damaged_anywhere_counts_no_byte_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "x.part"
    fill(LargePartial(path, len(BLOB)), *PIECES[:4])
    log = path.with_suffix(".log").read_bytes()
    for length in range(len(log)):
        for torn in (log[:length], log[:length] + bytes(len(log) - length), log[:length] + b"\xff" + log[length + 1 :]):
            path.with_suffix(".log").write_bytes(torn)
            found = LargePartial(path, len(BLOB))
            data = path.read_bytes()
            assert all(data[start:end] == BLOB[start:end] for start, end in here(found))
            assert set(here(found)) <= set(PIECES[:4])


def test_bytes_that_did_not_reach_the_disk_travel_again(tmp_path: Path) -> None:
    """The log may be on the disk before what it tells of: a power cut leaves zeros in the file."""
    path = tmp_path / "x.part"
    fill(LargePartial(path, len(BLOB)), *PIECES)
    data = bytearray(path.read_bytes())
    data[3000:4000] = bytes(1000)
    path.write_bytes(data)
    again = LargePartial(path, len(BLOB))
    assert here(again) == [piece for piece in PIECES if piece != (3000, 4000)]
    fill(again, (3000, 4000))
    assert again.finish(sha256(BLOB), tmp_path / "x")


def test_a_blob_of_another_hash_is_forgotten(tmp_path: Path) -> None:
    partial = LargePartial(tmp_path / "x.part", len(BLOB))
    fill(partial, *PIECES)
    assert not partial.finish("0" * 64, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    assert not partial.has(0, 1000)


def test_a_disk_that_refuses_is_told_and_what_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.part"
    partial = LargePartial(path, len(BLOB))
    fill(partial, *PIECES[:2])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5500, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            fill(partial, (6000, 7000))
        with pytest.raises(OSError, match=r"File too large|takes no more"):
            fill(partial, (5000, 6000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert here(partial) == PIECES[:2]
    assert here(LargePartial(path, len(BLOB))) == PIECES[:2]
    fill(partial, *PIECES[2:])
    assert partial.finish(sha256(BLOB), tmp_path / "x")


def test_memory_does_not_grow_with_the_blob(tmp_path: Path) -> None:
    size = 300 * 1024 * 1024
    partial = LargePartial(tmp_path / "x.part", size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    partial.add(size - 1, b"x")  # all the rest is a hole in the file
    partial._ranges.add(0, size)
    assert partial.finish(file_sha256(tmp_path / "x.part"), tmp_path / "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_copy_is_whole_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BLOB)
    copy_atomic(tmp_path / "a", tmp_path / "b" / "c")
    assert (tmp_path / "b" / "c").read_bytes() == BLOB
    with pytest.raises(FileNotFoundError):
        copy_atomic(tmp_path / "none", tmp_path / "b" / "d")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["c"]


def test_room_is_asked_for_with_some_to_spare(tmp_path: Path) -> None:
    assert room_for(0, tmp_path)
    free = shutil.disk_usage(tmp_path).free
    assert room_for(free - 2 * SPARE_BYTES, tmp_path / "new")
    assert not room_for(free - SPARE_BYTES // 2, tmp_path)
