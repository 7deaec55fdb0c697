"""Our two-step preprocessing against transformers' full processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from clip_lora.errors import ModelError
from clip_lora.preprocess import load_preprocessing
from clip_lora.towers import locate

SIZES = [(97, 65), (65, 97), (3, 200), (64, 64), (63, 65), (1, 1), (640, 479)]


@pytest.fixture(scope="module")
def processor():
    return CLIPImageProcessorPil.from_pretrained(locate("tiny-clip"))


@pytest.fixture(scope="module")
def preprocessing():
    return load_preprocessing("tiny-clip")


def picture(size, mode="RGB", seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(array).convert(mode)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_pixels_then_normalise_equal_the_full_processor_for_odd_sizes(processor, preprocessing, size):
    ours = preprocessing.normalise(torch.from_numpy(preprocessing.pixels([picture(size)])))
    theirs = processor(picture(size), return_tensors="pt")["pixel_values"]
    assert ours.shape == (1, 3, 64, 64)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_pixels_then_normalise_equal_the_full_processor_for_other_modes(processor, preprocessing, mode):
    ours = preprocessing.normalise(torch.from_numpy(preprocessing.pixels([picture((70, 51), mode)])))
    theirs = processor(picture((70, 51), mode), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_batch_of_different_sizes_is_the_stack_of_single_pictures(preprocessing):
    mixed = [picture(size, seed=number) for number, size in enumerate(SIZES)]
    batch = preprocessing.pixels(mixed)
    assert batch.dtype == np.uint8
    assert batch.shape == (len(SIZES), 64, 64, 3)
    assert np.array_equal(batch, np.concatenate([preprocessing.pixels([one]) for one in mixed]))


def test_a_picture_of_the_models_size_keeps_its_pixels(preprocessing):
    one = picture((64, 64))
    assert np.array_equal(preprocessing.pixels([one])[0], np.asarray(one))


def test_the_facts_are_those_of_the_models_file(preprocessing, processor):
    assert (preprocessing.short_side, preprocessing.crop) == (64, 64)
    assert preprocessing.mean == tuple(processor.image_mean)
    assert preprocessing.std == tuple(processor.image_std)


def test_a_model_without_a_preprocessor_file_is_refused(model_copy):
    (model_copy / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="cannot load model"):
        load_preprocessing(str(model_copy))
