"""What the tests of the export are made from: a class bank, adapters, real pictures, CLIPs of real shapes."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.memory import SHAPES, save_model
from clip_lora.algebra import Adapter
from clip_lora.shapes import adapter_shapes, initial_adapter
from clip_lora.towers import load_sizes, locate
from coordinator.text_bank import make_bank
from hardware_profiles.plan import TowerShape
from protocol.messages import Recipe, TextBank

RECIPE = Recipe(rank=2)
CLASSES = ("zero", "one", "two")
# Of real photographs: tall, wide, tiny, odd, larger than any model's input. (height, width)
ODD_SIZES = [(33, 240), (400, 57), (17, 23), (211, 211), (427, 640), (301, 199), (65, 64), (8, 9)]


VIT_B_32, VIT_L_14 = SHAPES["vit-b-32"], SHAPES["vit-l-14"]


def trained_adapter(model: str, recipe: Recipe = RECIPE, seed: int = 0, spread: float = 0.02) -> Adapter:
    """An adapter that changes something."""
    rng = np.random.default_rng(seed)
    start = initial_adapter(adapter_shapes(load_sizes(model), "vision", recipe), seed)
    return {n: rng.normal(0, spread, a.shape).astype(np.float32) if n.endswith("B") else a for n, a in start.items()}


def bank_of(model: str, classes: tuple[str, ...] = CLASSES) -> TextBank:
    return make_bank(model, classes, ("a photo of a {}",))


@lru_cache
def photographs() -> tuple[Image.Image, ...]:
    """Parts of scikit-learn's two photographs, of odd sizes."""
    whole = [Image.fromarray(array) for array in load_sample_images().images]
    parts = []
    for index, (height, width) in enumerate(ODD_SIZES):
        left, top = (37 * index) % (641 - width), (23 * index) % (428 - height)
        parts.append(whole[index % 2].crop((left, top, left + width, top + height)))
    return tuple(parts)


def save_random_clip(folder: Path, shape: TowerShape) -> None:
    """Write a CLIP with random weights, an image tower of real shape, and tiny-clip's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, shape)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(locate("tiny-clip")) / name, folder)
