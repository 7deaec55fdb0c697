"""A federation at rest: what a restart finds, wherever the power was cut, and what it says when the state is damaged."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import multiprocessing
import os
import queue
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from clip_lora.shapes import initial_adapter
from coordinator.collection import Answer
from coordinator.errors import FederationError
from coordinator.learning import NO_LESSON, Knowledge, Lesson, stored
from coordinator.personal import Attention
from coordinator.records import AttentionRecord, Identity, Refusal, RoundRecord, TextRecord
from coordinator.state.journal import Journal
from coordinator.state.store import FIRST_BANK, Progress, Store
from coordinator.text_samples import TextLoss
from protocol.codec import decode_update, encode_adapter, encode_bank, encode_update, sha256
from protocol.messages import TextBank, Verdict

TEXT_SHAPES = {"text.0.lora_A": (1, 4), "text.0.lora_B": (4, 1)}
IDENTITY = Identity(
    federation="lab",
    model_digest="a" * 64,
    classes=("cat", "dog"),
    rank=4,
    alpha=8.0,
    projections=("q_proj",),
    first_block=0,
)
RANKS = {"ann": 2, "bob": 1, "cid": 2, "dan": 2}
BASES = {client: digit * 64 for client, digit in zip(RANKS, "abcd", strict=True)}


def a_bank(version=FIRST_BANK):
    """A class bank; every version has other embeddings."""
    turn = np.array([[np.cos(version), np.sin(version)], [-np.sin(version), np.cos(version)]], np.float32)
    return TextBank(version, ("cat", "dog"), ("a {}",), turn, 14.0, "tiny-clip", "d" * 64)


def lesson_of(*clients, text=True):
    ones = np.ones((len(clients), len(clients))) / max(len(clients), 1)
    attention = Attention(clients, clients, ones, np.zeros(len(clients))) if clients else None
    return Lesson(TextLoss(2.0, 1.0, 5) if text else None, attention, {"cat": 0.5}, attention.clients if attention else ())


def record(number, known, own=(), outcome="aggregated"):
    return RoundRecord(
        round=number,
        outcome=outcome,
        accepted=["ann"],
        rejected=[Refusal(client="bob", reason="not-finite", detail="x\u2028y\x85z")],
        silent=["cid"],
        samples=10,
        loss=0.5,
        train_accuracy=None,
        seconds=1.5,
        bytes_up={"ann": 100},
        bytes_down={"ann": 200},
        adapter_sha256=sha256(encode_adapter(known.adapter)),
        bank_version=known.bank.version,
        text=TextRecord(loss_before=2.0, loss_after=1.0, samples=5),
        own=list(own),
        attention=AttentionRecord(clients=["ann"], sources=["ann"], weights=[[1.0]], entropy=[0.0]),
        class_accuracy={"cat": 0.5},
    )


def bits(known):
    """What is known, bit for bit; None before the start."""
    if known is None:
        return None
    text = None if known.text is None else encode_adapter(known.text)
    own = {client: encode_adapter(adapter) for client, adapter in known.own.items()}
    return encode_bank(known.bank), encode_adapter(known.adapter), text, own


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request):
    """Where the journal is: a file of the state folder, or an empty database of a real server."""
    return None if request.param == "sqlite" else request.getfixturevalue("postgres")()


@pytest.fixture
def new_store(tmp_path, url):
    """Open the store, as a coordinator that starts does; it stops at the end of the test, or when the next one starts."""
    opened = []

    def make(**how):
        for earlier in opened:
            earlier.close()
        opened.append(Store(tmp_path / "state", url, **how))
        opened[-1].begin(IDENTITY)
        return opened[-1]

    yield make
    for earlier in opened:
        earlier.close()


@pytest.fixture
def history(shapes):
    """What is known after rounds 0, 1 and 2: round 1 renews everything, round 2 all but the text side and bob's."""
    factors = [stored(initial_adapter(shapes, seed)) for seed in range(7)]
    text = stored(initial_adapter(TEXT_SHAPES, 9))
    start = Knowledge(a_bank(), factors[0])
    first = Knowledge(a_bank(2), factors[1], text, {"ann": factors[3], "bob": factors[4]})
    second = Knowledge(a_bank(2), factors[2], text, {"ann": factors[5], "bob": factors[4], "cid": factors[6]})
    return start, first, second


