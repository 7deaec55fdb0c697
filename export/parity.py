"""Does the ONNX file say what torch says? Measured on real pictures, from the picture to the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
from PIL import Image
from torch import nn

from clip_lora.preprocess import Preprocessing
from export.graph import EMBEDS, IMAGES, PROBABILITIES
from protocol.messages import FloatArray

MIN_COSINE = 0.999
BATCH = 32


@dataclass(frozen=True)
class Parity:
    """How an artefact compares with torch, and the quantised tower with the merged one (cosines of embeddings)."""

    pictures: int
    cosine_mean: float
    cosine_min: float
    top1_agreement: float
    quantised_bits: int
    quantised_cosine_mean: float
    quantised_cosine_min: float

    @property
    def passed(self) -> bool:
        """Whether the file may be written."""
        return self.cosine_min >= MIN_COSINE


def torch_embeddings(tower: nn.Module, preprocessing: Preprocessing, pictures: Sequence[Image.Image]) -> FloatArray:
    """Return unit embeddings (N, D) by transformers' processor and a torch tower."""
    parts: list[FloatArray] = []
    device = next(tower.parameters()).device
    for start in range(0, len(pictures), BATCH):
        pixels = preprocessing.pixels(list(pictures[start : start + BATCH]))
        with torch.no_grad():
            batch = preprocessing.normalise(torch.from_numpy(pixels).to(device))
            embeds = tower(pixel_values=batch.to(next(tower.parameters()).dtype)).image_embeds.float()
            parts.append(torch.nn.functional.normalize(embeds, dim=-1).cpu().numpy())
    return np.concatenate(parts)


def onnx_answers(model: bytes, pictures: Sequence[Image.Image]) -> tuple[FloatArray, FloatArray]:
    """Return embeddings (N, D) and probabilities (N, C) by onnxruntime, each picture at its own size."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    embeds, probabilities = [], []
    for picture in pictures:
        array = np.asarray(picture.convert("RGB"))[None]
        embed, probability = session.run([EMBEDS, PROBABILITIES], {IMAGES: array})
        embeds.append(embed[0])
        probabilities.append(probability[0])
    return np.stack(embeds), np.stack(probabilities)


def cosines(left: FloatArray, right: FloatArray) -> FloatArray:
    """Return the cosine of each pair of rows, (N,)."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.asarray((left * right).sum(axis=1) / norms, np.float32)
