"""LoRA on a CLIP tower through peft: attach, read out, load, merge. The one place that knows what travels."""

from __future__ import annotations

from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from clip_lora.algebra import A, Adapter, delta, layers
from clip_lora.errors import ModelError
from clip_lora.shapes import LoraShape, Sizes, adapter_shapes, check_shapes

__all__ = ["PeftModel", "adapter_state", "attach", "freeze_factors", "load_adapter", "merge", "trained_names"]

PEFT_PREFIX = "base_model.model."


def attach(tower: nn.Module, sizes: Sizes, kind: Literal["vision", "text"], shape: LoraShape) -> PeftModel:
    """Put trainable LoRA factors on a tower; only they require gradients."""
    targets = [name.removesuffix(".lora_A") for name in adapter_shapes(sizes, kind, shape) if name.endswith(".lora_A")]
    lora = LoraConfig(r=shape.rank, lora_alpha=shape.alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    return get_peft_model(tower, lora)


def adapter_state(model: PeftModel) -> Adapter:
    """Return the adapter's factors as float32 arrays: all that ever leaves a device of the model."""
    with torch.no_grad():
        return {name: p.detach().float().cpu().numpy().copy() for name, p in _factors(model).items()}


def trained_names(model: PeftModel) -> list[str]:
    """Return the names of the factors that training may change, sorted: those that require gradients."""
    return [name for name, parameter in _factors(model).items() if parameter.requires_grad]


def freeze_factors(model: PeftModel, *, a: bool) -> None:
    """Train B alone if `a`, both factors otherwise (FFA-LoRA, arXiv 2403.12313: A stays as it is initialised)."""
    for name, parameter in _factors(model).items():
        parameter.requires_grad_(not (a and name.endswith(A)))


def load_adapter(model: PeftModel, adapter: Adapter) -> None:
    """Set the factors; raises ModelError unless names and shapes are exactly the model's."""
    factors = _factors(model)
    check_shapes(adapter, {name: (p.shape[0], p.shape[1]) for name, p in factors.items()})
    with torch.no_grad():
        for name, parameter in factors.items():
            parameter.copy_(torch.from_numpy(adapter[name]))


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
