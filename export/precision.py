"""Fewer bits for the encoder: float16, int8 in two forms, int4. What is around it, in graph.py, keeps its precision."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from export.graph import PIXELS
from export.quiet import quiet
from protocol.messages import FloatArray

# What float16 is too narrow for: sums over a row, and what divides by them.
IN_FLOAT = ["LayerNormalization", "Softmax", "ReduceL2", "ReduceSum", "ReduceMean", "Pow", "Sqrt", "Div"]
BLOCK = 32  # weights that share a scale in int4


def half(encoder: onnx.ModelProto) -> onnx.ModelProto:
    """Return the encoder in float16, with float32 inputs and outputs, and float32 where sums are taken."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    made: onnx.ModelProto = convert_float_to_float16(encoder, keep_io_types=True, op_block_list=IN_FLOAT)
    OnnxModel.graph_topological_sort(made.graph)  # it appends its casts
    return made


def int8_dynamic(encoder: onnx.ModelProto) -> onnx.ModelProto:
    """Return the encoder with int8 weights per channel, its activations quantised as they come: for CPUs.

    The patch embedding keeps float arithmetic, and its weights are int8 at rest.
    """

    def quantise(path: Path) -> None:
        quantize_dynamic(
            encoder,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )

    return _conv_at_rest(_written(quantise))


def int8_static(encoder: onnx.ModelProto, pixels: Sequence[FloatArray]) -> onnx.ModelProto:
    """Return the encoder with int8 weights and activations between QuantizeLinear and DequantizeLinear: for TensorRT.

    Only what multiplies by weights is quantised, symmetrically, as TensorRT wants it. `pixels` are batches
    (N, 3, H, W) of pictures like those to come: their activations set the scales.
    """
    weights = {value.name for value in encoder.graph.initializer}
    chosen = [
        node.name for node in encoder.graph.node if node.op_type in ("MatMul", "Gemm", "Conv") and node.input[1] in weights
    ]

    def quantise(path: Path) -> None:
        quantize_static(
            encoder,
            path,
            _Batches(pixels),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=chosen,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "DedicatedQDQPair": False},
        )

    return _written(quantise)


def int4(encoder: onnx.ModelProto) -> onnx.ModelProto:
    """Return the encoder with 4-bit weights (MatMulNBits), a scale and a zero point for 32 of them each."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantiser = MatMulNBitsQuantizer(encoder, bits=4, block_size=BLOCK, is_symmetric=False, accuracy_level=4)
    with quiet():
        quantiser.process()
    made: onnx.ModelProto = quantiser.model.model
    return _conv_at_rest(made)


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, pixels: Sequence[FloatArray]) -> None:
        self._left = iter(pixels)

    def get_next(self) -> dict[str, FloatArray] | None:
        batch = next(self._left, None)
        return None if batch is None else {PIXELS: batch}


def _written(quantise: Callable[[Path], None]) -> onnx.ModelProto:
    """Return what onnxruntime's quantiser writes: it knows files only."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "encoder.onnx"
        quantise(path)
        return onnx.load(path)


def _conv_at_rest(model: onnx.ModelProto) -> onnx.ModelProto:
    """Keep the weights of convolutions as int8, a scale for each output channel; onnxruntime unpacks them as it loads."""
    stored = {value.name: value for value in model.graph.initializer}
    for index, node in reversed(list(enumerate(model.graph.node))):
        if node.op_type != "Conv" or node.input[1] not in stored:
            continue
        name = node.input[1]
        weights = numpy_helper.to_array(stored[name])
        scales = np.maximum(np.abs(weights).reshape(len(weights), -1).max(axis=1) / 127.0, 1e-12).astype(np.float32)
        whole = np.clip(np.rint(weights / scales.reshape(-1, *[1] * (weights.ndim - 1))), -127, 127).astype(np.int8)
        model.graph.initializer.remove(stored.pop(name))
        parts = {f"{name}_quantized": whole, f"{name}_scale": scales, f"{name}_zero_point": np.zeros(len(scales), np.int8)}
        model.graph.initializer.extend(numpy_helper.from_array(value, part) for part, value in parts.items())
        model.graph.node.insert(index, helper.make_node("DequantizeLinear", list(parts), [name], axis=0))
    return model
