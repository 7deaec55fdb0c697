"""The transfer protocol under loss, repetition and disorder, with a schedule that hypothesis draws."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import reference
from protocol.errors import WireError
from protocol.messages import MAX_BLOB_SIZE, MAX_CHUNKS, MIN_CHUNK_SIZE, BlobRef, Need
from protocol.transfer.exchange import UNLIMITED, Fetch, Repeat, Serve, from_bitmap, to_bitmap

CHUNK = MIN_CHUNK_SIZE
fates = st.lists(st.sampled_from(["deliver", "lose", "twice", "late", "much later"]), max_size=60)
sizes = st.integers(1, 20 * CHUNK)


def a_blob(size: int = 3 * CHUNK + 10, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def new_fetch(blob: bytes, window: int = UNLIMITED) -> Fetch:
    return Fetch(reference(blob, CHUNK), Repeat(random.Random(0)), window)


DELAYS = {"deliver": (0,), "lose": (), "twice": (0, 1), "late": (3,), "much later": (40,)}


class Line:
    """Two directions of messages, each with a fate; what is late is overtaken."""

    def __init__(self, schedule):
        self._schedule = iter(schedule)
        self._under_way = []

    def send(self, step, message):
        for delay in DELAYS[next(self._schedule, "deliver")]:
            self._under_way.append((step + delay, message))

    def arrived(self, step):
        due = [message for when, message in self._under_way if when <= step]
        self._under_way = [entry for entry in self._under_way if entry[0] > step]
        return due


@given(sizes, fates, st.integers(1, 8) | st.just(UNLIMITED), st.integers(1, 8), st.sampled_from([0.0, 0.7]))
@settings(deadline=None)
def test_a_blob_arrives_whole_once_loss_stops_and_no_need_exceeds_the_window(size, schedule, window, room, gather):
    blob = a_blob(size)
    fetch, serve, line = new_fetch(blob, window), Serve(blob, reference(blob, CHUNK), gather), Line(schedule)
    for step in range(2000):
        now = step * 0.25
        if bitmap := fetch.need(now):
            assert 1 <= len(from_bitmap(bitmap, fetch.ref.chunks)) <= window
            line.send(step, bitmap)
        serve.landed()
        taken = serve.take(room, now)
        assert len(taken) <= room
        for chunk in taken:
            line.send(step, chunk)
        for message in line.arrived(step):
            if isinstance(message, str):
                serve.need(message, now)
            else:
                fetch.chunk(*message, now)
        if fetch.blob() is not None:
            break
    assert fetch.blob() == blob
    assert fetch.need(1e9) is None


@given(sizes, st.integers(2, 5), fates)
@settings(deadline=None, max_examples=50)
def test_a_broadcast_serves_receivers_that_lose_different_chunks(size, receivers, schedule):
    blob = a_blob(size)
    serve, line = Serve(blob, reference(blob, CHUNK), 0.05), Line(schedule)
    fetches = [new_fetch(blob) for _ in range(receivers)]
    for step in range(2000):
        now = step * 0.25
        for fetch in fetches:
            if bitmap := fetch.need(now):
                serve.need(bitmap, now)
        serve.landed()
        for chunk, receiver in itertools.product(serve.take(8, now), range(receivers)):
            line.send(step, (receiver, chunk))
        for receiver, chunk in line.arrived(step):
            fetches[receiver].chunk(*chunk, now)
        if all(fetch.blob() is not None for fetch in fetches):
            break
    assert [fetch.blob() for fetch in fetches] == [blob] * receivers


@given(st.integers(1, 200), st.data())
@settings(deadline=None)
def test_a_bitmap_comes_back(chunks, data):
    indices = data.draw(st.sets(st.integers(0, chunks - 1)))
    bitmap = to_bitmap(indices, chunks)
    assert from_bitmap(bitmap, chunks) == indices
    naive = "".join("1" if index in indices else "0" for index in range(-(-chunks // 8) * 8))
    assert bitmap == "".join(f"{int(naive[i : i + 8], 2):02x}" for i in range(0, len(naive), 8))


@pytest.mark.parametrize(("bitmap", "chunks"), [("ff", 9), ("ffff", 8), ("01", 7), ("ffff", 15)])
def test_a_bitmap_of_another_number_of_chunks_is_refused(bitmap, chunks):
    with pytest.raises(WireError, match="bitmap"):
        from_bitmap(bitmap, chunks)


@pytest.mark.parametrize(
    ("index", "length"), [(4, CHUNK), (4, 10), (99_999, CHUNK), (0, CHUNK - 1), (0, CHUNK + 1), (0, 0), (3, CHUNK), (3, 9)]
)
def test_a_chunk_of_a_wrong_index_or_size_is_refused_and_changes_nothing(index, length):
    blob = a_blob()
    fetch = new_fetch(blob)
    with pytest.raises(WireError, match="does not belong to a blob of 4 chunks"):
        fetch.chunk(index, bytes(length), 0.0)
    assert from_bitmap(fetch.need(0.0), 4) == {0, 1, 2, 3}


def test_chunks_that_differ_from_the_hash_are_all_asked_for_again():
    blob = a_blob()
    fetch, serve = new_fetch(blob), Serve(blob, reference(blob, CHUNK))
    fetch.need(0.0)
    serve.need("f0", 0.0)
    chunks = serve.take(99, 0.0)
    for index, data in chunks[:3]:
        fetch.chunk(index, data, 0.0)
    fetch.chunk(3, bytes(10), 0.0)
    with pytest.raises(WireError, match="wrong hash"):
        fetch.blob()
    assert fetch.blob() is None
    assert from_bitmap(fetch.need(0.0), 4) == {0, 1, 2, 3}
    for index, data in chunks:
        fetch.chunk(index, data, 0.0)
    assert fetch.blob() == blob


def test_a_duplicate_chunk_does_not_replace_the_first():
    blob = a_blob(CHUNK)
    fetch = new_fetch(blob)
    fetch.chunk(0, blob, 0.0)
    fetch.chunk(0, bytes(CHUNK), 0.0)
    assert fetch.blob() == blob


def test_the_next_window_is_asked_for_as_soon_as_the_last_one_is_full():
    blob = a_blob(4 * CHUNK)
    fetch = new_fetch(blob, window=2)
    assert from_bitmap(fetch.need(0.0), 4) == {0, 1}
    fetch.chunk(1, blob[CHUNK : 2 * CHUNK], 0.1)
    assert fetch.need(0.1) is None
    fetch.chunk(0, blob[:CHUNK], 0.2)
    assert from_bitmap(fetch.need(0.2), 4) == {2, 3}


def test_serve_waits_for_the_gather_time_and_then_gives_each_chunk_once():
    blob = a_blob()
    serve = Serve(blob, reference(blob, CHUNK), gather=1.0)
    serve.need("c0", 10.0)
    serve.need("60", 10.9)
    assert serve.take(9, 10.9) == []
    assert [index for index, _ in serve.take(2, 11.0)] == [0, 1]
    assert [index for index, _ in serve.take(2, 11.0)] == [2]
    assert serve.take(9, 99.0) == []


@pytest.mark.parametrize("room", [0, -3])
def test_serve_gives_nothing_while_there_is_no_room(room):
    blob = a_blob()
    serve = Serve(blob, reference(blob, CHUNK))
    serve.need("f0", 0.0)
    assert serve.take(room, 0.0) == []
    assert len(serve.take(9, 0.0)) == 4


@given(st.randoms(use_true_random=False), st.floats(0.1, 5.0), st.floats(1.0, 60.0), st.floats(0, 1e6))
@settings(deadline=None)
def test_repeat_speaks_at_once_then_in_doubling_jittered_intervals_up_to_the_cap(rng, base, cap, start):
    repeat = Repeat(rng, base, cap)
    now = start
    assert repeat.due(now)
    for tries in range(12):
        span = min(cap, base * 2**tries)
        assert not repeat.due(now + span * 0.499)
        assert repeat.due(now + span)
        now += span


def test_two_clients_do_not_repeat_in_chorus():
    def times(seed):
        repeat = Repeat(random.Random(seed))
        return [tick for tick in range(2000) if repeat.due(tick * 0.1)]

    assert times(1) == times(1)
    assert set(times(1)[1:]).isdisjoint(times(2)[1:5])


def test_again_speaks_at_once_and_answered_waits_a_full_interval():
    repeat = Repeat(random.Random(0), base=2.0)
    assert repeat.due(0.0)
    repeat.again()
    assert repeat.due(0.1)
    repeat.answered(1.0)
    assert not repeat.due(2.9)
    assert repeat.due(3.0)


def test_repeat_goes_on_for_a_day_without_an_answer():
    repeat = Repeat(random.Random(0))
    spoken = sum(repeat.due(float(second)) for second in range(86_400))
    assert spoken >= 86_400 / 31


def test_all_chunks_of_the_largest_blob_can_be_asked_for():
    ref = BlobRef(sha256="ab" * 32, size=MAX_BLOB_SIZE, chunk_size=MAX_BLOB_SIZE // MAX_CHUNKS)
    missing = Fetch(ref, Repeat(random.Random(0))).need(0.0)
    assert Need(sha256=ref.sha256, missing=missing).missing == missing


def test_chunks_that_come_slowly_are_not_asked_for_again_while_they_come():
    """One chunk in 20 s, far slower than the first interval: after the first one it waits for the pace of the link."""
    blob = a_blob(8 * CHUNK)
    ref = reference(blob, CHUNK)
    fetch, asked, now = Fetch(ref, Repeat(random.Random(0), 6.0), window=8), 0, 0.0
    for index in range(8):
        for _ in range(200):
            now += 0.1
            asked += fetch.need(now) is not None
        fetch.chunk(index, blob[index * CHUNK : (index + 1) * CHUNK], now)
    assert fetch.blob() == blob
    assert asked <= 3  # before the first chunk came


def test_a_repeated_offer_hastens_the_next_need_only_when_nothing_comes():
    blob = a_blob(8 * CHUNK)
    fetch = Fetch(reference(blob, CHUNK), Repeat(random.Random(0), 6.0), window=8)
    assert fetch.need(0.0)
    fetch.nudge(0.5)
    assert fetch.need(0.5) is None
    fetch.nudge(1.5)
    assert fetch.need(1.5)
    fetch.chunk(0, blob[:CHUNK], 2.0)
    fetch.nudge(2.5)
    assert fetch.need(2.5) is None


def test_after_a_cut_of_a_slow_link_the_offer_is_answered_at_once_and_not_at_the_links_pace():
    """A chunk comes every 2 s; then the link is cut, and the client that is back offers again."""
    blob = a_blob(8 * CHUNK)
    fetch, now = Fetch(reference(blob, CHUNK), Repeat(random.Random(0), 6.0), window=8), 0.0
    assert fetch.need(now)
    for index in range(3):
        now += 2.0
        fetch.chunk(index, blob[index * CHUNK : (index + 1) * CHUNK], now)
    assert fetch.need(now + 1.5) is None
    fetch.nudge(now + 1.5)
    assert fetch.need(now + 1.5)


def test_what_is_under_way_is_not_given_out_again_until_it_has_landed():
    blob = a_blob(4 * CHUNK)
    serve = Serve(blob, reference(blob, CHUNK))
    serve.need("f0", 0.0)
    assert [index for index, _ in serve.take(2, 0.0)] == [0, 1]
    serve.need("f0", 1.0)
    assert serve.busy
    assert [index for index, _ in serve.take(8, 1.0)] == [2, 3]
    serve.need("f0", 2.0)
    assert serve.take(8, 2.0) == []
    serve.landed()
    assert not serve.busy
    serve.need("80", 3.0)
    assert [index for index, _ in serve.take(8, 3.0)] == [0]


def test_what_was_given_out_rests_though_it_has_landed():
    blob = bytes(4 * MIN_CHUNK_SIZE)
    serve = Serve(blob, reference(blob, MIN_CHUNK_SIZE), rest=4.0)
    serve.need("c0", 10.0)
    assert [index for index, _ in serve.take(9, 10.0)] == [0, 1]
    serve.landed()
    serve.need("f0", 13.9)  # of one that had asked before they came
    assert [index for index, _ in serve.take(9, 13.9)] == [2, 3]
    serve.landed()
    serve.need("f0", 14.0)  # they were lost
    assert [index for index, _ in serve.take(9, 14.0)] == [0, 1]