@pytest.fixture
def run_rounds(plan, history):
    """Bring a store through two rounds."""

    def run(store):
        start, first, second = history
        store.start(start)
        store.open(plan.model_copy(update={"round": 1}), RANKS, BASES)
        store.finish(record(1, first, ["ann", "bob"]), first, lesson_of("ann", "bob"))
        store.open(plan.model_copy(update={"round": 2}), RANKS, BASES)
        store.finish(record(2, second, ["ann", "cid"]), second, lesson_of("ann", "cid", text=False))
        return store

    return run


@pytest.fixture
def after_two_rounds(new_store, run_rounds):
    return run_rounds(new_store())


@pytest.fixture
def answer(make_update, make_offer):
    """An answer to an update, and the update's blob."""

    def make(client, seed=0, reason="accepted", **fields):
        update = make_update(seed)
        verdict = Verdict(reason == "accepted", reason, "" if reason == "accepted" else "why")
        return Answer(client, make_offer(update, **fields), verdict), encode_update(update)

    return make


def test_a_folder_that_is_not_there_starts_from_nothing_and_looking_makes_none(tmp_path, shapes):
    store = Store(tmp_path / "state")
    assert store.records() == []
    assert store.run() is None
    assert store.models.knowledge() is None
    assert store.opened() is None
    assert store.progress() is None
    assert store.resume(shapes, TEXT_SHAPES) == (0, None)
    assert not (tmp_path / "state").exists()


def test_a_federation_stopped_before_its_first_round_keeps_its_initial_adapter(new_store, history, shapes):
    new_store().start(history[0])
    number, found = new_store().resume(shapes, TEXT_SHAPES)
    assert number == 0
    assert bits(found) == bits(history[0])


def test_a_restart_continues_with_all_that_was_known_after_the_newest_round(after_two_rounds, new_store, history, shapes):
    number, known = new_store().resume(shapes, TEXT_SHAPES)
    assert number == 2
    assert bits(known) == bits(history[2])


def test_others_may_look_while_a_coordinator_is_at_work(after_two_rounds, url, history):
    reader = Store(after_two_rounds.folder, url)
    assert bits(reader.models.knowledge()) == bits(history[2])
    assert [found.round for found in reader.records()] == [1, 2]
    reader.close()


def test_a_second_coordinator_is_turned_away_until_the_first_has_stopped(after_two_rounds, url):
    second = Store(after_two_rounds.folder, url)
    with pytest.raises(FederationError, match=r"another coordinator is at work in .*state"):
        second.begin(IDENTITY)
    after_two_rounds.close()
    assert second.begin(IDENTITY)[1] == 2
    second.close()


def test_a_round_that_was_missed_keeps_what_was_known(after_two_rounds, new_store, history, plan, shapes):
    after_two_rounds.open(plan, RANKS, BASES)
    after_two_rounds.finish(record(3, history[2], outcome="quorum-missed"), history[2], NO_LESSON)
    number, known = new_store().resume(shapes, TEXT_SHAPES)
    assert number == 3
    assert bits(known) == bits(history[2])


def test_records_come_back_as_they_were_written_in_order(after_two_rounds, new_store, history):
    records = new_store().records()
    assert records == [record(1, history[1], ["ann", "bob"]), record(2, history[2], ["ann", "cid"])]


def test_adapters_and_banks_come_back_by_the_round_that_made_them(after_two_rounds, history):
    for number, known in enumerate(history):
        assert encode_adapter(after_two_rounds.models.adapter(number)) == encode_adapter(known.adapter)
    assert encode_adapter(after_two_rounds.models.own(1, "ann")) == encode_adapter(history[1].own["ann"])
    assert encode_adapter(after_two_rounds.models.own(2, "ann")) == encode_adapter(history[2].own["ann"])
    for version in (1, 2):
        assert encode_bank(after_two_rounds.models.bank(version)) == encode_bank(a_bank(version))


