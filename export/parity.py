"""Does the ONNX file say what torch says? Measured on real pictures, from the picture to the embedding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
from PIL import Image
from torch import nn

from clip_lora.preprocess import Preprocessing
from export.flavours import Gate
from export.graph import EMBEDS, IMAGES, PROBABILITIES
from protocol.messages import FloatArray, IntArray

BATCH = 32
UNKNOWN = -1  # the class of a picture that nobody has named


@dataclass(frozen=True)
class Proof:
    """Real pictures, each with its class's index in the class bank; UNKNOWN where nobody has named it."""

    pictures: Sequence[Image.Image]
    labels: Sequence[int] = ()

    @property
    def known(self) -> IntArray:
        """The labels (N,), all UNKNOWN if none were given."""
        return np.array(self.labels or [UNKNOWN] * len(self.pictures), np.int32)


@dataclass(frozen=True)
class Parity:
    """How an artefact compares with torch, and the quantised tower with the merged one (cosines of embeddings).

    `accuracy` and `torch_accuracy` are shares of the `labelled` pictures; None if there are none.
    """

    pictures: int
    cosine_mean: float
    cosine_min: float
    top1_agreement: float
    labelled: int
    accuracy: float | None
    torch_accuracy: float | None
    quantised_bits: int
    quantised_cosine_mean: float
    quantised_cosine_min: float

    def drift(self, gate: Gate) -> list[str]:
        """Return what is worse than the gate allows, each as half a sentence; empty if nothing is."""
        found: list[str] = []
        if not self.cosine_min >= gate.cosine:  # and not `<`: what is not a number fails too
            found.append(f"cosine {self.cosine_min:.6f} on the worst of {self.pictures} pictures, {gate.cosine} is required")
        if self.accuracy is not None and self.torch_accuracy is not None:
            lost = self.torch_accuracy - self.accuracy
            if lost > gate.accuracy + 1e-9:  # 0.905 - 0.9 is more than 0.005
                found.append(
                    f"accuracy {self.accuracy:.1%} on {self.labelled} pictures where torch has {self.torch_accuracy:.1%}, "
                    f"{100 * gate.accuracy:g} points may be lost"
                )
        return found


def compare(
    proof: Proof,
    torch_embeds: FloatArray,
    trained_embeds: FloatArray,
    bits: int,
    classes: FloatArray,
    answers: tuple[FloatArray, FloatArray],
) -> Parity:
    """Return the parity of a file's `answers`, embeddings (N, D) and probabilities (N, C).

    `torch_embeds` (N, D) are the merged tower's, `trained_embeds` those of the tower of `bits` bits that was trained;
    `classes` (C, D) is the class bank.
    """
    embeds, probabilities = answers
    wanted, said, known = (torch_embeds @ classes.T).argmax(axis=1), probabilities.argmax(axis=1), proof.known
    exported, trained = cosines(torch_embeds, embeds), cosines(torch_embeds, trained_embeds)
    labelled = known != UNKNOWN
    count = int(labelled.sum())
    return Parity(
        len(proof.pictures),
        float(exported.mean()),
        float(exported.min()),
        float((said == wanted).mean()),
        count,
        float((said == known)[labelled].mean()) if count else None,
        float((wanted == known)[labelled].mean()) if count else None,
        bits,
        float(trained.mean()),
        float(trained.min()),
    )


def torch_embeddings(tower: nn.Module, preprocessing: Preprocessing, pictures: Sequence[Image.Image]) -> FloatArray:
    """Return unit embeddings (N, D) by transformers' processor and a torch tower."""
    parts: list[FloatArray] = []
    device = next(tower.parameters()).device
    for batch in pixel_batches(preprocessing, pictures):
        with torch.no_grad():
            pixels = torch.from_numpy(batch).to(device, next(tower.parameters()).dtype)
            embeds = tower(pixel_values=pixels).image_embeds.float()
            parts.append(torch.nn.functional.normalize(embeds, dim=-1).cpu().numpy())
    return np.concatenate(parts)


def pixel_batches(preprocessing: Preprocessing, pictures: Sequence[Image.Image]) -> Iterable[FloatArray]:
    """Yield pictures as what the encoder takes, by transformers' processor: batches (N, 3, H, W) of at most 32."""
    for start in range(0, len(pictures), BATCH):
        pixels = preprocessing.pixels(list(pictures[start : start + BATCH]))
        yield preprocessing.normalise(torch.from_numpy(pixels)).contiguous().numpy()


def onnx_answers(
    model: bytes, pictures: Sequence[Image.Image], inputs: dict[str, FloatArray] | None = None
) -> tuple[FloatArray, FloatArray]:
    """Return embeddings (N, D) and probabilities (N, C) by onnxruntime, each picture at its own size.

    `inputs` are given besides the picture, in the place of defaults.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of inputs with defaults, which are meant
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    embeds, probabilities = [], []
    for picture in pictures:
        array = np.asarray(picture.convert("RGB"))[None]
        embed, probability = session.run([EMBEDS, PROBABILITIES], {IMAGES: array, **(inputs or {})})
        embeds.append(embed[0])
        probabilities.append(probability[0])
    return np.stack(embeds), np.stack(probabilities)


def cosines(left: FloatArray, right: FloatArray) -> FloatArray:
    """Return the cosine of each pair of rows, (N,)."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.asarray((left * right).sum(axis=1) / norms, np.float32)
