"""The image tower as an ONNX graph: pixel_values (N, 3, H, W) -> embeddings (N, D), of any length."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from export.errors import ExportError
from export.graph import EMBEDS, OPSET, PIXELS
from export.quiet import quiet

ENCODED = f"{EMBEDS}_encoder"
MAX_BATCH = 1024
CONTRIB = "com.microsoft"
MAX_IR = 10  # what ONNX Runtime 1.18 reads
LEGACY_OPSET = 17  # ONNX Runtime's fusions for CLIP know what the older exporter writes up to here


class Encoder(nn.Module):
    """pixel_values (N, 3, H, W) -> image embeddings (N, D)."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the embeddings of a batch."""
        embeds: Tensor = self.tower(pixel_values=pixel_values).image_embeds
        return embeds


def trace(tower: nn.Module) -> onnx.ModelProto:
    """Export the tower by torch.export (dynamo), opset 18, batch dynamic."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with _silent():
        program = torch.onnx.export(
            Encoder(tower).eval(),
            (_pixels(tower),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[PIXELS],
            output_names=[ENCODED],
            dynamic_shapes={"pixel_values": {0: batch}},
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    model.ir_version = min(model.ir_version, MAX_IR)
    return model


def trace_fused(tower: nn.Module) -> onnx.ModelProto:
    """Export the tower by the older exporter with plain attention, and let ONNX Runtime's optimiser fuse it for CLIP.

    Of all combinations only this one gives fused Attention. Raises ExportError if the optimiser does not find each block's
    attention.
    """
    from onnxruntime.transformers.optimizer import optimize_model

    config: Any = tower.config
    heads, width, blocks = config.num_attention_heads, config.hidden_size, config.num_hidden_layers
    with tempfile.TemporaryDirectory() as folder, _silent(), _plain_attention(config):
        path = Path(folder) / "encoder.onnx"
        torch.onnx.export(
            Encoder(tower).eval(),
            (_pixels(tower),),
            path,
            dynamo=False,
            opset_version=LEGACY_OPSET,
            input_names=[PIXELS],
            output_names=[ENCODED],
            dynamic_axes={PIXELS: {0: "batch"}, ENCODED: {0: "batch"}},
        )
        fused = optimize_model(str(path), model_type="clip", num_heads=heads, hidden_size=width, opt_level=0)
    found = sum(node.op_type == "Attention" for node in fused.model.graph.node)
    if found != blocks:
        raise ExportError(
            f"ONNX Runtime's optimiser fused the attention of {found} of {blocks} blocks: this model has no fused flavour. "
            f"Export another one, such as fp32"
        )
    return _as_newer(fused.model)


@contextlib.contextmanager
def _plain_attention(config: Any) -> Iterator[None]:
    """Let a tower compute attention by products and a softmax, which the optimiser knows."""
    before = config._attn_implementation  # noqa: SLF001 - transformers' public way wants the whole model anew
    config._attn_implementation = "eager"  # noqa: SLF001
    try:
        yield
    finally:
        config._attn_implementation = before  # noqa: SLF001


def _as_newer(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model of opset 17 as one of 18, with ONNX Runtime's own operators: no operator of a tower has changed."""
    del model.opset_import[:]
    model.opset_import.extend((helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)))
    model.ir_version = min(model.ir_version, MAX_IR)
    return model


def _pixels(tower: nn.Module) -> Tensor:
    side = int(tower.config.image_size)  # type: ignore[union-attr, arg-type]
    return torch.zeros(2, 3, side, side)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep quiet what the exporters print and warn of: it is about themselves."""
    with quiet(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
