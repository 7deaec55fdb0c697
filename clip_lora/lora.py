"""LoRA on a CLIP tower through peft: attach, read out, load, merge. The one place that knows what travels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from clip_lora.algebra import Adapter, delta, layers
from clip_lora.errors import ModelError

__all__ = [
    "LoraShape",
    "PeftModel",
    "Shapes",
    "adapter_shapes",
    "adapter_state",
    "attach",
    "block_of",
    "check_shapes",
    "initial_adapter",
    "load_adapter",
    "merge",
    "scale",
    "trained_names",
]

PEFT_PREFIX = "base_model.model."
Shapes = dict[str, tuple[int, int]]


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


def adapter_shapes(config: Any, tower: Literal["vision", "text"], shape: LoraShape) -> Shapes:
    """Return name -> shape of every factor of an adapter on one tower of a CLIPConfig; raises ModelError."""
    part = config.vision_config if tower == "vision" else config.text_config
    if shape.first_block >= part.num_hidden_layers:
        raise ModelError(f"first_block {shape.first_block}: the {tower} tower has {part.num_hidden_layers} blocks, from 0")
    width = part.hidden_size
    shapes: Shapes = {}
    for block in range(shape.first_block, part.num_hidden_layers):
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


def attach(tower: nn.Module, config: Any, kind: Literal["vision", "text"], shape: LoraShape) -> PeftModel:
    """Put trainable LoRA factors on a tower; only they require gradients."""
    targets = [name.removesuffix(".lora_A") for name in adapter_shapes(config, kind, shape) if name.endswith(".lora_A")]
    lora = LoraConfig(r=shape.rank, lora_alpha=shape.alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    return get_peft_model(tower, lora)


def adapter_state(model: PeftModel) -> Adapter:
    """Return the adapter's factors as float32 arrays: all that ever leaves a device of the model."""
    with torch.no_grad():
        return {name: p.detach().float().cpu().numpy().copy() for name, p in _factors(model).items()}


def trained_names(model: PeftModel) -> list[str]:
    """Return the names of the factors that training may change, sorted: those that require gradients."""
    return [name for name, parameter in _factors(model).items() if parameter.requires_grad]


def load_adapter(model: PeftModel, adapter: Adapter) -> None:
    """Set the factors; raises ModelError unless names and shapes are exactly the model's."""
    factors = _factors(model)
    check_shapes(adapter, {name: (p.shape[0], p.shape[1]) for name, p in factors.items()})
    with torch.no_grad():
        for name, parameter in factors.items():
            parameter.copy_(torch.from_numpy(adapter[name]))


def check_shapes(adapter: Adapter, shapes: Shapes) -> None:
    """Raise ModelError unless the adapter has exactly these factors."""
    if adapter.keys() != shapes.keys():
        odd = sorted(adapter.keys() ^ shapes.keys())
        raise ModelError(f"adapter and model differ in {len(odd)} factors, first {odd[0]}: same model, projections, blocks?")
    for name, expected in shapes.items():
        if adapter[name].shape != expected:
            raise ModelError(f"{name} is {adapter[name].shape}, the model wants {expected}: another rank or model?")


def merge(tower: nn.Module, adapter: Adapter, factor: float) -> None:
    """Add factor * B A to a full-precision tower's weights in place; raises ModelError if a result is not finite.

    Give it a freshly loaded tower: nothing is changed unless every layer is found and finite.
    """
    changes: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        names = layers(adapter)
    except ValueError as error:
        raise ModelError(str(error)) from error
    for layer in names:
        try:
            module = tower.get_submodule(layer)
        except AttributeError as error:
            raise ModelError(f"the adapter changes {layer}, which this model does not have") from error
        if not isinstance(module, nn.Linear) or not module.weight.dtype.is_floating_point:
            raise ModelError(f"{layer} is quantised: merge into the full-precision base")
        rows, columns = module.weight.shape
        rank = adapter[f"{layer}.lora_A"].shape[0]
        shapes = {f"{layer}.lora_A": (rank, columns), f"{layer}.lora_B": (rows, rank)}
        check_shapes({name: adapter[name] for name in shapes}, shapes)
        change = torch.from_numpy(delta(adapter, layer, factor)).to(module.weight.device)
        merged = (module.weight.detach().double() + change).to(module.weight.dtype)
        if not torch.isfinite(merged).all():
            raise ModelError(f"merging {layer} gives values that are not finite")
        changes.append((module.weight, merged))
    with torch.no_grad():
        for weight, merged in changes:
            weight.copy_(merged)


def _factors(model: PeftModel) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer = path.removeprefix(PEFT_PREFIX)
            found[f"{layer}.lora_A"] = module.lora_A["default"].weight
            found[f"{layer}.lora_B"] = module.lora_B["default"].weight
    return dict(sorted(found.items()))