def test_what_no_round_made_is_refused_by_name(after_two_rounds):
    with pytest.raises(FederationError, match="no adapter of round 3: never made, or no longer kept"):
        after_two_rounds.models.adapter(3)
    with pytest.raises(FederationError, match="no bob own of round 2"):
        after_two_rounds.models.own(2, "bob")
    with pytest.raises(FederationError, match="no 7 bank"):
        after_two_rounds.models.bank(7)


def blob_of(store, what):
    return store.blobs.path(sha256(what))


@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
@pytest.mark.parametrize("what", ["bank", "adapter", "own"])
def test_a_blob_that_is_damaged_is_named_with_the_cure(after_two_rounds, history, shapes, what, damage):
    known = history[2]
    blob = {
        "bank": encode_bank(known.bank),
        "adapter": encode_adapter(known.adapter),
        "own": encode_adapter(known.own["bob"]),
    }
    path = blob_of(after_two_rounds, blob[what])
    data = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(data[:20] if damage == "cut" else data[:-1] + b"\x5a")
    with pytest.raises(FederationError, match=rf"{path.name} is (missing|damaged).*restore it, or move .*state aside"):
        after_two_rounds.resume(shapes, TEXT_SHAPES)


def test_a_text_adapter_of_another_shape_is_refused_with_the_cure(after_two_rounds, shapes):
    wider = {name: (rows * 2, columns) for name, (rows, columns) in TEXT_SHAPES.items()}
    with pytest.raises(FederationError, match=r"another federation.*set `state` to a new folder"):
        after_two_rounds.resume(shapes, wider)
    assert after_two_rounds.resume(shapes, None)[0] == 2


def test_the_state_of_a_federation_with_another_rank_is_refused_with_the_cure(after_two_rounds, shapes):
    other = {name: (rows * 2, columns) for name, (rows, columns) in shapes.items()}
    with pytest.raises(FederationError, match=r"another federation.*set `state` to a new folder"):
        after_two_rounds.resume(other, TEXT_SHAPES)


def test_clients_start_from_their_own_adapter_or_the_global_one_at_their_rank(history):
    first = history[1]
    assert first.start_of("ann", 2) is first.own["ann"]
    assert first.start_of("new", 2) is first.adapter
    narrow = first.start_of("ann", 1)
    assert narrow["layer.0.lora_A"].shape == (1, 6)
    wide = dataclasses.replace(first, own={}).start_of("ann", 5)
    assert wide["layer.0.lora_B"].shape == (6, 5)


def test_a_run_keeps_its_name_and_counts_its_starts(tmp_path, url):
    found = []
    for _ in range(2):
        store = Store(tmp_path, url)
        found.append(store.begin(IDENTITY))
        store.close()
    assert found == [(found[0][0], 1), (found[0][0], 2)]


@pytest.mark.parametrize(("key", "value"), [("classes", ("dog", "cat")), ("alpha", 4.0), ("model_digest", "b" * 64)])
def test_a_state_folder_of_another_federation_is_refused_naming_what_differs(new_store, key, value):
    with pytest.raises(FederationError, match=key):
        new_store().begin(IDENTITY.model_copy(update={key: value}))


@pytest.mark.parametrize("damage", [b"", b"not a database at all, but long enough to have a header" * 20])
def test_a_damaged_journal_is_named_with_the_cure(tmp_path, damage):
    (tmp_path / "journal.db").write_bytes(damage)
    store = Store(tmp_path)
    if damage:
        with pytest.raises(
            FederationError, match=r"the journal .*journal\.db cannot be used .*restore it, or move .* aside"
        ):
            store.records()
    else:
        assert store.records() == []


def test_a_database_that_is_not_supported_is_named(tmp_path):
    with pytest.raises(FederationError, match="`journal` names a mysql database, PostgreSQL is supported"):
        Store(tmp_path, "mysql://user@host/name")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [("UPDATE run SET version = 99", "version 99, this clipcast reads 3"), ("UPDATE run SET about = '{'", "damaged Run")],
)
def test_a_journal_that_cannot_be_read_is_refused(tmp_path, damage, sentence):
    store = Store(tmp_path)
    store.begin(IDENTITY)
    store.close()
    with sqlite3.connect(tmp_path / "journal.db") as connection:
        connection.execute(damage)
    connection.close()
    with pytest.raises(FederationError, match=sentence):
        store.begin(IDENTITY)
    store.close()


