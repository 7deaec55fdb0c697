"""Seconds of a local epoch with and without keeping what the frozen blocks compute, on ViT-B/32's shapes.

    python benchmarks/frozen_blocks.py [--bits 4] [--pictures 64] [--batch 16] [--first-block 9] [--threads 2] [--json]

Random weights from the configuration, pictures of random noise, 224 x 224. Of 12 blocks the last 3 are adapted. Three
epochs start from the same adapter and see the same batches: through the whole tower, with a store that is still empty,
and with the store that this filled. Their losses must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel
from transformers.utils import logging as transformers_logging

from clip_lora.lora import adapter_shapes, initial_adapter, load_adapter
from clip_lora.towers import load_config, locate
from edge_client.data import Dataset, Picture
from edge_client.encoder import ImageEncoder
from edge_client.losses import alignment_loss, orthogonal_loss
from protocol.messages import Recipe

CLASSES = 8
SIDE = 224
VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 32, "image_size": SIDE}
TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 8, "vocab_size": 8192}
Encode = Callable[[list[int]], torch.Tensor]


def save_model(folder: Path, blocks: int) -> None:
    """Write a CLIP of ViT-B/32's widths with random weights, in transformers' format."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision, text = {**VISION, "num_hidden_layers": blocks}, {**TEXT, **ends}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=512)).half().save_pretrained(folder)
    processor = json.loads((Path(locate("tiny-clip")) / "preprocessor_config.json").read_text())
    processor |= {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def noise(number: int, encoder: ImageEncoder) -> Dataset:
    """Return a dataset of random pictures with random labels; nothing is decoded from files."""
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (number, SIDE, SIDE, 3), dtype=np.uint8)
    pictures = [
        Picture(f"noise/{index:04d}", "noise", lambda array=array: Image.fromarray(array))  # type: ignore[misc]
        for index, array in enumerate(arrays)
    ]
    return Dataset(pictures, rng.integers(0, CLASSES, number).astype(np.int32), encoder.preprocessing)


def epoch(encoder: ImageEncoder, encode: Encode, data: Dataset, recipe: Recipe) -> tuple[float, list[float]]:
    """Train one epoch as local_steps does, from the initial adapter; return its seconds and the loss of each step."""
    load_adapter(encoder.model, initial_adapter(adapter_shapes(load_config(encoder.name), "vision", recipe), 0))
    parameters = [parameter for parameter in encoder.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    targets = torch.nn.functional.normalize(torch.randn(CLASSES, 512, generator=torch.Generator().manual_seed(0)), dim=-1)
    targets, labels = targets.to(encoder.device), torch.from_numpy(data.labels.astype(np.int64)).to(encoder.device)
    order = np.random.default_rng(0).permutation(len(data))
    losses = []
    started = time.perf_counter()
    for start in range(0, len(data), recipe.batch_size):
        batch = order[start : start + recipe.batch_size].tolist()
        features, y = encode(batch), labels[batch]
        loss = alignment_loss(features, y, targets, 14.3) + recipe.mu * orthogonal_loss(features, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return time.perf_counter() - started, losses


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the figures of the three epochs."""
    save_model(folder, options.blocks)
    recipe = Recipe(first_block=options.first_block, batch_size=options.batch)
    encoder = ImageEncoder(str(folder), options.bits, options.device, recipe)
    data = noise(options.pictures, encoder)
    for index in range(len(data)):  # what epochs after the first find in memory, in every version
        data.pixels([index])

    def whole(batch: list[int]) -> torch.Tensor:
        return encoder.features(data.pixels(batch))

    def stored(batch: list[int]) -> torch.Tensor:
        return encoder.encode(data, batch)

    whole([0])  # the first forward pass initialises
    without, expected = epoch(encoder, whole, data, recipe)
    filling, first = epoch(encoder, stored, data, recipe)
    warm, second = epoch(encoder, stored, data, recipe)
    return {
        "what": f"seconds of an epoch, ViT-B/32 shapes, {options.bits} bits, blocks {options.first_block} to "
        f"{options.blocks - 1} of {options.blocks} adapted",
        "pictures": len(data),
        "steps an epoch": len(expected),
        "whole tower": round(without, 2),
        "filling the store": round(filling, 2),
        "from the store": round(warm, 2),
        "from the store / whole tower": round(warm / without, 3),
        "largest difference of losses": max(
            abs(a - b) for run in (first, second) for a, b in zip(expected, run, strict=True)
        ),
        "bytes kept": encoder.store.ram_bytes + encoder.store.file_bytes,
        "machine": f"{platform.machine()}, {options.device}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Measure and print a table, or one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8, 32))
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--first-block", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, Path(folder))
    if options.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name:30} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
