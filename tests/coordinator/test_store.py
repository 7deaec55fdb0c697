"""A federation at rest: what a restart finds, and what it says when the folder is damaged or another federation's."""

from __future__ import annotations

import numpy as np
import pytest

from clip_lora.lora import initial_adapter
from coordinator.errors import FederationError
from coordinator.store import Identity, Refusal, RoundRecord, Store
from protocol.codec import decode_bank, encode_adapter, sha256
from protocol.messages import TextBank


def record(number, name, digest, outcome="aggregated"):
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
        adapter=name,
        adapter_sha256=digest,
    )


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "state")


@pytest.fixture
def after_two_rounds(store, shapes):
    for number in range(3):
        name, digest = store.save_adapter(number, initial_adapter(shapes, number))
        if number:
            store.save_record(record(number, name, digest))
    return store


def test_a_folder_that_is_not_there_starts_from_nothing(store, shapes):
    assert store.records() == []
    assert store.resume(shapes) == (0, None)


def test_a_federation_stopped_before_its_first_record_keeps_its_initial_adapter(store, shapes):
    adapter = initial_adapter(shapes, 9)
    store.save_adapter(0, adapter)
    number, found = store.resume(shapes)
    assert number == 0
    assert encode_adapter(found) == encode_adapter(adapter)


def test_a_restart_continues_from_the_newest_round(after_two_rounds, shapes):
    number, adapter = Store(after_two_rounds.folder).resume(shapes)
    assert number == 2
    assert encode_adapter(adapter) == encode_adapter(initial_adapter(shapes, 2))


def test_an_adapter_saved_without_its_record_is_not_a_round_that_happened(after_two_rounds, shapes):
    after_two_rounds.save_adapter(3, initial_adapter(shapes, 3))
    assert after_two_rounds.resume(shapes)[0] == 2


def test_records_come_back_as_they_were_written_in_order(after_two_rounds):
    records = Store(after_two_rounds.folder).records()
    assert [item.round for item in records] == [1, 2]
    assert records[1] == record(2, "adapter-0002.safetensors", records[1].adapter_sha256)


def test_the_digest_of_a_saved_adapter_is_that_of_the_file(store, shapes):
    name, digest = store.save_adapter(7, initial_adapter(shapes, 7))
    assert name == "adapter-0007.safetensors"
    assert digest == sha256((store.folder / name).read_bytes())


def test_the_bank_is_kept_in_the_format_that_travels(store):
    bank = TextBank(1, ("cat", "dog"), ("a {}",), np.eye(2, 4, dtype=np.float32), 14.0, "tiny-clip", "d" * 64)
    store.save_bank(bank)
    back = decode_bank(store.bank_path.read_bytes())
    assert (back.classes, back.model_digest) == (bank.classes, bank.model_digest)
    assert np.array_equal(back.embeddings, bank.embeddings)


def test_nothing_but_whole_files_is_left_behind(after_two_rounds):
    names = sorted(path.name for path in after_two_rounds.folder.iterdir())
    assert names == ["adapter-0000.safetensors", "adapter-0001.safetensors", "adapter-0002.safetensors", "rounds.jsonl"]


@pytest.mark.parametrize("damage", ["{", '{"round": 1}\n', "not json\n", '\n{"round": 1}\n'])
def test_damaged_records_are_refused_with_the_file_and_the_cure(after_two_rounds, shapes, damage):
    path = after_two_rounds.folder / "rounds.jsonl"
    path.write_text(path.read_text() + damage)
    with pytest.raises(FederationError, match=r"rounds\.jsonl is damaged.*move .* aside"):
        after_two_rounds.resume(shapes)


def test_records_overwritten_with_binary_are_refused_with_the_file_and_the_cure(after_two_rounds, shapes):
    (after_two_rounds.folder / "rounds.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FederationError, match=r"rounds\.jsonl is damaged"):
        after_two_rounds.resume(shapes)


def test_a_missing_adapter_that_the_records_name_is_refused_by_name(after_two_rounds, shapes):
    after_two_rounds.adapter_path(2).unlink()
    with pytest.raises(FederationError, match=r"adapter-0002\.safetensors is missing.*restore it"):
        after_two_rounds.resume(shapes)


def test_the_state_of_a_federation_with_another_rank_is_refused_with_the_cure(after_two_rounds, shapes):
    other = {name: (rows * 2, columns) for name, (rows, columns) in shapes.items()}
    with pytest.raises(FederationError, match=r"another federation.*set `state` to a new folder"):
        after_two_rounds.resume(other)


def test_the_state_of_a_federation_with_other_projections_is_refused(after_two_rounds, shapes):
    fewer = {name: shape for name, shape in shapes.items() if name.startswith("layer.0")}
    with pytest.raises(FederationError, match=r"differ in 2 factors"):
        after_two_rounds.resume(fewer)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_truncated_adapter_is_refused(after_two_rounds, shapes, keep):
    path = after_two_rounds.adapter_path(2)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FederationError, match="state"):
        after_two_rounds.resume(shapes)


def test_a_detail_with_odd_line_ends_keeps_the_records_readable(tmp_path):
    store = Store(tmp_path)
    odd = Refusal(client="eve", reason="wrong-names", detail="a\u2028b\x85c")
    for number in (1, 2):
        store.save_record(record(number, "a", "b").model_copy(update={"rejected": [odd]}))
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
