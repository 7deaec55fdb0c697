"""Predicted and measured memory of a training, on a CLIP's real shapes with random weights.

    python benchmarks/memory.py [--shape vit-b-32] [--bits 4] [--batch 16] [--checkpointing] [--json]

Without options all cases of docs/devices.md. Each case runs in a process of its own: it loads the model by path as a client
does and takes two steps on pictures of noise. What counts is the peak of its memory that is no file's (RssAnon, looked at
every 2 ms).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hardware_profiles.plan import KNOWN, TowerShape, Training, predict

SHAPES = {"vit-b-32": KNOWN["openai/clip-vit-base-patch32"], "vit-l-14": KNOWN["openai/clip-vit-large-patch14"]}
CASES = [
    *(("vit-b-32", bits, 16, False) for bits in (4, 8, 32)),
    ("vit-b-32", 4, 16, True),
    *(("vit-l-14", bits, 2, False) for bits in (4, 8, 32)),
    ("vit-l-14", 4, 2, True),
]
CLASSES = 8


def anonymous_mib() -> float:
    """Return this process's memory that is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


class Peak:
    """The largest `anonymous_mib` while it is entered."""

    def __enter__(self) -> Peak:
        self.mib, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.002):
            self.mib = max(self.mib, anonymous_mib())


def save_model(folder: Path, shape: TowerShape) -> None:
    """Write a CLIP of these shapes with random weights, in transformers' format, in float16 as most are."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from clip_lora.towers import locate

    torch.manual_seed(0)
    vision = {
        "hidden_size": shape.width, "intermediate_size": shape.hidden, "num_attention_heads": shape.width // 64,
        "num_hidden_layers": shape.blocks, "patch_size": shape.patch, "image_size": shape.side,
        "projection_dim": shape.projection,
    }  # fmt: skip
    text = {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 8,
        "vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "projection_dim": shape.projection,
    }  # fmt: skip
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=shape.projection)
    CLIPModel(config).half().save_pretrained(folder)
    processor = json.loads((Path(locate("tiny-clip")) / "preprocessor_config.json").read_text())
    processor |= {"size": {"shortest_edge": shape.side}, "crop_size": {"height": shape.side, "width": shape.side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def peak_of(folder: Path, training: Training) -> float:
    """Train two steps in this process; return its peak in MiB."""
    from edge_client.allocator import return_freed_memory

    return_freed_memory()
    import numpy as np
    import torch
    from PIL import Image

    from edge_client.data import Dataset, Picture
    from edge_client.encoder import ImageEncoder
    from edge_client.train import local_steps
    from protocol.messages import Recipe, TextBank

    torch.set_num_threads(2)
    with Peak() as peak:
        recipe = Recipe(rank=training.rank, alpha=2.0 * training.rank, batch_size=training.batch, local_steps=2)
        encoder = ImageEncoder(str(folder), training.bits, "cpu", recipe)
        encoder.checkpointing = training.checkpointing
        rng = np.random.default_rng(0)
        side = encoder.preprocessing.crop if isinstance(encoder.preprocessing.crop, int) else 224
        arrays = rng.integers(0, 256, (training.pictures, side, side, 3), dtype=np.uint8)
        pictures = [
            Picture(str(index), "noise", lambda array=array: Image.fromarray(array))  # type: ignore[misc]
            for index, array in enumerate(arrays)
        ]
        labels = rng.integers(0, CLASSES, training.pictures).astype(np.int32)
        data = Dataset(pictures, labels, encoder.preprocessing)
        width = encoder.model.get_base_model().visual_projection.out_features
        embeddings = np.eye(CLASSES, width, dtype=np.float32)
        bank = TextBank(1, tuple(map(str, range(CLASSES))), ("{}",), embeddings, 14.3, str(folder), "")
        local_steps(encoder, data, bank, recipe, 0, training.batch)
    return peak.mib


def measure(name: str, bits: int, batch: int, checkpointing: bool, models: Path) -> dict[str, Any]:
    """Return prediction and measurement of one case, which runs in a process of its own; models are kept in `models`."""
    shape = SHAPES[name]
    training = Training(4, 4, 0, batch, bits, "float32", "cpu", checkpointing, pictures=2 * batch)  # type: ignore[arg-type]
    folder = models / name
    if not folder.exists():
        save_model(folder, shape)
    program = [sys.executable, __file__, "--inside", str(folder), "--training", json.dumps(asdict(training))]
    waits = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # threads that spin while they wait hold each other up
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=waits)
    if done.returncode:
        raise RuntimeError(done.stderr)
    measured, predicted = float(done.stdout), predict(shape, training)
    return {
        "model": name, "bits": bits, "batch": batch, "checkpointing": checkpointing,
        "measured MiB": round(measured), "predicted MiB": round(predicted.total),
        "predicted / measured": round(predicted.total / measured, 3),
        "parts": {part: round(mib, 1) for part, mib in asdict(predicted).items()},
    }  # fmt: skip


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--bits", type=int, choices=(4, 8, 32), default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--training", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(peak_of(Path(options.inside), Training(**json.loads(options.training))))
        return
    cases = [(options.shape, options.bits, options.batch, options.checkpointing)] if options.shape else CASES
    with tempfile.TemporaryDirectory() as models:
        for case in cases:
            found = measure(*case, Path(models))
            print(
                json.dumps(found) if options.json else "  ".join(f"{key}: {value}" for key, value in found.items()),
                flush=True,
            )
    print(
        f"{platform.machine()}, 2 threads, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}", file=sys.stderr
    )


if __name__ == "__main__":
    main()