def test_a_database_that_does_not_answer_is_named_without_its_password(tmp_path, free_port):
    store = Store(tmp_path, f"postgresql+pg8000://me:secret@127.0.0.1:{free_port}/x")
    with pytest.raises(FederationError, match=r"the journal postgresql.*127.* cannot be used") as caught:
        store.begin(IDENTITY)
    assert "secret" not in str(caught.value)
    store.close()


def test_what_is_no_address_of_a_database_is_refused(tmp_path):
    with pytest.raises(FederationError, match=r"`journal` is not the address of a database: write e\.g\. postgresql"):
        Store(tmp_path, "labserver")


# The open round.


def test_a_round_that_is_interrupted_is_found_with_all_that_was_answered(after_two_rounds, new_store, plan, answer):
    after_two_rounds.open(plan, RANKS, BASES)
    accepted, blob = answer("bob", 1)
    refused, _ = answer("ann", 2, "not-finite")
    after_two_rounds.keep(accepted, blob, 3)
    after_two_rounds.keep(refused, None, 3)
    opened = new_store().opened()
    assert (opened.plan, opened.ranks, opened.refused) == (plan, RANKS, (refused,))
    assert opened.accepted.keys() == {"bob"}
    found = opened.accepted["bob"]
    assert found.offer == accepted.offer
    assert encode_bytes(found.update) == encode_bytes(decode_update(blob))


def encode_bytes(update):
    return {name: getattr(update, name).tobytes() for name in ("prototypes", "features", "labels", "prototype_counts")} | {
        name: factor.tobytes() for name, factor in update.adapter.items()
    }


def test_how_far_a_round_is_can_be_told_without_its_updates(after_two_rounds, url, plan, answer):
    after_two_rounds.open(plan, RANKS, BASES)
    assert after_two_rounds.progress() == Progress(3, (), 0, ("ann", "bob", "cid", "dan"))
    for kept, blob in (answer("dan"), answer("ann", 1, "not-finite"), answer("bob", 2)):
        after_two_rounds.keep(kept, blob, 3)
    for blob in after_two_rounds.blobs.folder.glob("*"):
        blob.unlink()
    reader = Store(after_two_rounds.folder, url)
    assert reader.progress() == Progress(3, ("bob", "dan"), 1, ("ann", "cid"))
    reader.close()


def test_an_offer_for_a_round_that_no_table_takes_has_no_answer(after_two_rounds, answer):
    assert after_two_rounds.answered("ann", answer("ann", round=2**40)[0].offer) is None


def test_a_journal_of_another_version_is_refused_whoever_looks(tmp_path):
    store = Store(tmp_path / "state")
    store.begin(IDENTITY)
    store.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "state" / "journal.db")) as journal, journal:
        journal.execute("UPDATE run SET version = 1")
        journal.execute("ALTER TABLE rounds DROP COLUMN bases")
    store = Store(tmp_path / "state")
    looks = (store.records, store.models.knowledge, store.opened, store.progress, store.registry.devices, store.prepare)
    for look in looks:
        with pytest.raises(FederationError, match="is of version 1, this clipcast reads 3"):
            look()
    store.close()


def test_between_rounds_none_is_open(after_two_rounds):
    assert after_two_rounds.opened() is None


def test_the_answer_to_an_update_is_found_again_after_its_round_and_a_restart(
    after_two_rounds, new_store, plan, answer, history
):
    kept = [answer("bob", 1), answer("ann", 2, "not-finite")]
    after_two_rounds.open(plan, RANKS, BASES)
    for one, blob in kept:
        after_two_rounds.keep(one, blob, 3)
    after_two_rounds.finish(record(3, history[2]), history[2], NO_LESSON)
    store = new_store()
    for one, _ in kept:
        assert store.answered(one.client, one.offer) == one
    other, _ = answer("bob", 3)
    assert store.answered("bob", other.offer) is None
    assert store.answered("ann", kept[0][0].offer) is None
    assert store.answered("bob", kept[0][0].offer.model_copy(update={"round": 2})) is None


