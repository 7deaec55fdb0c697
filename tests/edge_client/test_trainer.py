"""A round on a device: the same bits for the same plan, and refusals when the plan is not for it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from clip_lora.errors import ModelError
from coordinator.checks import Expectation, Start, check_update
from coordinator.text_bank import make_bank
from edge_client.checkpoint import Checkpoint
from edge_client.encoders import Encoders
from edge_client.errors import DataError, OutOfMemoryError, UnfitPlanError
from edge_client.train import TrainingStopped
from protocol.codec import decode_update, encode_update


def never():
    return False


@pytest.fixture(scope="module")
def result(make_trainer, make_ready, bank):
    return make_trainer().run(make_ready(bank), never)


def test_an_update_is_what_the_coordinator_expects(result, make_ready, bank):
    ready = make_ready(bank)
    shapes = {name: array.shape for name, array in ready.adapter.items()}
    update = decode_update(encode_update(result.update))
    starts = {"ann": Start(ready.base, shapes)}
    assert check_update("ann", update, Expectation(ready.plan, starts, 256, 3)).accepted
    assert (result.round, result.base, result.samples) == (1, ready.base, 24)
    assert update.prototype_counts.sum() == 24
    assert update.prototype_correct.sum() == round(result.accuracy * 24)
    assert any((update.adapter[name] != array).any() for name, array in ready.adapter.items())


def test_the_same_plan_gives_the_same_bits_from_a_new_trainer_and_from_a_used_one(result, make_trainer, make_ready, bank):
    trainer = make_trainer()
    first = encode_update(trainer.run(make_ready(bank), never).update)
    assert first == encode_update(result.update)
    trainer.run(make_ready(bank, number=2), never)
    assert encode_update(trainer.run(make_ready(bank), never).update) == first


@pytest.mark.parametrize(("client", "number"), [("bob", 1), ("ann", 2)], ids=["another-client", "another-round"])
def test_another_client_or_round_takes_other_steps(result, make_trainer, make_ready, bank, client, number):
    other = make_trainer(client).run(make_ready(bank, number=number), never)
    assert encode_update(other.update) != encode_update(result.update)


@pytest.mark.parametrize(("of_plan", "of_device", "left"), [(8, 1, 3), (9, 1, 0), (1, 9, 0), (8, 8, 3), (1, 8, 3)])
def test_the_stricter_of_plan_and_device_decides_which_prototypes_leave(
    make_trainer, make_ready, bank, recipe, of_plan, of_device, left
):
    ready = make_ready(bank, recipe.model_copy(update={"min_prototype_count": of_plan}))
    update = make_trainer(min_prototype_count=of_device).run(ready, never).update
    assert len(update.prototypes) == len(update.prototype_counts) == left  # eight pictures a class


@pytest.mark.parametrize("bits", [4, 8])
def test_a_device_trains_with_the_bits_it_is_given(make_trainer, make_ready, bank, recipe, bits):
    encoder, _ = make_trainer(bits=bits).prepare(bank, recipe)
    kinds = {type(module).__name__ for module in encoder.model.modules()}
    assert ("Linear4bit" in kinds, "Linear8bitLt" in kinds) == (bits == 4, bits == 8)
    update = make_trainer(bits=bits).run(make_ready(bank), never).update
    assert all(np.isfinite(array).all() for array in update.adapter.values())


def test_a_stopped_run_can_be_run_again_to_the_same_bits(result, make_trainer, make_ready, bank):
    trainer, answers = make_trainer(), iter([False, True])
    with pytest.raises(TrainingStopped):
        trainer.run(make_ready(bank), lambda: next(answers))
    assert encode_update(trainer.run(make_ready(bank), never).update) == encode_update(result.update)


def test_model_and_pictures_are_loaded_once_for_many_rounds(make_trainer, make_ready, bank, recipe):
    trainer = make_trainer()
    first = trainer.prepare(bank, recipe)
    trainer.run(make_ready(bank), never)
    second = trainer.prepare(bank, recipe.model_copy(update={"learning_rate": 1e-4, "batch_size": 4}))
    assert first[0] is second[0]
    assert first[1] is second[1]


def test_another_rank_gets_another_adapter_on_the_same_pictures(make_trainer, make_ready, bank, recipe):
    trainer = make_trainer()
    trainer.run(make_ready(bank), never)
    _, pictures = trainer.prepare(bank, recipe)
    wider = recipe.model_copy(update={"rank": 6, "projections": ("v_proj",), "first_block": 4})
    update = trainer.run(make_ready(bank, wider), never).update
    assert {array.shape for array in update.adapter.values()} == {(6, 192), (192, 6)}
    assert len(update.adapter) == 4
    assert trainer.prepare(bank, wider)[1] is pictures


def test_classes_in_another_order_relabel_the_pictures(make_trainer, bank, recipe):
    trainer = make_trainer()
    _, data = trainer.prepare(bank, recipe)
    assert data.labels.tolist() == [1] * 8 + [2] * 8 + [0] * 8  # folders in order of name: one, two, zero
    turned = make_bank("tiny-clip", tuple(reversed(bank.classes)), ["a photo of a {}"])
    assert trainer.prepare(turned, recipe)[1].labels.tolist() == [1] * 8 + [0] * 8 + [2] * 8


def test_other_weights_than_the_federations_are_refused_naming_both(make_trainer, bank, recipe):
    with pytest.raises(UnfitPlanError) as caught:
        make_trainer().prepare(replace(bank, model_digest="f" * 64), recipe)
    assert "f" * 12 in str(caught.value)
    assert bank.model_digest[:12] in str(caught.value)


def test_a_later_bank_of_other_weights_is_refused_too(make_trainer, bank, recipe):
    trainer = make_trainer()
    trainer.prepare(bank, recipe)
    with pytest.raises(UnfitPlanError):
        trainer.prepare(replace(bank, model_digest="f" * 64), recipe)


def test_a_rank_above_the_profiles_is_refused_and_one_equal_to_it_is_not(make_trainer, bank, recipe):
    trainer = make_trainer(max_rank=4)
    trainer.prepare(bank, recipe)
    with pytest.raises(UnfitPlanError, match="rank 5, this device's profile allows 4"):
        trainer.prepare(bank, recipe.model_copy(update={"rank": 5}))


def test_a_local_copy_of_the_model_is_used_instead_of_the_federations_name(make_trainer, bank, recipe, tmp_path):
    elsewhere = replace(bank, model="lab/private-clip")
    encoder, _ = make_trainer(model="tiny-clip").prepare(elsewhere, recipe)
    assert encoder.name == "tiny-clip"
    with pytest.raises(ModelError, match=r"config\.json"):
        make_trainer(model=str(tmp_path)).prepare(elsewhere, recipe)


def test_pictures_that_do_not_fit_the_bank_stop_the_round_with_the_reason(make_trainer, make_ready, tmp_path):
    other = make_bank("tiny-clip", ("cat", "dog"), ["a photo of a {}"])
    with pytest.raises(DataError, match="'one', 'two', 'zero'"):
        make_trainer().run(make_ready(other), never)
    with pytest.raises(DataError, match="no such folder"):
        make_trainer(source=str(tmp_path / "absent")).run(make_ready(other), never)


EPOCHS = {"local_steps": 8, "batch_size": 8}  # 24 pictures: an epoch is three steps


@pytest.fixture
def long_ready(make_ready, bank, recipe):
    return make_ready(bank, recipe.model_copy(update=EPOCHS))


def killed_after(steps):
    """Stopped as kill -9 stops: nothing is done about it."""

    class KilledError(Exception):
        pass

    left = iter(range(steps))

    def stopped():
        if next(left, None) is None:
            raise KilledError
        return False

    return stopped, KilledError


@pytest.mark.parametrize("steps", [1, 3, 4, 6, 7])
def test_a_killed_training_goes_on_after_its_last_epoch_to_the_same_bits(make_trainer, long_ready, tmp_path, steps, caplog):
    calm = make_trainer().run(long_ready, never)
    path = tmp_path / "checkpoint"
    stopped, killed = killed_after(steps)
    (half := path.with_name(f".{path.name}.abcdefgh")).write_bytes(b"half of one")  # as a power cut leaves it
    trainer = make_trainer(checkpoint=Checkpoint(path, every_s=0.0))
    assert not half.exists()
    with pytest.raises(killed):
        trainer.run(long_ready, stopped)
    taken = []
    with caplog.at_level("INFO"):
        again = make_trainer(checkpoint=Checkpoint(path)).run(long_ready, lambda: bool(taken.append(1)))
    assert len(taken) == 8 - (steps - 1) // 3 * 3
    assert ("goes on after step" in caplog.text) == (steps > 3)
    assert encode_update(again.update) == encode_update(calm.update)
    assert (again.loss, again.accuracy) == (calm.loss, calm.accuracy)
    assert not path.exists()


def test_a_training_that_is_asked_to_stop_loses_no_step(make_trainer, long_ready, tmp_path):
    path, answers = tmp_path / "checkpoint", iter([False, False, True])
    trainer = make_trainer(checkpoint=Checkpoint(path))
    with pytest.raises(TrainingStopped):
        trainer.run(long_ready, lambda: next(answers))
    taken = []
    again = make_trainer(checkpoint=Checkpoint(path)).run(long_ready, lambda: bool(taken.append(1)))
    assert len(taken) == 6
    assert encode_update(again.update) == encode_update(make_trainer().run(long_ready, never).update)


@pytest.mark.parametrize("damage", ["torn", "not one", "another round's", "other shapes"])
def test_a_checkpoint_that_is_not_of_this_training_is_not_used(make_trainer, make_ready, long_ready, bank, tmp_path, damage):
    path = tmp_path / "checkpoint"
    stopped, killed = killed_after(5)
    with pytest.raises(killed):
        make_trainer(checkpoint=Checkpoint(path, every_s=0.0)).run(long_ready, stopped)
    ready = long_ready
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "not one":
        path.write_bytes(b"{}")
    elif damage == "other shapes":
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).reshape(-1)[:1].contiguous() for name in file.keys()}  # noqa: SIM118 - no mapping
            save_file(tensors, path, file.metadata())
    else:
        ready = make_ready(bank, long_ready.plan.recipe, number=2)
    taken = []
    again = make_trainer(checkpoint=Checkpoint(path)).run(ready, lambda: bool(taken.append(1)))
    assert len(taken) == 8
    assert encode_update(again.update) == encode_update(make_trainer().run(ready, never).update)


def test_a_checkpoint_of_other_pictures_is_not_used(make_trainer, long_ready, home, tmp_path):
    path, other = tmp_path / "checkpoint", tmp_path / "pictures"
    stopped, killed = killed_after(5)
    with pytest.raises(killed):
        make_trainer(checkpoint=Checkpoint(path, every_s=0.0)).run(long_ready, stopped)
    shutil.copytree(home, other)
    next(other.rglob("*.png")).touch()
    taken = []
    make_trainer(source=str(other), checkpoint=Checkpoint(path)).run(long_ready, lambda: bool(taken.append(1)))
    assert len(taken) == 8


def test_no_checkpoint_is_written_more_often_than_told(make_trainer, long_ready, tmp_path):
    path = tmp_path / "checkpoint"
    seen = []
    make_trainer(checkpoint=Checkpoint(path, every_s=3600.0)).run(long_ready, lambda: bool(seen.append(path.exists())))
    assert not any(seen)


JETSON = "NvMapMemAllocInternalTagged: 1075072515 error 12"
ASSERT = 'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp":1090'


def full_above(limit, problem, encoders):
    """Encoders whose memory runs out at batches above `limit`, with a Jetson's words, while they train."""
    got = encoders.get

    def get(*arguments):
        encoder = got(*arguments)
        head = type(encoder).head

        def narrow(hidden):
            if torch.is_grad_enabled() and len(hidden) > limit:
                raise RuntimeError(problem)
            return head(encoder, hidden)

        encoder.head = narrow
        return encoder

    encoders.get = get
    return encoders


