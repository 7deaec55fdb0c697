"""The frozen blocks are computed once per picture: the same features, losses and bits, less work, bounded memory."""

from __future__ import annotations

import gc
import logging
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from clip_lora.lora import adapter_state, load_adapter
from clip_lora.preprocess import load_preprocessing
from clip_lora.shapes import adapter_shapes, initial_adapter
from clip_lora.towers import load_sizes, locate
from edge_client.data import Dataset, find_pictures, open_dataset
from edge_client.encoder import ImageEncoder
from edge_client.frozen import HiddenStore
from edge_client.train import local_steps
from protocol.messages import Recipe

FIRST = 4  # of tiny-clip's 6 blocks
RECIPE = Recipe(local_steps=1, batch_size=8, first_block=FIRST)
CLASSES = ("zero", "one", "two")
ROW = (3, 5)
ROW_BYTES = 3 * 5 * 4


class Uncached(ImageEncoder):
    """Every step through the whole tower, as without a frozen part."""

    def encode(self, data, indices):
        return self.features(data.pixels(indices))


def trained(encoder, first_block=FIRST):
    """The encoder with an adapter of which no factor is zero."""
    shapes = adapter_shapes(load_sizes("tiny-clip"), "vision", RECIPE.model_copy(update={"first_block": first_block}))
    rng = np.random.default_rng(5)
    load_adapter(encoder.model, {n: rng.normal(0, 0.05, shape).astype(np.float32) for n, shape in shapes.items()})
    return encoder


def make(bits=4, first_block=FIRST, model="tiny-clip", store=None, kind=ImageEncoder):
    recipe = RECIPE.model_copy(update={"first_block": first_block})
    return trained(kind(model, bits, "cpu", recipe, store), first_block)


def batches_through_block_0(encoder):
    """The batch size of each forward pass through block 0, filled as they happen."""
    seen: list[int] = []
    block = encoder.model.get_base_model().vision_model.encoder.layers[0]
    block.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[0]))
    return seen


def encoded(encoder, data, indices):
    with torch.no_grad():
        return encoder.encode(data, indices).numpy()


def whole(encoder, data, indices):
    with torch.no_grad():
        return encoder.features(data.pixels(indices)).numpy()