def test_an_answer_is_kept_once_and_as_it_was_first_given(after_two_rounds, plan, answer):
    after_two_rounds.open(plan, RANKS, BASES)
    first, blob = answer("bob", 1)
    after_two_rounds.keep(first, blob, 3)
    after_two_rounds.keep(dataclasses.replace(first, verdict=Verdict(False, "not-finite", "x")), None, 3)
    after_two_rounds.keep(first, blob, 3)
    assert after_two_rounds.answered("bob", first.offer) == first
    assert list(after_two_rounds.opened().accepted) == ["bob"]


def test_the_journal_itself_refuses_to_count_a_client_twice(after_two_rounds, plan, answer):
    after_two_rounds.open(plan, RANKS, BASES)
    after_two_rounds.keep(*answer("bob", 1), 3)
    with pytest.raises(FederationError, match="the journal"):
        after_two_rounds.keep(*answer("bob", 2), 3)
    assert len(after_two_rounds.opened().accepted) == 1


def test_a_round_that_begins_anew_forgets_what_it_had(after_two_rounds, plan, answer):
    after_two_rounds.open(plan, RANKS, BASES)
    kept, blob = answer("bob", 1)
    after_two_rounds.keep(kept, blob, 3)
    after_two_rounds.open(plan, {"ann": 2}, {"ann": BASES["ann"]})
    assert after_two_rounds.opened().accepted == {}
    assert after_two_rounds.opened().ranks == {"ann": 2}
    assert after_two_rounds.answered("bob", kept.offer) is None


def test_a_late_update_is_kept_for_the_round_in_which_it_counts(after_two_rounds, new_store, plan, answer, history):
    after_two_rounds.open(plan, RANKS, BASES)
    late, blob = answer("bob", 1)
    late = dataclasses.replace(late, offer=late.offer.model_copy(update={"round": 2}))
    after_two_rounds.keep(late, blob, 3)
    (found,) = new_store().opened().came_late
    assert found[:2] == ("bob", late.offer)
    assert encode_bytes(found[2]) == encode_bytes(decode_update(blob))
    store = new_store()
    assert store.opened().accepted == {}
    assert [earlier.counted for earlier in store.earlier(3, 1)] == [frozenset()]  # the open round knows of it itself
    store.finish(record(3, history[2]), history[2], NO_LESSON)
    assert not blob_of(store, blob).exists()
    assert store.answered("bob", late.offer) == late
    (two, three) = store.earlier(4, 2)
    assert (two.plan.round, two.ranks, two.bases, two.counted) == (2, RANKS, BASES, {"bob"})
    assert (three.plan.round, three.counted) == (3, frozenset())
    assert store.earlier(4, 0) == []


def test_an_update_stays_on_the_disk_until_its_round_is_over(after_two_rounds, plan, answer, history):
    kept, blob = answer("bob", 1)
    after_two_rounds.open(plan, RANKS, BASES)
    after_two_rounds.keep(kept, blob, 3)
    assert blob_of(after_two_rounds, blob).read_bytes() == blob
    after_two_rounds.finish(record(3, history[2]), history[2], NO_LESSON)
    assert not blob_of(after_two_rounds, blob).exists()


def test_blobs_that_nothing_names_are_swept_at_the_start(after_two_rounds, new_store, history):
    orphan = after_two_rounds.blobs.put(b"from a transaction that never was")
    half = after_two_rounds.blobs.folder / ".abc.safetensors.tmp"
    half.write_bytes(b"half")
    before = set(after_two_rounds.blobs.digests())
    store = new_store()
    assert before - set(store.blobs.digests()) == {orphan}
    assert not half.exists()
    assert bits(store.models.knowledge()) == bits(history[2])


