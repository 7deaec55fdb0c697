"""The real shapes of CLIP ViT-B/32 with random weights: made here, saved, and loaded by path in 4 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPConfig, CLIPModel
from transformers.utils import logging as transformers_logging

from clip_lora.lora import adapter_state, attach, load_adapter
from clip_lora.preprocess import load_preprocessing
from clip_lora.shapes import adapter_shapes, initial_adapter
from clip_lora.towers import load_image_tower, load_sizes, locate, model_facts
from protocol.messages import Recipe

VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """300 MB on disk while this module runs."""
    path = tmp_path_factory.mktemp("vit-b-32")
    vision, text = {**VISION, "patch_size": 32, "image_size": 224}, {**TEXT, "vocab_size": 8192}
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=512)).half().save_pretrained(path)
    if bars:
        transformers_logging.enable_progress_bar()
    tiny = Path(locate("tiny-clip"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, path)
    processor = json.loads((tiny / "preprocessor_config.json").read_text())
    processor |= {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    yield path
    shutil.rmtree(path)


def test_one_training_step_of_two_pictures_on_vit_b32_in_four_bits(folder):
    recipe = Recipe()
    config = load_sizes(str(folder))
    tower = load_image_tower(str(folder), 4)
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in tower.modules()) == 12 * 6
    model = attach(tower, config, "vision", recipe)
    shapes = adapter_shapes(config, "vision", recipe)
    adapter = initial_adapter(shapes, 0)
    load_adapter(model, adapter)
    assert len(shapes) == 2 * 4 * 12
    assert {shape for name, shape in shapes.items() if name.endswith("A")} == {(4, 768)}
    assert sum(array.size for array in adapter.values()) == 12 * 4 * 2 * 4 * 768
    preprocessing = load_preprocessing(str(folder))
    noise = np.random.default_rng(0).integers(0, 256, (2, 300, 250, 3), dtype=np.uint8)
    pixels = preprocessing.pixels([Image.fromarray(one) for one in noise])
    assert pixels.shape == (2, 224, 224, 3)
    bank = normalize(torch.randn(3, 512, generator=torch.Generator().manual_seed(0)), dim=-1)
    features = normalize(model(pixel_values=preprocessing.normalise(torch.from_numpy(pixels))).image_embeds, dim=-1)
    assert features.shape == (2, 512)
    loss = cross_entropy(model_facts(str(folder)).logit_scale * features @ bank.T, torch.tensor([0, 2]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss.backward()
    optimizer.step()
    after = adapter_state(model)
    assert {name: array.shape for name, array in after.items()} == shapes
    assert all(np.isfinite(array).all() for array in after.values())
    assert all((after[name] != adapter[name]).any() for name in after if name.endswith("lora_B"))


def test_the_facts_of_vit_b32_are_read_without_loading_it(folder):
    facts = model_facts(str(folder))
    assert facts.width == 512
    assert facts.logit_scale == pytest.approx(np.exp(2.6592), rel=1e-3)
