"""Adapters on real towers: what peft attaches, what is read out, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clip_lora.errors import ModelError
from clip_lora.lora import adapter_state, attach, load_adapter
from clip_lora.shapes import adapter_shapes, check_shapes, initial_adapter, scale
from clip_lora.towers import load_image_tower, load_text_tower
from protocol.messages import Recipe

SHAPES = [
    Recipe(),
    Recipe(rank=1, projections=("v_proj",)),
    Recipe(rank=7, projections=("q_proj", "out_proj"), first_block=3),
    Recipe(rank=2, projections=("k_proj", "v_proj", "q_proj"), first_block=1),
]


def shapes_of(model):
    return {name: array.shape for name, array in adapter_state(model).items()}


@pytest.mark.parametrize("recipe", SHAPES, ids=lambda r: f"{len(r.projections)}-from-{r.first_block}")
@pytest.mark.parametrize("bits", [4, 32])
def test_the_computed_shapes_are_those_that_peft_attaches_to_the_image_tower(config, recipe, bits):
    model = attach(load_image_tower("tiny-clip", bits), config, "vision", recipe)
    computed = adapter_shapes(config, "vision", recipe)
    assert shapes_of(model) == computed
    assert len(computed) == 2 * len(recipe.projections) * (6 - recipe.first_block)
    assert list(computed) == sorted(computed)


@pytest.mark.parametrize("recipe", SHAPES, ids=lambda r: f"{len(r.projections)}-from-{r.first_block}")
def test_the_computed_shapes_are_those_that_peft_attaches_to_the_text_tower(config, recipe):
    model = attach(load_text_tower("tiny-clip")[0], config, "text", recipe)
    computed = adapter_shapes(config, "text", recipe)
    assert shapes_of(model) == computed
    assert all(name.startswith("text_model.") for name in computed)


def test_a_text_adapter_changes_the_text_embedding_and_gets_gradients(config, random_adapter):
    tower, tokenizer = load_text_tower("tiny-clip")
    prompts = tokenizer(["a photo of a cat"], return_tensors="pt")
    plain = tower(**prompts).text_embeds
    model = attach(tower, config, "text", Recipe())
    load_adapter(model, random_adapter(adapter_shapes(config, "text", Recipe())))
    adapted = model(**prompts).text_embeds
    assert (adapted - plain).abs().max() > 1e-3
    adapted.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("tower", "blocks"), [("vision", 6), ("text", 4)])
def test_a_first_block_above_the_tower_is_refused_with_the_number_of_blocks(config, tower, blocks):
    with pytest.raises(ModelError, match=f"{blocks} blocks"):
        adapter_shapes(config, tower, Recipe(first_block=blocks))
    assert len(adapter_shapes(config, tower, Recipe(first_block=blocks - 1))) == 8


def test_the_scale_is_alpha_over_rank_and_what_peft_uses(config):
    recipe = Recipe(rank=3, alpha=7.5)
    model = attach(load_image_tower("tiny-clip", 32), config, "vision", recipe)
    layer = model.get_submodule("base_model.model.vision_model.encoder.layers.0.self_attn.q_proj")
    assert scale(recipe) == pytest.approx(2.5)
    assert layer.scaling["default"] == pytest.approx(2.5)


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_an_adapter_comes_back_from_the_model_with_the_same_bits(config, random_adapter, bits):
    model = attach(load_image_tower("tiny-clip", bits), config, "vision", Recipe())
    adapter = random_adapter(adapter_shapes(config, "vision", Recipe()), seed=bits)
    load_adapter(model, adapter)
    back = adapter_state(model)
    assert list(back) == list(adapter)
    assert all(np.array_equal(back[name], adapter[name]) and back[name].dtype == np.float32 for name in adapter)


def test_a_read_out_adapter_does_not_change_when_the_model_does(config):
    model = attach(load_image_tower("tiny-clip", 32), config, "vision", Recipe())
    load_adapter(model, initial_adapter(adapter_shapes(config, "vision", Recipe()), 1))
    before = adapter_state(model)
    copies = {name: array.copy() for name, array in before.items()}
    load_adapter(model, initial_adapter(adapter_shapes(config, "vision", Recipe()), 2))
    assert all(np.array_equal(before[name], copies[name]) for name in before)


def test_the_initial_adapter_changes_nothing_and_follows_its_seed(config, pictures):
    tower = load_image_tower("tiny-clip", 32)
    plain = tower(pixel_values=pictures).image_embeds
    shapes = adapter_shapes(config, "vision", Recipe())
    model = attach(tower, config, "vision", Recipe())
    adapter = initial_adapter(shapes, 3)
    load_adapter(model, adapter)
    assert torch.equal(model(pixel_values=pictures).image_embeds.detach(), plain)
    for name, array in adapter.items():
        if name.endswith(".lora_B"):
            assert not array.any()
        else:
            assert np.abs(array).max() <= 1 / np.sqrt(array.shape[1])
            assert array.std() == pytest.approx(1 / np.sqrt(3 * array.shape[1]), rel=0.1)
    again, other = initial_adapter(shapes, 3), initial_adapter(shapes, 4)
    assert all(np.array_equal(adapter[name], again[name]) for name in adapter)
    assert any(not np.array_equal(adapter[name], other[name]) for name in adapter)


def test_only_the_factors_require_gradients(config):
    model = attach(load_image_tower("tiny-clip", 4), config, "vision", Recipe())
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == len(adapter_shapes(config, "vision", Recipe()))
    assert all("lora_" in name for name in trainable)


def test_a_missing_an_unknown_and_a_misshapen_factor_are_refused_and_named(config):
    shapes = adapter_shapes(config, "vision", Recipe())
    model = attach(load_image_tower("tiny-clip", 32), config, "vision", Recipe())
    good = initial_adapter(shapes, 0)
    load_adapter(model, good)
    first = next(iter(shapes))
    missing = {name: array for name, array in good.items() if name != first}
    with pytest.raises(ModelError, match=first):
        load_adapter(model, missing)
    with pytest.raises(ModelError, match=r"surprise\.lora_A"):
        load_adapter(model, {**good, "surprise.lora_A": np.zeros((4, 192), np.float32)})
    with pytest.raises(ModelError, match=rf"{first} is \(5, 192\), the model wants \(4, 192\)"):
        load_adapter(model, {**good, first: np.zeros((5, 192), np.float32)})
    after = adapter_state(model)
    assert all(np.array_equal(after[name], good[name]) for name in good)


def test_an_adapter_of_another_rank_is_refused(config):
    shapes = adapter_shapes(config, "vision", Recipe(rank=4))
    with pytest.raises(ModelError, match="another rank"):
        check_shapes(initial_adapter(adapter_shapes(config, "vision", Recipe(rank=8)), 0), shapes)