def test_another_journal_over_the_same_folder_is_refused_and_loses_nothing(tmp_path, run_rounds, history, postgres):
    first = Store(tmp_path)
    first.begin(IDENTITY)
    run_rounds(first)
    first.close()
    second = Store(tmp_path, postgres())
    with pytest.raises(FederationError, match=r"blobs holds blobs that the journal .* knows nothing of: set `journal` back"):
        second.begin(IDENTITY)
    second.close()
    assert bits(Store(tmp_path).models.knowledge()) == bits(history[2])


def test_old_rounds_are_pruned_but_the_start_the_newest_and_all_records_stay(new_store, plan, shapes):
    text = stored(initial_adapter(TEXT_SHAPES, 9))
    store = new_store(keep_rounds=2)
    known = Knowledge(a_bank(), stored(initial_adapter(shapes, 0)))
    store.start(known)
    for number in range(1, 7):
        own = {**known.own, ("ann" if number == 1 else "bob"): stored(initial_adapter(shapes, 100 + number))}
        bank = a_bank(number + 1) if number < 3 else known.bank
        known = Knowledge(bank, stored(initial_adapter(shapes, number)), text, own)
        store.open(plan.model_copy(update={"round": number}), RANKS, BASES)
        lesson = lesson_of(*(["ann"] if number == 1 else ["bob"]), text=number < 3)
        store.finish(record(number, known), known, lesson)
        assert bits(store.models.knowledge()) == bits(known)
    assert [found.round for found in store.records()] == [1, 2, 3, 4, 5, 6]
    held = [number for number in range(7) if holds(store.models.adapter, number)]
    assert held == [0, 5, 6]
    assert [version for version in range(1, 5) if holds(store.models.bank, version)] == [1, 3]
    assert [number for number in range(1, 7) if holds(store.models.own, number, "bob")] == [5, 6]
    assert holds(store.models.own, 1, "ann")
    wanted = 3 + 2 + 3 + 1  # adapters, banks, own ones, the text adapter
    assert len(list(store.blobs.digests())) == wanted


def test_a_class_bank_stays_as_long_as_a_round_that_is_kept_names_it(new_store, plan, shapes):
    store = new_store(keep_rounds=2)
    known = Knowledge(a_bank(), stored(initial_adapter(shapes, 0)))
    store.start(known)
    text = stored(initial_adapter(TEXT_SHAPES, 9))
    for number in range(1, 9):
        bank = a_bank(number + 1) if number in (1, 6) else known.bank
        known = Knowledge(bank, stored(initial_adapter(shapes, number)), text)
        store.open(plan.model_copy(update={"round": number}), RANKS, BASES)
        store.finish(record(number, known), known, lesson_of(text=number in (1, 6)))
        named = {found.bank_version for found in store.records() if holds(store.models.adapter, found.round)}
        assert all(holds(store.models.bank, version) for version in named)
    assert [version for version in range(1, 8) if holds(store.models.bank, version)] == [1, 7]


def test_who_listened_to_whom_is_told_of_the_rounds_that_are_kept(new_store, plan, shapes):
    store = new_store(keep_rounds=2)
    known = Knowledge(a_bank(), stored(initial_adapter(shapes, 0)))
    store.start(known)
    for number in range(1, 5):
        store.open(plan.model_copy(update={"round": number}), RANKS, BASES)
        store.finish(record(number, known), known)
    assert [found.round for found in store.records() if found.attention is not None] == [3, 4]
    assert len(store.records()) == 4


def holds(look, *which):
    try:
        look(*which)
    except FederationError:
        return False
    return True


# Wherever the power is cut.


class PowerCut(BaseException):
    """Nothing after this point happened."""


class Cutter:
    """Cuts the power at the k-th point: before or after a sync, a rename or a removal, or before a commit."""

    def __init__(self, monkeypatch, store, at):
        self.count, self.at = 0, at
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self._around(getattr(owner, name)))
        engine = store._journal._open()
        event.listen(engine, "commit", lambda _: self._committing())

    def _point(self):
        self.count += 1
        if self.count == self.at:
            raise PowerCut

    def _committing(self):
        self._point()

    def _around(self, operation):
        def cut(*args, **kwargs):
            self._point()
            result = operation(*args, **kwargs)
            self._point()
            return result

        return cut


