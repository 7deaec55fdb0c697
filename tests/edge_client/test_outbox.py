"""The outbox: what a restart finds, wherever the power was cut."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from edge_client.errors import StateError
from edge_client.outbox import Outbox, Work
from protocol.messages import TrainingResult, Update
from protocol.transfer.parcel import pack


def some_work(number=1):
    none, empty = np.zeros(0, np.int32), np.zeros((0, 4), np.float32)
    update = Update({"x.lora_A": np.full((2, 3), number, np.float32)}, empty, none, none, none, empty, none)
    return Work(f"{number:064x}", pack(TrainingResult(number, "ab" * 32, update, 6, 0.5, 0.25, 1.5)))


@pytest.fixture
def outbox(tmp_path):
    outbox = Outbox(tmp_path / "state")
    yield outbox
    outbox.close()


def test_what_was_kept_is_found_and_replaced_by_the_next(outbox, tmp_path):
    assert outbox.load() is None
    for number in (1, 2):
        outbox.keep(some_work(number))
        outbox.keep(some_work(number))
        assert outbox.load() == some_work(number)
    assert len(list((tmp_path / "state" / "outbox").iterdir())) == 2


@pytest.mark.parametrize("damage", ["note", "blob", "no blob", "torn note"])
def test_what_cannot_be_read_is_as_if_it_were_not_there(outbox, tmp_path, damage, caplog):
    outbox.keep(some_work())
    folder = tmp_path / "state" / "outbox"
    (blob,) = folder.glob("*.safetensors")
    note = folder / "offer.json"
    match damage:
        case "note":
            note.write_bytes(b"{}")
        case "torn note":
            note.write_bytes(note.read_bytes()[:-5])
        case "blob":
            blob.write_bytes(blob.read_bytes()[:-1])
        case _:
            blob.unlink()
    assert outbox.load() is None
    assert "trained again" in caplog.text
    outbox.keep(some_work())
    assert outbox.load() == some_work()


def test_a_power_cut_at_any_durable_operation_leaves_the_old_or_the_new(outbox, monkeypatch):
    class PowerCutError(Exception):
        pass

    places = {"fsync": os, "replace": Path, "unlink": Path}
    for cut in range(40):
        outbox.keep(some_work(1))
        left = cut
        with monkeypatch.context() as patch:

            def counted(original):
                def call(*args, **kwargs):
                    nonlocal left
                    left -= 1
                    if left < 0:
                        raise PowerCutError
                    return original(*args, **kwargs)

                return call

            for name, owner in places.items():
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                outbox.keep(some_work(2))
            except PowerCutError:
                pass
            else:
                assert left >= 0
                assert outbox.load() == some_work(2)
                assert cut > 4
                return
        assert outbox.load() in (some_work(1), some_work(2))
    raise AssertionError("it never came through")


def test_one_client_at_a_time_works_in_a_folder(outbox, tmp_path):
    with pytest.raises(StateError, match=r"another client is at work in .* give this one its own `state`"):
        Outbox(tmp_path / "state")
    outbox.close()
    Outbox(tmp_path / "state").close()


def test_a_folder_that_cannot_be_made_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="Set `state` to a folder that can be written"):
        Outbox(tmp_path / "file" / "state")
