"""Loading: really quantised towers, the facts of a model, and every way in which a folder can be wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel
from transformers.utils import logging as transformers_logging

from clip_lora.errors import ModelError
from clip_lora.towers import load_image_tower, load_sizes, load_text_tower, locate, model_facts
from coordinator.text_bank import make_bank


def quantised(tower):
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name: module for name, module in tower.named_modules() if isinstance(module, kinds)}


def dequantised(module):
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return module.weight.data.float() * module.weight.SCB[:, None] / 127


def rewrite_weights(folder: Path, keep):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if keep(name)}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("bits", "kind"), [(4, bnb.nn.Linear4bit), (8, bnb.nn.Linear8bitLt)])
def test_every_linear_layer_of_the_blocks_is_quantised_and_the_projection_is_not(bits, kind):
    tower = load_image_tower("tiny-clip", bits)
    layers = quantised(tower)
    assert len(layers) == 6 * 6
    assert all(type(module) is kind for module in layers.values())
    assert type(tower.visual_projection) is nn.Linear
    assert tower.visual_projection.weight.dtype == torch.float32
    assert {p.dtype for p in tower.parameters() if p.dtype.is_floating_point} == {torch.float32}


def test_four_bits_are_nf4_with_double_quantisation_computing_in_float32():
    for module in quantised(load_image_tower("tiny-clip", 4)).values():
        state = module.weight.quant_state
        assert module.weight.dtype == torch.uint8
        assert module.weight.data.numel() * 2 == state.shape.numel()
        assert state.quant_type == "nf4"
        assert state.nested
        assert module.compute_dtype == torch.float32


@pytest.mark.parametrize(("bits", "low", "high"), [(4, 0.05, 0.12), (8, 0.002, 0.02)])
def test_dequantised_weights_stay_within_the_bound_of_their_bits(bits, low, high):
    # Measured on tiny-clip: NF4 0.091 to 0.093, int8 0.007 to 0.008. The lower bound proves that something was rounded.
    full = load_image_tower("tiny-clip", 32)
    for name, module in quantised(load_image_tower("tiny-clip", bits)).items():
        exact = full.get_submodule(name).weight
        error = float((dequantised(module) - exact).norm() / exact.norm())
        assert low < error < high, name


@pytest.mark.parametrize(("bits", "cosine"), [(4, 0.95), (8, 0.995)])
def test_quantised_features_point_where_the_full_ones_do(pictures, bits, cosine):
    with torch.no_grad():
        pair = [load_image_tower("tiny-clip", b)(pixel_values=pictures).image_embeds for b in (bits, 32)]
    assert torch.nn.functional.cosine_similarity(*pair).min() > cosine


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_a_loaded_tower_is_frozen_and_in_train_mode(bits):
    tower = load_image_tower("tiny-clip", bits)
    assert not any(p.requires_grad for p in tower.parameters())
    assert all(module.training for module in tower.modules())


@pytest.mark.parametrize("bits", [0, 2, 16, 64, -4])
def test_unknown_bits_are_refused_naming_the_known(bits):
    with pytest.raises(ModelError, match=f"{bits} bits: choose one of 4, 8, 32"):
        load_image_tower("tiny-clip", bits)


def test_the_facts_are_digest_scale_and_width_of_the_file():
    facts = model_facts("tiny-clip")
    model = CLIPModel.from_pretrained(locate("tiny-clip"), dtype=torch.float32)
    file = Path(locate("tiny-clip")) / "model.safetensors"
    assert facts.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert facts.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()), rel=1e-6)
    assert (facts.name, facts.width) == ("tiny-clip", 256)


def test_one_changed_byte_in_the_weights_changes_the_digest(model_copy):
    file = model_copy / "model.safetensors"
    assert model_facts(str(model_copy)).digest == model_facts("tiny-clip").digest
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert model_facts(str(model_copy)).digest != model_facts("tiny-clip").digest


def test_a_copied_folder_loads_by_path_to_the_same_weights(model_copy):
    ours, theirs = load_image_tower(str(model_copy), 32), load_image_tower("tiny-clip", 32)
    assert all(torch.equal(t, theirs.state_dict()[name]) for name, t in ours.state_dict().items())


@pytest.mark.parametrize("load", [load_sizes, model_facts, load_text_tower, lambda name: load_image_tower(name, 4)])
def test_a_missing_folder_and_one_without_a_config_are_refused_by_name(load, tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(ModelError, match=rf"{folder} holds no config\.json"):
            load(str(folder))


def test_a_folder_that_starts_with_a_dot_is_a_path_and_not_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json"):
        locate("./model")
    assert locate("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"


def test_a_config_that_is_not_json_is_a_model_error(model_copy):
    (model_copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load model"):
        load_sizes(str(model_copy))


@pytest.mark.parametrize("load", [model_facts, lambda name: load_image_tower(name, 4)], ids=["facts", "tower"])
def test_a_folder_without_weights_is_a_model_error(load, model_copy):
    (model_copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load(str(model_copy))


@pytest.mark.parametrize("load", [model_facts, lambda name: load_image_tower(name, 4)], ids=["facts", "tower"])
def test_a_truncated_weights_file_is_a_model_error(load, model_copy):
    file = model_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(ModelError, match="cannot load model"):
        load(str(model_copy))


def test_weights_without_a_logit_scale_are_a_model_error(model_copy):
    rewrite_weights(model_copy, lambda name: name != "logit_scale")
    with pytest.raises(ModelError, match="logit_scale"):
        model_facts(str(model_copy))


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("lost", ["vision_model.", "visual_projection.", "vision_model.encoder.layers.3.mlp.fc1.weight"])
def test_weights_that_lack_a_part_of_the_image_tower_are_a_model_error(model_copy, bits, lost):
    rewrite_weights(model_copy, lambda name: not name.startswith(lost))
    with pytest.raises(ModelError):
        load_image_tower(str(model_copy), bits)


def test_a_folder_without_a_tokenizer_is_a_model_error(model_copy):
    (model_copy / "tokenizer.json").unlink()
    (model_copy / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError):
        make_bank(str(model_copy), ["cat", "dog"], ["a photo of a {}"])


def test_loading_leaves_the_verbosity_of_transformers_as_it_was():
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load_sizes("tiny-clip")
    with pytest.raises(ModelError):
        load_sizes("/absent/model")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
