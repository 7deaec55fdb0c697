"""What has arrived of a blob, through every order, every way of cutting, torn files and full disks."""

from __future__ import annotations

import random
import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import reference
from protocol.messages import MIN_CHUNK_SIZE
from protocol.storage.partial import FilePartial, FilePartials, MemoryPartial
from protocol.transfer.exchange import Fetch, Repeat, from_bitmap

BLOB = random.Random(0).randbytes(10_000)
extents = st.tuples(st.integers(0, 9_999), st.integers(1, 3_000)).map(lambda e: (e[0], min(e[0] + e[1], 10_000)))


def fill(partial, *ranges):
    for start, end in ranges:
        partial.add(start, BLOB[start:end])


@given(st.lists(extents, max_size=20), extents)
@settings(deadline=None)
def test_a_part_has_what_was_added_and_the_file_has_what_memory_has(tmp_path_factory, added, asked):
    path = tmp_path_factory.mktemp("partial") / "x.part"
    memory, file = MemoryPartial(), FilePartial(path, len(BLOB))
    fill(memory, *added)
    fill(file, *added)
    here = {i for start, end in added for i in range(start, end)}
    expected = set(range(*asked)) <= here
    assert memory.has(asked[0], asked[1] - asked[0]) is expected
    assert file.has(asked[0], asked[1] - asked[0]) is expected
    whole = BLOB if len(here) == len(BLOB) else None
    assert memory.whole(len(BLOB)) == file.whole(len(BLOB)) == whole


@given(st.permutations(range(10)), st.integers(0, 10))
@settings(deadline=None, max_examples=50)
def test_another_process_goes_on_where_the_last_one_was_killed(tmp_path_factory, order, killed_after):
    path = tmp_path_factory.mktemp("partial") / "x.part"
    pieces = [(i * 1000, i * 1000 + 1000) for i in order]
    fill(FilePartial(path, len(BLOB)), *pieces[:killed_after])
    again = FilePartial(path, len(BLOB))
    usable = pieces[: min(killed_after, 9)]  # of a whole that nobody took, the last piece is to come again
    assert [piece for piece in pieces if again.has(piece[0], 1000)] == usable
    fill(again, *pieces[len(usable) :])
    assert again.whole(len(BLOB)) == BLOB


def test_a_file_torn_or_damaged_anywhere_gives_no_wrong_byte(tmp_path):
    path = tmp_path / "x.part"
    fill(FilePartial(path, len(BLOB)), (0, 40), (40, 100), (9_000, 9_050))
    good = path.read_bytes()
    for length in range(len(good)):
        for torn in (good[:length], good[:length] + bytes(len(good) - length), good[:length] + b"\xff" + good[length + 1 :]):
            path.write_bytes(torn)
            partial = FilePartial(path, len(BLOB))
            fill(partial, *((i, min(i + 10, 10_000)) for i in range(0, 10_000, 10) if not partial.has(i, 10)))
            assert partial.whole(len(BLOB)) == BLOB


def test_a_record_beyond_the_blobs_end_is_not_believed(tmp_path):
    path = tmp_path / "x.part"
    fill(FilePartial(path, len(BLOB)), (9_000, 9_500))
    assert not FilePartial(path, 9_400).has(9_000, 10)


def test_what_a_full_disk_does_not_take_is_missing_and_the_rest_stays(tmp_path):
    path = tmp_path / "x.part"
    partial = FilePartial(path, len(BLOB))
    fill(partial, (0, 3_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            fill(partial, (3_000, 6_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not partial.has(3_000, 3_000)
    fill(partial, (6_000, 10_000), (3_000, 6_000))
    assert partial.whole(len(BLOB)) == BLOB


def test_a_file_that_vanished_starts_anew(tmp_path):
    partial = FilePartial(tmp_path / "sub" / "x.part", len(BLOB))
    fill(partial, (0, 5_000))
    (tmp_path / "sub" / "x.part").unlink()
    fill(partial, (5_000, 10_000))
    assert not partial.has(0, 5_000)
    fill(partial, (0, 5_000))
    assert partial.whole(len(BLOB)) == BLOB


def test_an_owner_has_one_part_and_what_others_left_is_forgotten(tmp_path):
    partials, one, other = FilePartials(tmp_path / "partial"), reference(b"one" * 1000), reference(b"other" * 1000)
    partials.open("ann", one).add(0, b"o")
    partials.open("bob", one).add(0, b"o")
    assert partials.open("ann", one).has(0, 1)
    assert not partials.open("ann", other).has(0, 1)
    assert not partials.open("ann", one).has(0, 1)
    partials.retain({"ann"})
    assert not partials.open("bob", one).has(0, 1)


def test_a_fetch_goes_on_in_chunks_of_another_size():
    partial = MemoryPartial()
    Fetch(reference(BLOB, 4096), Repeat(random.Random(0)), partial=partial).chunk(1, BLOB[4096:8192], 0.0)
    again = Fetch(reference(BLOB, MIN_CHUNK_SIZE), Repeat(random.Random(0)), partial=partial)
    assert from_bitmap(again.need(0.0) or "", again.ref.chunks) == {0, 1, 2, 3, 8, 9}


def test_a_damaged_blob_is_fetched_anew(tmp_path):
    ref = reference(BLOB, 4096)
    partials = FilePartials(tmp_path)
    fetch = Fetch(ref, Repeat(random.Random(0)), partial=partials.open("ann", ref))
    for index in range(3):
        fetch.chunk(index, bytes(ref.length(index)), 0.0)
    with pytest.raises(ValueError, match="arrived damaged"):
        fetch.blob()
    assert not any(Path(tmp_path).iterdir())
    for index in range(3):
        fetch.chunk(index, BLOB[index * 4096 : (index + 1) * 4096], 0.0)
    assert fetch.blob() == BLOB


def test_a_chunk_that_the_disk_refuses_is_asked_for_again(tmp_path):
    ref = reference(BLOB, 4096)
    fetch = Fetch(ref, Repeat(random.Random(0)), partial=FilePartial(tmp_path / "file" / "x", len(BLOB)))
    (tmp_path / "file").write_bytes(b"where a folder should be")
    fetch.chunk(0, BLOB[:4096], 0.0)
    assert 0 in from_bitmap(fetch.need(10.0) or "", 3)
    (tmp_path / "file").unlink()
    fetch.chunk(0, BLOB[:4096], 0.0)
    assert from_bitmap(fetch.need(20.0) or "", 3) == {1, 2}