@pytest.mark.parametrize("step", ["start", "open", "keep", "finish"])
def test_whatever_the_point_of_a_power_cut_the_step_happened_or_did_not_and_can_be_repeated(
    tmp_path, history, plan, answer, step
):
    """Every durable operation of a step as the end of the process: then a restart looks, and takes the step (again)."""
    kept, blob = answer("bob", 1)
    steps = {
        "start": lambda store: store.start(history[0]),
        "open": lambda store: store.open(plan, RANKS, BASES),
        "keep": lambda store: store.keep(kept, blob, 3),
        "finish": lambda store: store.finish(
            record(plan.round, history[1], ["ann", "bob"]), history[1], lesson_of("ann", "bob")
        ),
    }
    before = list(steps)[: list(steps).index(step)]

    def state(store):
        opened = store.opened()
        held = opened and (opened.plan, sorted(opened.accepted))
        return bits(store.models.knowledge()), held, store.records(), store.answered("bob", kept.offer)

    def fresh(folder):
        store = Store(folder)
        store.begin(IDENTITY)
        for name in before:
            steps[name](store)
        return store

    calm = fresh(tmp_path / "calm")
    old = state(calm)
    steps[step](calm)
    new, blobs = state(calm), set(calm.blobs.digests())
    calm.close()
    assert old != new
    happened = set()
    for at in range(1, 200):
        store = fresh(tmp_path / str(at))
        with pytest.MonkeyPatch.context() as patch:
            cutter = Cutter(patch, store, at)
            with contextlib.suppress(PowerCut):
                steps[step](store)
            store.close()
        if cutter.count < at:
            break
        store = Store(tmp_path / str(at))
        store.begin(IDENTITY)
        happened.add(state(store) == new)
        assert state(store) in (old, new)
        if state(store) == old:
            steps[step](store)
        assert state(store) == new
        assert set(store.blobs.digests()) == blobs
        store.close()
    assert at > 1
    assert False in happened
    assert True in happened or step != "finish"  # the others' commit is their last operation


class FullDisk(Cutter):
    """The k-th write finds no room; the next one does."""

    def _point(self):
        self.count += 1
        if self.count == self.at:
            raise OSError(errno.ENOSPC, "No space left on device")

    def _committing(self):
        try:
            self._point()
        except OSError as error:  # as SQLite says it
            raise OperationalError("COMMIT", None, sqlite3.OperationalError("database or disk is full")) from error


def test_whichever_write_finds_no_room_nothing_false_is_kept_and_the_next_try_succeeds(
    tmp_path, plan, answer, history, monkeypatch
):
    kept, blob = answer("bob", 1)
    for at in itertools.count(1):
        store = Store(tmp_path / f"full-{at}")
        store.begin(IDENTITY)
        store.start(history[0])
        store.open(plan, RANKS, BASES)
        with monkeypatch.context() as patch:
            disk = FullDisk(patch, store, at)
            with contextlib.suppress(FederationError):
                store.keep(kept, blob, 3)
            if disk.count < at:
                break
            assert store.answered("bob", kept.offer) in (None, kept)
            store.keep(kept, blob, 3)
        opened = store.opened()
        assert list(opened.accepted) == ["bob"]
        assert store.answered("bob", kept.offer) == kept
        store.close()
    store.close()
    assert at > 4


def begin_at_once(folder, journal, barrier, problems):
    for turn in range(8 if journal is None else 1):
        barrier.wait(60)
        made = Journal(folder / str(turn), journal)
        try:
            made.make_tables()
        except FederationError as error:
            problems.put(str(error))
        made.close()


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("where", ["sqlite", "postgresql"])
def test_tables_are_made_once_by_many_that_begin_at_the_same_moment(where, processes, tmp_path, request):
    url = request.getfixturevalue("postgres")() if where == "postgresql" else None
    context = multiprocessing.get_context("spawn")
    barrier, problems = (context.Barrier(6), context.Queue()) if processes else (threading.Barrier(6), queue.Queue())
    make = context.Process if processes else threading.Thread
    workers = [make(target=begin_at_once, args=(tmp_path, url, barrier, problems)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert problems.empty(), problems.get()
