"""The ONNX graphs around the encoder: preprocessing before it, class probabilities after it.

Together with the encoder they make one file that takes pictures of any size and answers with probabilities, so that a
device needs onnxruntime and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from clip_lora.preprocess import Preprocessing
from export.errors import ExportError
from protocol.messages import FloatArray

OPSET = 18
IMAGES, PIXELS, EMBEDS, PROBABILITIES = "images", "pixel_values", "image_embeds", "probabilities"
CLASS_EMBEDDINGS = "class_embeddings"
PREPROCESSING = "pre/"


def preprocessing_graph(preprocessing: Preprocessing, ir_version: int) -> onnx.ModelProto:
    """Return images uint8 (batch, height, width, 3) -> pixel_values float32 (batch, 3, crop, crop).

    As CLIP's processor does it with Pillow: short side to `short_side` by antialiased bicubic interpolation, the width
    first and then the height, each rounded to whole grey levels; centre crop; then (x / 255 - mean) / std. Until after the
    crop a value takes a byte: a picture of a camera would take hundreds of megabytes as float32.
    """
    if preprocessing.crop > preprocessing.short_side:
        raise ExportError(f"cannot crop {preprocessing.crop} from a short side of {preprocessing.short_side} pixels")
    constants: dict[str, Any] = {
        "short": np.array([preprocessing.short_side], np.int64),
        "crop": np.array([preprocessing.crop, preprocessing.crop], np.int64),
        "two": np.array([2], np.int64),
        "hw": np.array([2, 3], np.int64),
        "mean": np.array(preprocessing.mean, np.float32).reshape(1, 3, 1, 1) * 255.0,
        "scale": np.array(preprocessing.std, np.float32).reshape(1, 3, 1, 1) * 255.0,
    }
    nodes = [
        helper.make_node("Transpose", [IMAGES], ["nchw"], perm=[0, 3, 1, 2]),
        # New sides: floor(side * short_side / short), which is transformers' rounding and not Resize's own.
        helper.make_node("Shape", ["nchw"], ["sides"], start=2, end=4),
        helper.make_node("ReduceMin", ["sides"], ["shortest"], keepdims=1),
        helper.make_node("Mul", ["sides", "short"], ["scaled"]),
        helper.make_node("Div", ["scaled", "shortest"], ["new_sides"]),
        helper.make_node("Split", ["new_sides"], ["new_height", "new_width"], num_outputs=2),
        _resize("nchw", "new_width", axis=3, out="wide"),
        _resize("wide", "new_height", axis=2, out="resized"),
        helper.make_node("Sub", ["new_sides", "crop"], ["spare"]),
        helper.make_node("Div", ["spare", "two"], ["from"]),
        helper.make_node("Add", ["from", "crop"], ["to"]),
        helper.make_node("Slice", ["resized", "from", "to", "hw"], ["cropped"]),
        helper.make_node("Cast", ["cropped"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["float", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "scale"], [PIXELS]),
    ]
    side = preprocessing.crop
    return _model(
        helper.make_graph(
            nodes,
            "preprocessing",
            [helper.make_tensor_value_info(IMAGES, TensorProto.UINT8, ["batch", "height", "width", 3])],
            [helper.make_tensor_value_info(PIXELS, TensorProto.FLOAT, ["batch", 3, side, side])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        ir_version,
    )


def _resize(source: str, size: str, *, axis: int, out: str) -> onnx.NodeProto:
    """Return one of Pillow's two passes; of bytes onnxruntime makes bytes, rounded and clipped as Pillow does.

    Pillow's bicubic has a = -0.5 and renormalises its weights at the border. It clips between the passes as well: with
    both in one Resize, the overshoot at sharp edges cost 0.008 of cosine on 8x8 pictures.
    """
    return helper.make_node(
        "Resize",
        [source, "", "", size],
        [out],
        axes=[axis],
        mode="cubic",
        antialias=1,
        cubic_coeff_a=-0.5,
        exclude_outside=1,
        coordinate_transformation_mode="half_pixel",
    )


def classifier_graph(embeddings: FloatArray, logit_scale: float, ir_version: int) -> onnx.ModelProto:
    """Return embeds (batch, D) -> the same of unit length u, and the softmax over classes of logit_scale * u . t_c.

    The t_c (C, D) are an input with these as its default: other classes, of any number, need no other graph.
    """
    width = embeddings.shape[1]
    nodes = [
        helper.make_node("ReduceL2", ["embeds_in", "width_axis"], ["length"], keepdims=1),
        helper.make_node("Div", ["embeds_in", "length"], [EMBEDS]),
        helper.make_node("Transpose", [CLASS_EMBEDDINGS], ["columns"], perm=[1, 0]),
        helper.make_node("MatMul", [EMBEDS, "columns"], ["cosines"]),
        helper.make_node("Mul", ["cosines", "logit_scale"], ["logits"]),
        helper.make_node("Softmax", ["logits"], [PROBABILITIES], axis=-1),
    ]
    return _model(
        helper.make_graph(
            nodes,
            "classifier",
            [
                helper.make_tensor_value_info("embeds_in", TensorProto.FLOAT, ["batch", width]),
                helper.make_tensor_value_info(CLASS_EMBEDDINGS, TensorProto.FLOAT, ["classes", width]),
            ],
            [
                helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, ["batch", "classes"]),
                helper.make_tensor_value_info(EMBEDS, TensorProto.FLOAT, ["batch", width]),
            ],
            [
                numpy_helper.from_array(embeddings.astype(np.float32), CLASS_EMBEDDINGS),
                numpy_helper.from_array(np.array(logit_scale, np.float32), "logit_scale"),
                numpy_helper.from_array(np.array([1], np.int64), "width_axis"),
            ],
        ),
        ir_version,
    )


def join(preprocessing: onnx.ModelProto, encoder: onnx.ModelProto, classifier: onnx.ModelProto) -> onnx.ModelProto:
    """Chain the three graphs into one: the encoder, which becomes it. onnx.compose would copy its weights, several times."""
    graph, embeds, inside = encoder.graph, encoder.graph.output[0].name, f"{PREPROCESSING}{PIXELS}"
    _rename(preprocessing.graph, lambda name: name if name in ("", IMAGES) else f"{PREPROCESSING}{name}")
    _rename(graph, lambda name: inside if name == PIXELS else name)
    _rename(classifier.graph, lambda name: embeds if name == "embeds_in" else name)
    kept = [value for value in (*graph.input, *classifier.graph.input) if value.name not in (PIXELS, "embeds_in")]
    nodes = [*preprocessing.graph.node, *graph.node, *classifier.graph.node]
    inputs = [*preprocessing.graph.input, *kept]
    for old, new in ((graph.node, nodes), (graph.input, inputs), (graph.output, list(classifier.graph.output))):
        copies = [type(item).FromString(item.SerializeToString()) for item in new]
        del old[:]
        old.extend(copies)
    graph.initializer.extend([*preprocessing.graph.initializer, *classifier.graph.initializer])
    return encoder


def _rename(graph: onnx.GraphProto, name_of: Callable[[str], str]) -> None:
    """Give values of a graph other names, but for its inputs' and outputs' declarations."""
    for node in graph.node:
        node.input[:] = [name_of(name) for name in node.input]
        node.output[:] = [name_of(name) for name in node.output]
    for value in graph.initializer:
        if value.name != name_of(value.name):
            value.name = name_of(value.name)


def _model(graph: onnx.GraphProto, ir_version: int) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=ir_version)
