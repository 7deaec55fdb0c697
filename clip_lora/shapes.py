"""Which factors an adapter has, by name and shape: all that is known of a model without its weights. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from clip_lora.algebra import Adapter
from clip_lora.errors import ModelError

Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class TowerSize:
    """A tower's number of transformer blocks, and the width of their attention."""

    blocks: int
    width: int


@dataclass(frozen=True)
class Sizes:
    """How large a CLIP's two towers are."""

    vision: TowerSize
    text: TowerSize


class LoraShape(Protocol):
    """What makes adapters compatible: rank, alpha, projections and the first adapted block."""

    @property
    def rank(self) -> int:
        """Inner width of the factors."""

    @property
    def alpha(self) -> float:
        """Numerator of the scale alpha / rank."""

    @property
    def projections(self) -> Sequence[str]:
        """Adapted projections of each block's attention."""

    @property
    def first_block(self) -> int:
        """Index of the first adapted block."""


def scale(shape: LoraShape) -> float:
    """Return alpha / rank."""
    return shape.alpha / shape.rank


def adapter_shapes(sizes: Sizes, tower: Literal["vision", "text"], shape: LoraShape) -> Shapes:
    """Return name -> shape of every factor of an adapter on one tower; raises ModelError."""
    part = sizes.vision if tower == "vision" else sizes.text
    if shape.first_block >= part.blocks:
        raise ModelError(f"first_block {shape.first_block}: the {tower} tower has {part.blocks} blocks, from 0")
    width = part.width
    shapes: Shapes = {}
    for block in range(shape.first_block, part.blocks):
        for projection in sorted(shape.projections):
            layer = f"{tower}_model.encoder.layers.{block}.self_attn.{projection}"
            shapes[f"{layer}.lora_A"] = (shape.rank, width)
            shapes[f"{layer}.lora_B"] = (width, shape.rank)
    return dict(sorted(shapes.items()))


def block_of(name: str) -> int:
    """Return the index of the block that a factor adapts, from its name."""
    return int(name.split(".layers.")[1].split(".", maxsplit=1)[0])


def initial_adapter(shapes: Shapes, seed: int) -> Adapter:
    """Return round 0's adapter: B = 0, A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5, as in LoRA and peft)."""
    rng = np.random.default_rng(seed)
    adapter: dict[str, NDArray[np.float32]] = {}
    for name, (rows, columns) in shapes.items():
        bound = 1.0 / np.sqrt(columns) if name.endswith(".lora_A") else 0.0
        adapter[name] = rng.uniform(-bound, bound, (rows, columns)).astype(np.float32)
    return adapter


def check_shapes(adapter: Adapter, shapes: Shapes) -> None:
    """Raise ModelError unless the adapter has exactly these factors."""
    if adapter.keys() != shapes.keys():
        odd = sorted(adapter.keys() ^ shapes.keys())
        raise ModelError(f"adapter and model differ in {len(odd)} factors, first {odd[0]}: same model, projections, blocks?")
    for name, expected in shapes.items():
        if adapter[name].shape != expected:
            raise ModelError(f"{name} is {adapter[name].shape}, the model wants {expected}: another rank or model?")
