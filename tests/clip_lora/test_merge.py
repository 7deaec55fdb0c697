"""Merging an adapter into the full-precision tower: equal to the adapter beside it, or refused without a trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clip_lora.algebra import delta, layers
from clip_lora.errors import ModelError
from clip_lora.lora import attach, load_adapter, merge
from clip_lora.shapes import adapter_shapes, initial_adapter, scale
from clip_lora.towers import load_image_tower, load_text_tower
from protocol.messages import Recipe

LAYER = "vision_model.encoder.layers.0.self_attn.q_proj"


def weights(tower):
    return {name: tensor.clone() for name, tensor in tower.state_dict().items()}


def unchanged(tower, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())


def factors(a, b, layer=LAYER):
    return {layer + ".lora_A": np.asarray(a, np.float32), layer + ".lora_B": np.asarray(b, np.float32)}


@pytest.mark.parametrize(
    "recipe",
    [Recipe(), Recipe(rank=2, alpha=1.0, projections=("v_proj",), first_block=4)],
    ids=["all-projections", "v-of-the-last-blocks"],
)
def test_the_merged_tower_answers_as_the_tower_with_the_adapter(config, pictures, random_adapter, recipe):
    adapter = random_adapter(adapter_shapes(config, "vision", recipe), size=0.03)
    plain = load_image_tower("tiny-clip", 32)
    merged = load_image_tower("tiny-clip", 32)
    merge(merged, adapter, scale(recipe))
    beside = attach(load_image_tower("tiny-clip", 32), config, "vision", recipe)
    load_adapter(beside, adapter)
    with torch.no_grad():
        unit = [
            torch.nn.functional.normalize(t(pixel_values=pictures).image_embeds, dim=-1) for t in (plain, merged, beside)
        ]
    assert (unit[1] - unit[2]).abs().max() < 1e-5
    assert (unit[1] - unit[0]).abs().max() > 1e-4


def test_the_merged_text_tower_answers_as_the_tower_with_the_adapter(config, random_adapter):
    adapter = random_adapter(adapter_shapes(config, "text", Recipe()), size=0.03)
    merged, tokenizer = load_text_tower("tiny-clip")
    merge(merged, adapter, scale(Recipe()))
    beside = attach(load_text_tower("tiny-clip")[0], config, "text", Recipe())
    load_adapter(beside, adapter)
    prompts = tokenizer(["a photo of a dog", "a drum"], padding=True, return_tensors="pt")
    with torch.no_grad():
        unit = [torch.nn.functional.normalize(tower(**prompts).text_embeds, dim=-1) for tower in (merged, beside)]
    assert (unit[0] - unit[1]).abs().max() < 1e-5


def test_merging_adds_the_delta_to_the_named_weights_and_to_nothing_else(config, random_adapter):
    recipe = Recipe(projections=("k_proj",), first_block=5)
    adapter = random_adapter(adapter_shapes(config, "vision", recipe))
    tower = load_image_tower("tiny-clip", 32)
    before = weights(tower)
    merge(tower, adapter, 0.5)
    changed = {name for name, tensor in tower.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {layer + ".weight" for layer in layers(adapter)}
    for layer in layers(adapter):
        expected = before[layer + ".weight"].double().numpy() + delta(adapter, layer, 0.5)
        np.testing.assert_allclose(tower.state_dict()[layer + ".weight"].numpy(), expected, rtol=1e-6, atol=1e-7)


def test_merging_the_initial_adapter_changes_no_bit(config):
    tower = load_image_tower("tiny-clip", 32)
    before = weights(tower)
    merge(tower, initial_adapter(adapter_shapes(config, "vision", Recipe()), 0), 2.0)
    assert unchanged(tower, before)


@pytest.mark.parametrize("bits", [4, 8])
def test_merging_into_a_quantised_tower_is_refused(config, random_adapter, bits):
    tower = load_image_tower("tiny-clip", bits)
    before = weights(tower)
    with pytest.raises(ModelError, match="full-precision"):
        merge(tower, random_adapter(adapter_shapes(config, "vision", Recipe())), 2.0)
    assert unchanged(tower, before)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_an_adapter_with_a_value_that_is_not_finite_is_refused_and_changes_nothing(config, random_adapter, poison):
    adapter = random_adapter(adapter_shapes(config, "vision", Recipe()))
    last = max(adapter)
    adapter[last][0, 0] = poison
    tower = load_image_tower("tiny-clip", 32)
    before = weights(tower)
    with pytest.raises(ModelError, match="not finite"):
        merge(tower, adapter, 2.0)
    assert unchanged(tower, before)


def test_an_adapter_of_a_larger_model_is_refused_naming_the_layer_and_changes_nothing(config, random_adapter):
    adapter = random_adapter(adapter_shapes(config, "vision", Recipe()))
    missing = "vision_model.encoder.layers.6.self_attn.q_proj"
    adapter |= factors(np.ones((4, 192)), np.ones((192, 4)), missing)
    tower = load_image_tower("tiny-clip", 32)
    before = weights(tower)
    with pytest.raises(ModelError, match=missing):
        merge(tower, adapter, 2.0)
    assert unchanged(tower, before)


@pytest.mark.parametrize(
    "adapter",
    [
        factors(np.full((2, 192), 1e30), np.full((192, 2), 1e30)),
        factors(np.ones((2, 64)), np.ones((64, 2))),
        factors(np.ones((2, 192)), np.ones((192, 3))),
        factors(np.ones((2, 192)), np.ones((1, 2))),
        {LAYER + ".lora_A": np.ones((2, 192), np.float32)},
    ],
    ids=["overflows-float32", "another-width", "two-ranks", "would-broadcast", "one-factor"],
)
def test_an_adapter_that_does_not_fit_is_a_model_error_and_changes_nothing(adapter):
    tower = load_image_tower("tiny-clip", 32)
    before = weights(tower)
    with pytest.raises(ModelError):
        merge(tower, adapter, 1.0)
    assert unchanged(tower, before)