@pytest.fixture
def pictures(home):
    """The digits of `home`, opened afresh: nothing of them is in memory."""
    return open_dataset(str(home), CLASSES, load_preprocessing("tiny-clip"))


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory):
    """Tiny-clip with another patch embedding."""
    folder = tmp_path_factory.mktemp("models") / "clip"
    shutil.copytree(locate("tiny-clip"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["vision_model.embeddings.patch_embedding.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def by_transformers(encoder, data, indices):
    """Features by the tower's own forward pass, all tokens through all blocks."""
    embeds = encoder.model(pixel_values=encoder._normalised(data.pixels(indices))).image_embeds.float()
    return torch.nn.functional.normalize(embeds, dim=-1)


# --- the encoder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("first_block", [1, FIRST, 5])
def test_features_by_way_of_the_store_are_those_of_the_whole_tower(pictures, bits, first_block):
    encoder = make(bits, first_block)
    indices = [3, 20, 3, 11, 0]
    expected = whole(encoder, pictures, indices)
    for _ in range(2):
        found = encoded(encoder, pictures, indices)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1.0, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("first_block", [0, FIRST, 5])
def test_features_and_gradients_are_those_of_the_towers_own_forward_pass(pictures, bits, first_block):
    encoder, indices = make(bits, first_block), [0, 9, 17]
    parameters = {n: p for n, p in encoder.model.named_parameters() if p.requires_grad}
    weights = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    found, gradients = [], []
    for features in (by_transformers(encoder, pictures, indices), encoder.features(pictures.pixels(indices))):
        encoder.model.zero_grad(set_to_none=True)
        (features * weights).sum().backward()
        found.append(features.detach())
        gradients.append({name: p.grad.clone() for name, p in parameters.items()})
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)
    for name in parameters:
        assert gradients[0][name].abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradients[0][name], atol=1e-4, rtol=1e-3)


def test_hidden_and_head_are_the_two_halves_of_the_tower(pictures):
    encoder = make()
    pixels = pictures.pixels([1, 2])
    hidden = encoder.hidden(pixels)
    assert hidden.shape == (2, 65, 192)
    assert not hidden.requires_grad
    inner = []
    block = encoder.model.get_base_model().vision_model.encoder.layers[FIRST]
    handle = block.register_forward_pre_hook(lambda _module, inputs: inner.append(inputs[0].detach()))
    expected = encoder.features(pixels)
    handle.remove()
    torch.testing.assert_close(hidden, inner[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.head(hidden), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_ten_training_steps_have_the_same_losses_with_and_without_the_store(pictures, bank, bits):
    ends, losses = [], []
    for kind in (ImageEncoder, Uncached):
        encoder = make(bits, kind=kind)
        losses.append([local_steps(encoder, pictures, bank, RECIPE, seed, 32).loss for seed in range(10)])
        ends.append(adapter_state(encoder.model))
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)
    assert len(set(losses[0])) == 10
    assert losses[0][0] > 0
    for name in ends[0]:
        np.testing.assert_allclose(ends[0][name], ends[1][name], atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_gradients_reach_every_factor_and_are_those_of_the_whole_tower(pictures, bits):
    encoder = make(bits)
    indices = [0, 9, 17]
    parameters = {n: p for n, p in encoder.model.named_parameters() if p.requires_grad}
    assert {int(name.split("layers.")[1].split(".")[0]) for name in parameters} == {FIRST, 5}
    assert len(parameters) == 2 * 4 * 2
    weights = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    gradients = []
    for features in (encoder.features(pictures.pixels(indices)), encoder.encode(pictures, indices)):
        encoder.model.zero_grad(set_to_none=True)
        (features * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})
    assert gradients[1].keys() == parameters.keys()
    for name, gradient in gradients[1].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, gradients[0][name], atol=1e-5, rtol=1e-4)


def test_a_picture_passes_the_frozen_blocks_once_and_alone_whatever_the_adapter(pictures):
    encoder = make()
    seen = batches_through_block_0(encoder)
    encoded(encoder, pictures, [0, 1, 2, 3])
    assert seen == [1, 1, 1, 1]
    encoded(encoder, pictures, [3, 1])
    encoded(encoder, pictures, [0, 0, 2])
    shapes = adapter_shapes(load_sizes("tiny-clip"), "vision", RECIPE)
    load_adapter(encoder.model, initial_adapter(shapes, 1))
    encoded(encoder, pictures, [2, 3])
    assert seen == [1, 1, 1, 1]
    encoded(encoder, pictures, [3, 4])
    assert seen == [1, 1, 1, 1, 1]


def test_without_a_frozen_block_nothing_is_stored_and_pictures_pass_together(pictures):
    store = HiddenStore()
    encoder = make(first_block=0, store=store)
    seen = batches_through_block_0(encoder)
    for _ in range(2):
        np.testing.assert_array_equal(encoded(encoder, pictures, [0, 1, 2]), whole(encoder, pictures, [0, 1, 2]))
    assert seen == [3] * 4
    assert store.entries == 0


def test_the_same_bits_whatever_was_computed_before_and_wherever_it_is_kept(pictures, tmp_path):
    """What a run that is interrupted and begun again rests on."""
    wanted = [7, 2, 13]
    calm = encoded(make(), pictures, wanted)
    for history, budget in (
        ([range(24)], 10**9),
        ([[2], [13, 7]], 10**9),
        ([[13, 5, 2], [7, 6]], 0),
        ([range(24)], 70_000),
    ):
        encoder = make(store=HiddenStore(budget, folder=tmp_path))
        for batch in history:
            encoded(encoder, pictures, batch)
        assert encoded(encoder, pictures, wanted).tobytes() == calm.tobytes()


def test_encoders_alike_share_a_store_and_the_work(pictures):
    store = HiddenStore()
    first = make(store=store)
    expected = encoded(first, pictures, [0, 1])
    second = make(store=store)
    seen = batches_through_block_0(second)
    np.testing.assert_array_equal(encoded(second, pictures, [0, 1]), expected)
    assert seen == []
    assert store.entries == 2


@pytest.mark.parametrize("other", [{"bits": 8}, {"bits": 32}, {"first_block": 3}, {"model": "other_weights"}])
def test_other_bits_blocks_and_models_have_entries_of_their_own(request, pictures, other):
    if "model" in other:
        other = {"model": request.getfixturevalue(other["model"])}
    store = HiddenStore()
    first = make(store=store)
    before = encoded(first, pictures, [0, 1])
    second = make(store=store, **other)
    seen = batches_through_block_0(second)
    found = encoded(second, pictures, [0, 1])
    assert seen == [1, 1]
    assert store.entries == 4
    np.testing.assert_allclose(found, whole(second, pictures, [0, 1]), atol=1e-5)
    assert np.abs(found - before).max() > 1e-3
    np.testing.assert_array_equal(encoded(first, pictures, [0, 1]), before)


def test_new_weights_under_the_same_name_are_another_model(pictures, other_weights, tmp_path):
    store, folder = HiddenStore(), tmp_path / "clip"
    shutil.copytree(locate("tiny-clip"), folder)
    encoded(make(model=str(folder), store=store), pictures, [0])
    shutil.copy(Path(other_weights) / "model.safetensors", folder)
    second = make(model=str(folder), store=store)
    np.testing.assert_allclose(encoded(second, pictures, [0]), whole(second, pictures, [0]), atol=1e-5)


def test_the_towers_stay_in_train_mode(pictures):
    """In eval mode bitsandbytes repacks 4-bit weights at the first forward without gradients (docs/log.md)."""
    encoder = make()
    encoded(encoder, pictures, [0, 1])
    assert all(module.training for module in encoder.model.modules())
    encoder.encode(pictures, [0, 1]).sum().backward()


# --- the pictures --------------------------------------------------------------------------------------------------


def test_pixels_that_are_needed_once_are_not_kept_in_memory(pictures):
    encoder = make()
    encoded(encoder, pictures, range(6))
    assert pictures._kept == {}
    pictures.pixels([0, 1])
    assert len(pictures._kept) == 2
    kept = pictures.pixels([0], keep=False)
    np.testing.assert_array_equal(kept, pictures.pixels([0]))


def test_another_picture_under_the_same_name_is_computed_anew(tmp_path):
    preprocessing = load_preprocessing("tiny-clip")
    (tmp_path / "zero").mkdir()
    file = tmp_path / "zero" / "a.png"
    rng = np.random.default_rng(0)
    encoder = make()
    seen = batches_through_block_0(encoder)
    keys = []
    for _ in range(2):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file)
        data = open_dataset(str(tmp_path), CLASSES, preprocessing)
        found = encoded(encoder, data, [0])
        keys += data.keys([0])
        np.testing.assert_allclose(found, whole(encoder, data, [0]), atol=1e-5)
    assert seen == [1, 1, 1, 1]  # stored, whole, stored, whole
    assert keys[0] != keys[1]
    again = open_dataset(str(tmp_path), CLASSES, preprocessing)
    assert again.keys([0]) == [keys[1]]


