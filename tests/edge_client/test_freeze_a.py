"""FFA-LoRA on a device: A stays as the round began, only B is trained, whatever the trainer did before or is stopped by."""

from __future__ import annotations

import pytest

from coordinator.checks import Expectation, Start, check_update
from coordinator.learning import stored
from edge_client.checkpoint import Checkpoint
from edge_client.train import TrainingStopped
from protocol.codec import decode_update, encode_update


def never():
    return False


def factors(update, end):
    return {name: factor.tobytes() for name, factor in update.adapter.items() if name.endswith(end)}


@pytest.fixture(params=[0, 4], ids=["all-blocks", "frozen-blocks"])
def ready(request, make_ready, bank, recipe):
    return make_ready(bank, recipe.model_copy(update={"freeze_a": True, "first_block": request.param, "local_steps": 7}))


def test_a_comes_back_bit_for_bit_and_b_has_moved(make_trainer, ready):
    update = make_trainer().run(ready, never).update
    start = {name: factor.tobytes() for name, factor in ready.adapter.items()}
    assert factors(update, "lora_A") == {name: start[name] for name in factors(update, "lora_A")}
    assert all(factor != start[name] for name, factor in factors(update, "lora_B").items())


def test_the_coordinator_takes_it_as_it_travels(make_trainer, ready):
    shapes = {name: array.shape for name, array in ready.adapter.items()}
    update = decode_update(encode_update(make_trainer().run(ready, never).update))
    starts = {"ann": Start(ready.base, shapes, stored(ready.adapter))}
    assert check_update("ann", update, Expectation(ready.plan, starts, 256, 3)).accepted


def test_it_takes_other_steps_than_training_both_and_leaves_no_trace_in_the_encoder(make_trainer, ready, make_ready, bank):
    trainer = make_trainer()
    both = make_ready(bank, ready.plan.recipe.model_copy(update={"freeze_a": False}))
    before, frozen, after = (encode_update(trainer.run(plan, never).update) for plan in (both, ready, both))
    assert before == after != frozen


def test_a_training_that_is_stopped_goes_on_to_the_same_bits(make_trainer, ready, tmp_path):
    path, answers = tmp_path / "checkpoint", iter([False, False, True])
    with pytest.raises(TrainingStopped):
        make_trainer(checkpoint=Checkpoint(path)).run(ready, lambda: next(answers))
    taken = []
    again = make_trainer(checkpoint=Checkpoint(path)).run(ready, lambda: bool(taken.append(1)))
    assert len(taken) == 5
    assert encode_update(again.update) == encode_update(make_trainer().run(ready, never).update)
