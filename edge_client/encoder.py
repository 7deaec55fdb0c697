"""The quantised image tower with a LoRA adapter: pictures -> unit features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from clip_lora.lora import PeftModel, attach
from clip_lora.preprocess import Preprocessing, load_preprocessing
from clip_lora.towers import load_config, load_image_tower
from edge_client.data import Dataset
from protocol.messages import Recipe


class ImageEncoder:
    """A quantised image tower with a LoRA adapter, and its preprocessing. Made once per process."""

    def __init__(self, model: str, bits: int, device: str, recipe: Recipe) -> None:
        self.name = model
        self.device = device
        self.preprocessing: Preprocessing = load_preprocessing(model)
        self.model: PeftModel = attach(load_image_tower(model, bits, device), load_config(model), "vision", recipe)

    def encode(self, data: Dataset, indices: Sequence[int]) -> torch.Tensor:
        """Pictures of a dataset by index -> unit features (N, D), float32."""
        return self.features(data.pixels(indices))

    def features(self, pixels: NDArray[np.uint8]) -> torch.Tensor:
        """Uint8 pictures (N, H, W, 3) -> unit features (N, D), float32."""
        batch = self.preprocessing.normalise(torch.from_numpy(pixels).to(self.device))
        # A half-precision base on a GPU wants its own dtype; the factors stay float32.
        embeds = self.model(pixel_values=batch.to(self.model.dtype)).image_embeds.float()
        return torch.nn.functional.normalize(embeds, dim=-1)
