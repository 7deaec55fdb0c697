"""The adapter flavour: one graph whose LoRA factors are inputs with defaults, and small files that fill them.

A device keeps the graph, and its session, and changes its model by another file. The factors of layer l enter as
`lora/l/A` (in, rank) and `lora/l/B` (rank, out), A^T and (alpha / rank) B^T in the words of clip_lora/algebra.py: what the
graph adds to a layer's output for x is x A B. The defaults are zeros, which is the base.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from clip_lora.algebra import A, Adapter, B, layers, rank_of
from export.errors import ExportError
from export.trace import trace
from protocol.messages import FloatArray

FORMAT = 1  # of what the names and values above mean


class _WithFactors(nn.Module):
    """A linear layer with factors beside it: x W^T + b + x A B. Random at first: equal ones become one in the graph."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Parameter(torch.randn(linear.in_features, 1))
        self.lora_B = nn.Parameter(torch.randn(1, linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = self.linear(x)
        return base + (x @ self.lora_A) @ self.lora_B


def trace_with_factors(tower: nn.Module, names: Sequence[str]) -> onnx.ModelProto:
    """Export a tower in which the linear layers `names` have factors; the tower is changed. Raises ExportError."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        linear = tower.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(tower.get_submodule(parent), leaf, _WithFactors(linear))
    return _open_factors(trace(tower), names)


def _open_factors(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Make the factors inputs, with zeros of rank 1 as defaults; their rank is free."""
    graph = model.graph
    stored = {value.name: value for value in graph.initializer}
    for name in names:
        for factor, shape in (("A", [None, "rank"]), ("B", ["rank", None])):
            traced, public = f"tower.{name}.lora_{factor}", _input(name, factor)
            if traced not in stored:
                raise ExportError(f"the exporter left no factor {traced}: this torch names weights otherwise")
            dims = list(stored[traced].dims)
            graph.initializer.remove(stored[traced])
            graph.initializer.append(numpy_helper.from_array(np.zeros(dims, np.float32), public))
            free = [size if given is None else given for size, given in zip(dims, shape, strict=True)]
            graph.input.append(helper.make_tensor_value_info(public, TensorProto.FLOAT, free))
            for node in graph.node:
                node.input[:] = [public if entry == traced else entry for entry in node.input]
    return model


def about(adapter: Adapter, model_digest: str) -> dict[str, Any]:
    """Return what an artefact of this flavour says of its factors: their layers, and its `base_number`."""
    return {"layers": layers(adapter), "base": base_number(model_digest, layers(adapter))}


def base_number(model_digest: str, names: Sequence[str]) -> int:
    """Return the number that an adapter's file and the graph that it fits have in common: 31 bits of a hash."""
    told = json.dumps([FORMAT, model_digest, list(names)])
    return int.from_bytes(hashlib.sha256(told.encode()).digest()[:4], "big") >> 1


def factors(adapter: Adapter, factor: float) -> dict[str, FloatArray]:
    """Return an adapter as the graph's inputs; `factor` is alpha / rank."""
    made: dict[str, FloatArray] = {}
    for layer in layers(adapter):
        made[_input(layer, "A")] = np.ascontiguousarray(adapter[layer + A].T, np.float32)
        made[_input(layer, "B")] = np.ascontiguousarray(factor * adapter[layer + B].T, np.float32)
    return made


def adapter_file(adapter: Adapter, factor: float, model_digest: str, number: int) -> bytes:
    """Return an adapter as a file that onnxruntime reads; `factor` is alpha / rank, `number` the round.

    Raises ExportError for an adapter without factors.
    """
    if not rank_of(adapter):
        raise ExportError("an adapter without factors changes nothing: export the base alone")
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(number)
    made.set_model_version(base_number(model_digest, layers(adapter)))
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in factors(adapter, factor).items()}
    made.set_parameters(values)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter"
        made.export_adapter(str(path))
        return path.read_bytes()


def _input(layer: str, factor: str) -> str:
    return f"lora/{layer}/{factor}"
