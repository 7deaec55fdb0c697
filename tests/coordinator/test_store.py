"""A federation at rest: what a restart finds, and what it says when the folder is damaged or another federation's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from clip_lora.lora import initial_adapter
from coordinator.errors import FederationError
from coordinator.learning import NO_LESSON, Knowledge, Lesson, stored
from coordinator.personal import Attention
from coordinator.store import FIRST_BANK, AttentionRecord, Identity, Refusal, RoundRecord, Store, TextRecord
from coordinator.text_side import TextLoss
from protocol.codec import encode_adapter, encode_bank, sha256
from protocol.messages import TextBank

TEXT_SHAPES = {"text.0.lora_A": (1, 4), "text.0.lora_B": (4, 1)}


def a_bank(version=FIRST_BANK):
    """A class bank; every version has other embeddings."""
    turn = np.array([[np.cos(version), np.sin(version)], [-np.sin(version), np.cos(version)]], np.float32)
    return TextBank(version, ("cat", "dog"), ("a {}",), turn, 14.0, "tiny-clip", "d" * 64)


def lesson_of(*clients, text=True):
    ones = np.ones((len(clients), len(clients))) / max(len(clients), 1)
    attention = Attention(clients, clients, ones, np.zeros(len(clients))) if clients else None
    return Lesson(TextLoss(2.0, 1.0, 5) if text else None, attention, {"cat": 0.5}, attention.clients if attention else ())


def record(number, saved, version=FIRST_BANK, own=(), outcome="aggregated"):
    return RoundRecord(
        round=number,
        outcome=outcome,
        accepted=["ann"],
        rejected=[Refusal(client="bob", reason="not-finite", detail="x holds NaN")],
        silent=["cid"],
        samples=10,
        loss=0.5,
        train_accuracy=None,
        seconds=1.5,
        bytes_up={"ann": 100},
        bytes_down={"ann": 200},
        adapter=saved[0],
        adapter_sha256=saved[1],
        bank_version=version,
        text=TextRecord(loss_before=2.0, loss_after=1.0, samples=5),
        own=list(own),
        attention=AttentionRecord(clients=["ann"], sources=["ann"], weights=[[1.0]], entropy=[0.0]),
        class_accuracy={"cat": 0.5},
    )


def same(one, other):
    """Whether two states of knowledge are the same bits."""

    def bits(known):
        text = None if known.text is None else encode_adapter(known.text)
        own = {client: encode_adapter(adapter) for client, adapter in known.own.items()}
        return encode_bank(known.bank), encode_adapter(known.adapter), text, own

    return bits(one) == bits(other)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "state")


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
def after_two_rounds(store, history):
    start, first, second = history
    store.save(0, start)
    store.save_record(record(1, store.save(1, first, lesson_of("ann", "bob")), 2, ["ann", "bob"]))
    store.save_record(record(2, store.save(2, second, lesson_of("ann", "cid", text=False)), 2, ["ann", "cid"]))
    return store


def test_a_folder_that_is_not_there_starts_from_nothing(store, shapes):
    assert store.records() == []
    assert store.resume(shapes, TEXT_SHAPES) == (0, None)


def test_a_federation_stopped_before_its_first_record_keeps_its_initial_adapter(store, history, shapes):
    store.save(0, history[0])
    number, found = store.resume(shapes, TEXT_SHAPES)
    assert number == 0
    assert same(found, history[0])


def test_a_restart_continues_with_all_that_was_known_after_the_newest_round(after_two_rounds, history, shapes):
    number, known = Store(after_two_rounds.folder).resume(shapes, TEXT_SHAPES)
    assert number == 2
    assert same(known, history[2])
    assert same(Store(after_two_rounds.folder).knowledge(), history[2])


def test_what_a_round_saved_without_its_record_did_not_happen(after_two_rounds, history, shapes):
    later = Knowledge(a_bank(3), initial_adapter(shapes, 20), history[2].text, {"ann": initial_adapter(shapes, 21)})
    after_two_rounds.save(3, later, lesson_of("ann"))
    number, known = after_two_rounds.resume(shapes, TEXT_SHAPES)
    assert number == 2
    assert same(known, history[2])


def test_a_round_that_was_missed_keeps_what_was_known(after_two_rounds, history, shapes):
    saved = after_two_rounds.save(3, history[2], NO_LESSON)
    after_two_rounds.save_record(record(3, saved, 2, outcome="quorum-missed"))
    number, known = after_two_rounds.resume(shapes, TEXT_SHAPES)
    assert number == 3
    assert same(known, history[2])


def test_records_come_back_as_they_were_written_in_order(after_two_rounds):
    records = Store(after_two_rounds.folder).records()
    assert [item.round for item in records] == [1, 2]
    saved = ("adapter-0002.safetensors", records[1].adapter_sha256)
    assert records[1] == record(2, saved, 2, ["ann", "cid"])


def test_the_digest_of_a_saved_adapter_is_that_of_the_file(store, history):
    name, digest = store.save(7, history[1])
    assert name == "adapter-0007.safetensors"
    assert digest == sha256((store.folder / name).read_bytes())


def test_every_version_of_the_bank_is_kept_and_comes_back(after_two_rounds):
    for version in (1, 2):
        assert encode_bank(after_two_rounds.bank(version)) == encode_bank(a_bank(version))
        assert after_two_rounds.bank_path(version).read_bytes() == encode_bank(a_bank(version))


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_bank_that_cannot_be_read_is_named_with_the_cure(after_two_rounds, shapes, damage):
    path = after_two_rounds.bank_path(2)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:20])
    else:
        path.unlink()
    for look in (lambda: after_two_rounds.bank(2), lambda: after_two_rounds.resume(shapes, TEXT_SHAPES)):
        with pytest.raises(FederationError, match=r"bank-0002\.safetensors.*restore it"):
            look()


def test_a_clients_own_adapter_that_the_records_name_and_is_missing_is_refused_by_name(after_two_rounds, shapes):
    after_two_rounds.own_path(1, "bob").unlink()
    with pytest.raises(FederationError, match=r"bob\.safetensors is missing.*restore it"):
        after_two_rounds.resume(shapes, TEXT_SHAPES)


def test_the_clients_files_of_a_round_are_only_those_that_it_made(after_two_rounds):
    folder = after_two_rounds.folder
    owned = sorted(str(path.relative_to(folder)) for path in folder.glob("own-*/*"))
    expected = [(1, "ann"), (1, "bob"), (2, "ann"), (2, "cid")]
    assert owned == [f"own-{number:04d}/{client}.safetensors" for number, client in expected]


def test_a_text_adapter_of_another_shape_is_refused_with_the_cure(after_two_rounds, shapes):
    wider = {name: (rows * 2, columns) for name, (rows, columns) in TEXT_SHAPES.items()}
    with pytest.raises(FederationError, match=r"another federation.*set `state` to a new folder"):
        after_two_rounds.resume(shapes, wider)
    assert after_two_rounds.resume(shapes, None)[0] == 2


def test_clients_start_from_their_own_adapter_or_the_global_one_at_their_rank(history):
    first = history[1]
    assert first.start_of("ann", 2) is first.own["ann"]
    assert first.start_of("new", 2) is first.adapter
    narrow = first.start_of("ann", 1)
    assert narrow["layer.0.lora_A"].shape == (1, 6)
    wide = dataclasses.replace(first, own={}).start_of("ann", 5)
    assert wide["layer.0.lora_B"].shape == (6, 5)


def test_nothing_but_whole_files_is_left_behind(after_two_rounds):
    names = sorted(path.name for path in after_two_rounds.folder.iterdir())
    adapters = [f"adapter-000{number}.safetensors" for number in range(3)]
    banks = ["bank-0001.safetensors", "bank-0002.safetensors"]
    assert names == [*adapters, *banks, "own-0001", "own-0002", "rounds.jsonl", "text-0002.safetensors"]


@pytest.mark.parametrize("damage", ["{", '{"round": 1}\n', "not json\n", '\n{"round": 1}\n'])
def test_damaged_records_are_refused_with_the_file_and_the_cure(after_two_rounds, shapes, damage):
    path = after_two_rounds.folder / "rounds.jsonl"
    path.write_text(path.read_text() + damage)
    with pytest.raises(FederationError, match=r"rounds\.jsonl is damaged.*move .* aside"):
        after_two_rounds.resume(shapes, TEXT_SHAPES)


def test_records_overwritten_with_binary_are_refused_with_the_file_and_the_cure(after_two_rounds, shapes):
    (after_two_rounds.folder / "rounds.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FederationError, match=r"rounds\.jsonl is damaged"):
        after_two_rounds.resume(shapes, TEXT_SHAPES)


def test_a_missing_adapter_that_the_records_name_is_refused_by_name(after_two_rounds, shapes):
    after_two_rounds.adapter_path(2).unlink()
    with pytest.raises(FederationError, match=r"adapter-0002\.safetensors is missing.*restore it"):
        after_two_rounds.resume(shapes, TEXT_SHAPES)


def test_the_state_of_a_federation_with_another_rank_is_refused_with_the_cure(after_two_rounds, shapes):
    other = {name: (rows * 2, columns) for name, (rows, columns) in shapes.items()}
    with pytest.raises(FederationError, match=r"another federation.*set `state` to a new folder"):
        after_two_rounds.resume(other, TEXT_SHAPES)


def test_the_state_of_a_federation_with_other_projections_is_refused(after_two_rounds, shapes):
    fewer = {name: shape for name, shape in shapes.items() if name.startswith("layer.0")}
    with pytest.raises(FederationError, match=r"differ in 2 factors"):
        after_two_rounds.resume(fewer, TEXT_SHAPES)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_adapter_is_refused(after_two_rounds, shapes, keep):
    path = after_two_rounds.adapter_path(2)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FederationError, match="state"):
        after_two_rounds.resume(shapes, TEXT_SHAPES)


def test_a_detail_with_odd_line_ends_keeps_the_records_readable(tmp_path):
    store = Store(tmp_path)
    odd = Refusal(client="eve", reason="wrong-names", detail="a\u2028b\x85c")
    for number in (1, 2):
        store.save_record(record(number, ("a", "b")).model_copy(update={"rejected": [odd]}))
    assert [record.rejected for record in store.records()] == [[odd], [odd]]


IDENTITY = Identity(
    federation="lab",
    model_digest="a" * 64,
    classes=("cat", "dog"),
    rank=4,
    alpha=8.0,
    projections=("q_proj",),
    first_block=0,
)


def test_a_run_keeps_its_name_and_counts_its_starts(tmp_path):
    (name, first), (again, second) = (Store(tmp_path).begin(IDENTITY) for _ in range(2))
    assert (name, first, second) == (again, 1, 2)


@pytest.mark.parametrize(("key", "value"), [("classes", ("dog", "cat")), ("alpha", 4.0), ("model_digest", "b" * 64)])
def test_a_state_folder_of_another_federation_is_refused_naming_what_differs(tmp_path, key, value):
    Store(tmp_path).begin(IDENTITY)
    with pytest.raises(FederationError, match=key):
        Store(tmp_path).begin(IDENTITY.model_copy(update={key: value}))


def test_a_damaged_run_file_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(FederationError, match=r"run\.json is damaged"):
        Store(tmp_path).begin(IDENTITY)
