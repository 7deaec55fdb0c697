"""Seconds of a local epoch with and without keeping what the frozen blocks compute, on ViT-B/32's shapes.

    python benchmarks/frozen_blocks.py [--bits 4] [--pictures 64] [--batch 16] [--runs 3] [--threads 2] [--json]

Random weights from the configuration, pictures of random noise, 224 x 224. Of 12 blocks the last 3 are adapted. Three
epochs start from the same adapter and see the same batches: through the whole tower, with a store that is still empty,
and with the store that this filled. Their losses must agree. The three take turns, and the median of `--runs` turns counts;
seconds of the processor tell how busy the machine was with other work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel
from transformers.utils import logging as transformers_logging

from clip_lora.lora import load_adapter
from clip_lora.shapes import adapter_shapes, initial_adapter
from clip_lora.towers import load_sizes, locate
from edge_client.data import Dataset, Picture
from edge_client.encoder import ImageEncoder
from edge_client.frozen import HiddenStore
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


@dataclass(frozen=True)
class Epoch:
    """One epoch: seconds on the clock, seconds of the processor (all threads), the loss of each step."""

    wall: float
    cpu: float
    losses: list[float]


def epoch(encoder: ImageEncoder, encode: Encode, data: Dataset, recipe: Recipe) -> Epoch:
    """Train one epoch as local_steps does, from the initial adapter."""
    load_adapter(encoder.model, initial_adapter(adapter_shapes(load_sizes(encoder.name), "vision", recipe), 0))
    parameters = [parameter for parameter in encoder.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    targets = torch.nn.functional.normalize(torch.randn(CLASSES, 512, generator=torch.Generator().manual_seed(0)), dim=-1)
    targets, labels = targets.to(encoder.device), torch.from_numpy(data.labels.astype(np.int64)).to(encoder.device)
    order = np.random.default_rng(0).permutation(len(data))
    losses = []
    wall, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(data), recipe.batch_size):
        batch = order[start : start + recipe.batch_size].tolist()
        features, y = encode(batch), labels[batch]
        loss = alignment_loss(features, y, targets, 14.3) + recipe.mu * orthogonal_loss(features, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return Epoch(time.perf_counter() - wall, time.process_time() - cpu, losses)


def turns(encoder: ImageEncoder, data: Dataset, recipe: Recipe, runs: int) -> dict[str, list[Epoch]]:
    """Return the epochs of each kind, `runs` of them."""

    def whole(batch: list[int]) -> torch.Tensor:
        return encoder.features(data.pixels(batch))

    def stored(batch: list[int]) -> torch.Tensor:
        return encoder.encode(data, batch)

    data.pixels(range(len(data)))  # in memory, as epochs after the first find them
    whole([0])  # the first forward pass initialises
    epochs: dict[str, list[Epoch]] = {"whole tower": [], "filling the store": [], "from the store": []}
    for _ in range(runs):
        encoder.store = HiddenStore()
        for name, encode in zip(epochs, (whole, stored, stored), strict=True):
            epochs[name].append(epoch(encoder, encode, data, recipe))
    return epochs


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the figures."""
    save_model(folder, options.blocks)
    recipe = Recipe(first_block=options.first_block, batch_size=options.batch)
    encoder = ImageEncoder(str(folder), options.bits, options.device, recipe)
    data = noise(options.pictures, encoder)
    epochs = turns(encoder, data, recipe, options.runs)
    wall = {name: statistics.median(one.wall for one in of_kind) for name, of_kind in epochs.items()}
    cpu = {name: statistics.median(one.cpu for one in of_kind) for name, of_kind in epochs.items()}
    losses = np.array([one.losses for of_kind in epochs.values() for one in of_kind])
    return {
        "what": f"seconds of an epoch, ViT-B/32 shapes, {options.bits} bits, blocks {options.first_block} to "
        f"{options.blocks - 1} of {options.blocks} adapted",
        "pictures, batch, runs": [len(data), options.batch, options.runs],
        **{name: round(seconds, 2) for name, seconds in wall.items()},
        **{f"{name}, processor": round(seconds, 2) for name, seconds in cpu.items()},
        "from the store / whole tower": round(wall["from the store"] / wall["whole tower"], 3),
        "the same, processor": round(cpu["from the store"] / cpu["whole tower"], 3),
        "largest difference of losses": float(np.ptp(losses, axis=0).max()),
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
    parser.add_argument("--runs", type=int, default=3)
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
