"""Adapter + full-precision base -> one ONNX file with its proof.

A quantised module does not export, and an adapter was trained against quantised weights: the full-precision base is
loaded, the adapter merged into it, and the report says what that changed.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import onnxruntime
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from clip_lora.lora import attach, load_adapter, merge
from clip_lora.preprocess import load_preprocessing
from clip_lora.shapes import LoraShape, scale
from clip_lora.towers import load_image_tower, load_sizes, model_facts
from export.errors import ExportError
from export.graph import EMBEDS, OPSET, PIXELS, classifier_graph, join, preprocessing_graph
from export.parity import MIN_COSINE, Parity, cosines, onnx_answers, torch_embeddings
from protocol.codec import encode_adapter, sha256
from protocol.messages import Adapter, FloatArray, TextBank
from protocol.storage.files import write_atomic

METADATA = "clipcast"
MAX_BATCH = 1024


@dataclass(frozen=True)
class Source:
    """What an artefact is made from. `round` and `federation` are provenance only."""

    bank: TextBank
    adapter: Adapter
    shape: LoraShape
    federation: str
    round: int


class _Encoder(nn.Module):
    """pixel_values (N, 3, H, W) -> unit image embeddings (N, D)."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor) -> Tensor:
        embeds: Tensor = self.tower(pixel_values=pixel_values).image_embeds
        unit: Tensor = embeds / embeds.norm(dim=-1, keepdim=True)
        return unit


def export_artefact(
    source: Source, pictures: Sequence[Image.Image], bits: int, out: Path, model: str | None = None
) -> Parity:
    """Write `out` (ONNX) and its report beside it (.json); return the parity.

    `bits` is what the adapter was trained against; `model` names the base if not by the class bank's name. Raises
    ExportError, writing nothing, if the file's embeddings fall below a cosine of 0.999 to torch's on any picture.
    """
    if not pictures:
        raise ExportError("no pictures to prove the export on: name some with --data")
    name = model or source.bank.model
    facts = model_facts(name)
    if facts.digest != source.bank.model_digest:
        raise ExportError(
            f"model {name!r} has weights {facts.digest[:12]}, the federation used {source.bank.model_digest[:12]}"
        )
    preprocessing = load_preprocessing(name)
    tower = load_image_tower(name, 32)
    merge(tower, source.adapter, scale(source.shape))
    tower.eval()
    blob = _build(tower, source, preprocessing_graph(preprocessing, onnx.IR_VERSION))
    reference = torch_embeddings(tower, preprocessing, pictures)
    embeds, probabilities = onnx_answers(blob, pictures)
    wanted = (reference @ source.bank.embeddings.T).argmax(axis=1)
    exported = cosines(reference, embeds)
    trained = cosines(reference, _quantised_embeddings(name, bits, source, pictures))
    parity = Parity(
        len(pictures),
        float(exported.mean()),
        float(exported.min()),
        float((probabilities.argmax(axis=1) == wanted).mean()),
        bits,
        float(trained.mean()),
        float(trained.min()),
    )
    if not parity.passed:
        raise ExportError(
            f"the ONNX file differs from torch: cosine {parity.cosine_min:.6f} on the worst of {len(pictures)} pictures, "
            f"{MIN_COSINE} is required. Nothing was written"
        )
    report = {"parity": asdict(parity), "bytes": len(blob), **_provenance(source)}
    write_atomic(out, blob)
    write_atomic(out.with_suffix(".json"), json.dumps(report, indent=2).encode())
    return parity


def _build(tower: nn.Module, source: Source, preprocessing: onnx.ModelProto) -> bytes:
    encoder = _trace(tower)
    encoder.ir_version = preprocessing.ir_version = min(encoder.ir_version, 10)  # ONNX Runtime 1.18 reads up to 10
    classifier = classifier_graph(source.bank.embeddings, source.bank.logit_scale, encoder.ir_version)
    model = join(preprocessing, encoder, classifier)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(_provenance(source), sort_keys=True)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def _trace(tower: nn.Module) -> onnx.ModelProto:
    """Export the encoder by torch.export (dynamo), opset 18, batch dynamic."""
    side = int(tower.config.image_size)  # type: ignore[union-attr, arg-type]
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    silence = contextlib.redirect_stdout(io.StringIO())  # the exporter prints its progress
    with warnings.catch_warnings(), silence, _quiet("torch.onnx", "onnxscript", "torch.export"):
        warnings.simplefilter("ignore")  # deprecations inside the exporter are not the user's
        program = torch.onnx.export(
            _Encoder(tower).eval(),
            (torch.zeros(2, 3, side, side),),
            dynamo=True,
            opset_version=OPSET,
            input_names=[PIXELS],
            output_names=[f"{EMBEDS}_encoder"],
            dynamic_shapes={"pixel_values": {0: batch}},
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def _quantised_embeddings(name: str, bits: int, source: Source, pictures: Sequence[Image.Image]) -> FloatArray:
    """Return what the tower that was trained says: quantised base, adapter beside it."""
    model = attach(load_image_tower(name, bits), load_sizes(name), "vision", source.shape)
    load_adapter(model, source.adapter)
    return torch_embeddings(model, load_preprocessing(name), pictures)


def _provenance(source: Source) -> dict[str, object]:
    return {
        "labels": list(source.bank.classes),
        "templates": list(source.bank.templates),
        "logit_scale": source.bank.logit_scale,
        "model": source.bank.model,
        "model_digest": source.bank.model_digest,
        "federation": source.federation,
        "round": source.round,
        "adapter_sha256": sha256(encode_adapter(source.adapter)),
        "opset": OPSET,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
