"""Pictures to the pixels that a CLIP was trained on: resize the short side, crop the centre, scale, normalise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPImageProcessorPil

from clip_lora.towers import loading, locate

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Preprocessing:
    """What a model's preprocessor_config.json says: short side and crop in pixels, mean and deviation by channel."""

    short_side: int
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    processor: Any

    def pixels(self, pictures: list[Image.Image]) -> Pixels:
        """Resize (bicubic, antialiased) and crop -> uint8 (batch, crop, crop, 3)."""
        rgb = [picture.convert("RGB") for picture in pictures]
        batch = self.processor(rgb, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        return np.ascontiguousarray(batch.transpose(0, 2, 3, 1)).astype(np.uint8)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Uint8 (batch, height, width, 3) -> float32 (batch, 3, height, width), (x / 255 - mean) / std."""
        mean = torch.tensor(self.mean, device=pixels.device)
        std = torch.tensor(self.std, device=pixels.device)
        return ((pixels.float() / 255.0 - mean) / std).permute(0, 3, 1, 2)


def load_preprocessing(name: str) -> Preprocessing:
    """Return a model's preprocessing; raises ModelError."""
    with loading(name):
        processor = CLIPImageProcessorPil.from_pretrained(locate(name))
    return Preprocessing(
        processor.size["shortest_edge"],
        processor.crop_size["height"],
        tuple(processor.image_mean),
        tuple(processor.image_std),
        processor,
    )