def test_a_picture_that_vanishes_after_its_first_use_is_not_missed(home, tmp_path):
    shutil.copytree(home / "one", tmp_path / "one")
    data = open_dataset(str(tmp_path), CLASSES, load_preprocessing("tiny-clip"))
    encoder = make()
    expected = encoded(encoder, data, [0, 1])
    shutil.rmtree(tmp_path / "one")
    np.testing.assert_array_equal(encoded(encoder, data, [0, 1]), expected)


def test_keys_name_pictures_and_how_they_are_cut(pictures, home):
    keys = pictures.keys(range(24))
    assert len(set(keys)) == 24
    assert pictures.keys([23, 0]) == [keys[23], keys[0]]
    assert open_dataset(str(home), CLASSES, pictures.preprocessing).keys(range(24)) == keys
    relabelled = Dataset(pictures.pictures, np.zeros(24, np.int32), pictures.preprocessing)
    assert relabelled.keys(range(24)) == keys


@pytest.mark.parametrize(("part", "value"), [("short_side", 99), ("crop", 32)])
def test_another_cut_of_the_same_picture_has_another_key(pictures, part, value):
    preprocessing = pictures.preprocessing
    other = type(preprocessing)(**{**vars(preprocessing), part: value})
    assert Dataset(pictures.pictures, pictures.labels, other).keys([0]) != pictures.keys([0])


def test_digits_need_no_file_to_have_keys():
    digits = find_pictures("digits")
    assert len({picture.key for picture in digits}) == len(digits) == 1797


# --- the store -----------------------------------------------------------------------------------------------------


def row(key):
    return np.random.default_rng(key).normal(size=ROW).astype(np.float32)


class Counting:
    """Computes rows and remembers for which keys."""

    def __init__(self):
        self.computed = []

    def get(self, store, keys):
        def compute(position):
            self.computed.append(keys[position])
            return row(keys[position])

        return store.get(keys, compute)


