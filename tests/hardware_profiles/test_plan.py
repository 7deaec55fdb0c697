"""What a training takes, and what fits; tests/edge_client/test_memory.py compares with measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_profiles.facts import ProfileError
from hardware_profiles.plan import KNOWN, Training, fit, plan, predict
from hardware_profiles.profile import load

B32, L14 = KNOWN["openai/clip-vit-base-patch32"], KNOWN["openai/clip-vit-large-patch14"]
TRAINING = Training(4, 4, 0, 16, 4, "bfloat16", "cuda")
ANY = st.builds(
    Training,
    rank=st.integers(1, 64),
    projections=st.integers(1, 4),
    first_block=st.integers(0, 11),
    batch=st.integers(1, 256),
    bits=st.sampled_from([4, 8, 32]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    device=st.sampled_from(["cpu", "cuda"]),
    checkpointing=st.booleans(),
)


def test_the_shapes_have_the_published_numbers_of_weights():
    """87.8 million in ViT-B/32's image tower, of which 85 in its blocks; ViT-L/14's has 304."""
    assert B32.quantisable + B32.others == pytest.approx(87.85e6, rel=0.002)
    assert B32.quantisable == pytest.approx(85e6, rel=0.005)
    assert L14.quantisable + L14.others == pytest.approx(304e6, rel=0.005)


def test_four_bits_save_little_of_a_small_model_and_more_of_a_large_one():
    profile = load("jetson-orin-nano-8gb")
    assert plan(profile, B32, TRAINING).saved / 1024 == pytest.approx(0.12, abs=0.005)
    assert plan(profile, L14, TRAINING).saved / 1024 > 0.4


@given(ANY)
def test_less_is_less(training):
    memory = predict(B32, training)
    assert all(mib >= 0 for mib in vars(memory).values())
    assert memory.total == pytest.approx(sum(vars(memory).values()))
    assert predict(B32, replace(training, batch=training.batch + 1)).total > memory.total
    assert predict(B32, replace(training, checkpointing=True)).total <= memory.total
    assert predict(B32, replace(training, rank=training.rank + 1)).total > memory.total
    assert predict(L14, training).total > memory.total


def test_of_pictures_the_pixels_are_kept_or_behind_frozen_blocks_what_comes_out_of_those():
    def pictures(number, first_block):
        return predict(L14, replace(TRAINING, pictures=number, first_block=first_block)).pictures

    assert pictures(100, 0) == pytest.approx(100 * 224 * 224 * 3 / 2**20)
    assert pictures(100, 12) == pytest.approx(100 * 257 * 1024 * 4 / 2**20)
    assert pictures(10_000, 0) == pictures(10_000, 12) == 512


@given(ANY, st.floats(300, 30_000))
def test_what_fits_fits_and_asks_for_no_more_than_what_was_wanted(wanted, budget):
    found = fit(B32, wanted, budget)
    if found is None:
        smallest = replace(wanted, batch=1, bits=min(wanted.bits, 4) if wanted.bits != 32 else 32, checkpointing=True)
        assert predict(B32, smallest).total > budget
        return
    assert predict(B32, found).total <= budget
    assert found.batch <= wanted.batch
    if predict(B32, wanted).total <= budget:
        assert found == wanted
    assert replace(wanted, batch=found.batch, bits=found.bits, checkpointing=found.checkpointing) == found


def test_the_batch_is_kept_as_long_as_anything_else_helps():
    whole = predict(L14, TRAINING).total
    assert fit(L14, TRAINING, whole) == TRAINING
    assert fit(L14, TRAINING, whole - 1) == replace(TRAINING, checkpointing=True)
    least = predict(L14, replace(TRAINING, checkpointing=True)).total
    assert fit(L14, TRAINING, least - 1).batch == 8
    eight = replace(TRAINING, bits=8)
    found = fit(L14, eight, predict(L14, replace(eight, checkpointing=True)).total - 1)
    assert (found.bits, found.batch) == (4, 16)


def test_a_vit_l_14_fits_a_4_gb_board_with_blocks_computed_again():
    found = plan(load("jetson-orin-nano-4gb"), L14, replace(TRAINING, batch=8))
    assert found.training.checkpointing or found.training.batch < 8
    assert found.memory.total <= found.budget


def test_what_cannot_fit_is_refused_in_a_sentence():
    with pytest.raises(ProfileError, match=r"does not fit: with a batch of 1 .* smaller model"):
        plan(load("jetson-orin-nano-4gb"), replace(L14, blocks=240), TRAINING)


def test_a_board_that_cannot_train_is_refused_with_what_to_do_instead():
    with pytest.raises(ProfileError, match=r"Nano 4GB cannot train: .*Orin"):
        plan(load("jetson-nano-4gb"), B32, TRAINING)


def test_a_profile_of_any_size_wants_to_know_the_memory():
    with pytest.raises(ProfileError, match="--memory"):
        plan(load("generic-cuda"), B32, TRAINING)
    assert plan(load("generic-cuda"), B32, TRAINING, 8192).training == TRAINING