@pytest.mark.parametrize("problem", [JETSON, ASSERT, "CUDA error: out of memory", "CUDA out of memory. Tried to allocate"])
def test_where_memory_runs_out_half_the_batch_is_tried_once_and_kept(make_trainer, make_ready, bank, problem):
    told = []
    trainer = make_trainer(encoders=full_above(4, problem, Encoders()), batch_size=8, report=told.append)
    update = encode_update(trainer.run(make_ready(bank), never).update)
    assert told == [f"batches of 4: memory ran out ({problem})"]
    assert update == encode_update(make_trainer(batch_size=4).run(make_ready(bank), never).update)
    trainer.run(make_ready(bank, number=2), never)
    assert len(told) == 1


def test_where_half_the_batch_does_not_fit_either_the_cure_is_named(make_trainer, make_ready, bank):
    trainer = make_trainer(encoders=full_above(2, JETSON, Encoders()), batch_size=8)
    with pytest.raises(OutOfMemoryError, match=r"batches of 4 too .*clipcast plan"):
        trainer.run(make_ready(bank), never)


def test_another_failure_is_not_tried_again(make_trainer, make_ready, bank):
    told = []
    trainer = make_trainer(encoders=full_above(0, "CUDA error: an illegal memory access", Encoders()), report=told.append)
    with pytest.raises(RuntimeError, match="illegal"):
        trainer.run(make_ready(bank), never)
    assert told == []


def test_blocks_computed_again_on_the_way_back_give_the_same_bits(result, make_trainer, make_ready, bank):
    runs = []
    encoders = Encoders()
    trainer = make_trainer(encoders=encoders, checkpointing=True)
    block = encoders.get("tiny-clip", 4, "cpu", make_ready(bank).plan.recipe)._tower.vision_model.encoder.layers[0]
    block.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    again = trainer.run(make_ready(bank), never)
    assert encode_update(again.update) == encode_update(result.update)
    assert runs.count(True) == 2 * make_ready(bank).plan.recipe.local_steps