@settings(max_examples=150, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=6), max_size=8),
    budget=st.integers(0, 14 * ROW_BYTES),
    segment=st.integers(1, 5 * ROW_BYTES),
)
def test_any_order_of_keys_and_any_budget_give_the_same_rows_each_computed_once(batches, budget, segment):
    store, counting = HiddenStore(budget, segment), Counting()
    for keys in batches:
        found = counting.get(store, keys)
        assert found.shape == (len(keys), *ROW)
        assert found.dtype == np.float32
        assert found.tobytes() == np.stack([row(key) for key in keys]).tobytes()
    distinct = {key for keys in batches for key in keys}
    assert sorted(counting.computed) == sorted(distinct)
    assert store.entries == len(distinct)
    assert store.ram_bytes == min(len(distinct), budget // ROW_BYTES) * ROW_BYTES
    assert store.file_bytes == len(distinct) * ROW_BYTES - store.ram_bytes


def test_rows_of_several_shapes_live_side_by_side():
    store = HiddenStore(0, segment=100)
    small, large = np.ones((2, 3), np.float32), np.full((20, 30), 2, np.float32)
    for _ in range(2):
        np.testing.assert_array_equal(store.get(["small"], lambda _: small), small[None])
        np.testing.assert_array_equal(store.get(["large"], lambda _: large), large[None])


def test_what_is_stored_is_a_copy_both_ways():
    for budget in (0, 10**6):
        store, mine = HiddenStore(budget), row(1)
        store.get(["a"], lambda _, mine=mine: mine)[:] = 0
        mine[:] = 0
        np.testing.assert_array_equal(store.get(["a"], lambda _: 1 / 0)[0], row(1))


def test_a_failed_computation_leaves_no_entry():
    store = HiddenStore()
    with pytest.raises(ZeroDivisionError):
        store.get(["a"], lambda _: 1 / 0)
    np.testing.assert_array_equal(store.get(["a"], lambda _: row(1))[0], row(1))


@pytest.mark.parametrize("budget", [0, 7 * ROW_BYTES, 10**6])
def test_threads_share_a_store_and_compute_nothing_twice(budget):
    store, counting, wrong = HiddenStore(budget, 3 * ROW_BYTES), Counting(), []
    ready = threading.Barrier(6)

    def work(seed):
        ready.wait()
        for keys in np.random.default_rng(seed).integers(0, 20, (30, 4)).tolist():
            if counting.get(store, keys).tobytes() != np.stack([row(key) for key in keys]).tobytes():
                wrong.append(keys)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sorted(counting.computed) == list(range(20))


def mapped(folder):
    """Mappings of this process to files that are or were in the folder."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


def test_no_file_is_made_before_the_memory_is_used_up(tmp_path):
    store, counting = HiddenStore(2 * ROW_BYTES, folder=tmp_path), Counting()
    counting.get(store, [0, 1])
    assert mapped(tmp_path) == []
    counting.get(store, [2])
    assert len(mapped(tmp_path)) == 1


def test_the_file_has_no_name_and_its_space_is_free_once_the_store_is_gone(tmp_path):
    store, counting = HiddenStore(0, 2 * ROW_BYTES, tmp_path), Counting()
    counting.get(store, [0, 1, 2])
    assert len(mapped(tmp_path)) == 2
    assert list(tmp_path.iterdir()) == []
    del store
    gc.collect()
    assert mapped(tmp_path) == []


@pytest.mark.parametrize("end", ["pass", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_nothing_is_left_behind_however_the_process_ends(tmp_path, end):
    program = f"""
import sys; from pathlib import Path; import numpy as np; from edge_client.frozen import HiddenStore
store = HiddenStore(0, 1000, Path(sys.argv[1]))
store.get([1, 2], lambda position: np.zeros((10, 10), np.float32))
print(store.file_bytes, flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("800\n", "")
    assert list(tmp_path.iterdir()) == []


def check_goes_on_without_a_file(store, caplog):
    caplog.set_level(logging.WARNING, logger="edge_client.frozen")
    counting = Counting()
    for _ in range(3):
        found = counting.get(store, [0, 1, 2])
        np.testing.assert_array_equal(found, np.stack([row(0), row(1), row(2)]))
    assert counting.computed == [0, 1, 2, 1, 2, 1, 2]
    (warning,) = [entry.getMessage() for entry in caplog.records]
    assert "computed again" in warning
    assert "TMPDIR" in warning
    return warning


def test_a_disk_that_is_full_is_said_once_and_what_does_not_fit_is_computed_again(tmp_path, caplog):
    """The limit on file sizes refuses what a full disk refuses: to reserve a segment."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 22, hard))
    try:
        warning = check_goes_on_without_a_file(HiddenStore(ROW_BYTES, 1 << 23, tmp_path), caplog)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in warning


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, caplog):
    assert "absent" in check_goes_on_without_a_file(HiddenStore(ROW_BYTES, folder=tmp_path / "absent"), caplog)


@pytest.mark.parametrize("writable", [True, False])
def test_a_budget_of_nothing_and_a_folder_of_nothing_still_encode(pictures, tmp_path, writable):
    store = HiddenStore(0, folder=tmp_path if writable else tmp_path / "absent")
    encoder = make(store=store)
    expected = encoded(make(), pictures, [0, 1])
    for _ in range(2):
        assert encoded(encoder, pictures, [0, 1]).tobytes() == expected.tobytes()
