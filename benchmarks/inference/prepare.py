"""Makes what is measured, once: a ViT-B/32 with random weights, its artefacts, its bare encoder, classes and pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from PIL import Image
from sklearn.datasets import load_sample_images

from clip_lora.shapes import adapter_shapes, initial_adapter
from clip_lora.towers import load_image_tower, load_sizes
from coordinator.text_bank import make_bank
from export.artefact import export_artefacts
from export.flavours import Flavour
from export.metadata import Source
from export.parity import Proof
from export.trace import trace
from protocol.messages import Recipe
from tests.export.making import VIT_B_32, save_random_clip

CLASSES = tuple(f"thing {index}" for index in range(10))
FLAVOURS: tuple[Flavour, ...] = ("fp32", "int8")


def main() -> None:
    """Write all of it into the folder that is named, but for what is there."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "pictures.npy").exists():
        return
    if not (folder / "clip").exists():
        save_random_clip(folder / "clip", VIT_B_32)
    name, recipe = str(folder / "clip"), Recipe()
    bank = make_bank(name, CLASSES, ("a photo of a {}",))
    adapter = initial_adapter(adapter_shapes(load_sizes(name), "vision", recipe), 0)
    images = np.stack(load_sample_images().images)
    proof = Proof([Image.fromarray(image) for image in images])
    source = Source(bank, adapter, recipe, "bench", 1)
    list(export_artefacts(source, proof, 32, {flavour: folder / f"{flavour}.onnx" for flavour in FLAVOURS}, name))
    onnx.save(trace(load_image_tower(name, 32).eval()), folder / "encoder.onnx")
    np.save(folder / "classes.npy", bank.embeddings)
    np.save(folder / "pictures.npy", images)


if __name__ == "__main__":
    main()
