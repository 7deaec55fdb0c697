"""Adapter + full-precision base -> ONNX files with their proof.

A quantised module does not export, and an adapter was trained against quantised weights: the full-precision base is
loaded, the adapter merged into it, and the report says what that changed. One flavour is kept in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from clip_lora.algebra import layers
from clip_lora.lora import attach, load_adapter, merge
from clip_lora.preprocess import Preprocessing, load_preprocessing
from clip_lora.shapes import scale
from clip_lora.towers import load_image_tower, load_sizes, model_facts
from export.errors import ExportError
from export.flavours import GATES, Flavour
from export.graph import classifier_graph, join, preprocessing_graph
from export.lora import about, adapter_file, factors, trace_with_factors
from export.metadata import Source, inscribe, provenance
from export.parity import Parity, Proof, compare, onnx_answers, pixel_batches, torch_embeddings
from export.precision import half, int4, int8_dynamic, int8_static
from export.trace import trace, trace_fused
from protocol.messages import FloatArray
from protocol.storage.files import write_atomic

ADAPTER_SUFFIX = ".onnx_adapter"
CALIBRATED: Flavour = "int8-qdq"


def export_artefact(
    source: Source,
    proof: Proof,
    bits: int,
    out: Path,
    model: str | None = None,
    flavour: Flavour = "fp32",
    *,
    accept_drift: bool = False,
) -> Parity:
    """Write one flavour to `out`; as `export_artefacts`."""
    (parity,) = (
        found for _, found in export_artefacts(source, proof, bits, {flavour: out}, model, accept_drift=accept_drift)
    )
    return parity


def export_artefacts(
    source: Source,
    proof: Proof,
    bits: int,
    outs: Mapping[Flavour, Path],
    model: str | None = None,
    *,
    accept_drift: bool = False,
) -> Iterator[tuple[Flavour, Parity]]:
    """Write each flavour (ONNX) and its report beside it (.json), and yield its parity.

    `bits` is what the adapter was trained against; `model` names the base if not by the class bank's name. The flavour
    `adapter` writes the source's adapter besides, as a file of its own (.onnx_adapter). A flavour whose answers are further
    from torch's than its gate allows is not written, unless `accept_drift`, which the file then says; after the others
    ExportError is raised, which names it.
    """
    if not proof.pictures:
        raise ExportError("no pictures to prove the export on: name some with --data")
    name = _checked(source, model)
    preprocessing = load_preprocessing(name)
    trained = _quantised_embeddings(name, bits, source, proof, preprocessing)
    merged = _merged(name, source)
    reference = torch_embeddings(merged, preprocessing, proof.pictures)
    refused = []
    for flavour, out in outs.items():
        tower = load_image_tower(name, 32).eval() if flavour == "adapter" else merged
        blob = _build(flavour, tower, source, preprocessing, proof)
        inputs = factors(source.adapter, scale(source.shape)) if flavour == "adapter" else None
        # What a flavour was calibrated with proves nothing about it.
        part = slice(1, None, 2) if flavour == CALIBRATED and len(proof.pictures) > 1 else slice(None)
        proven = Proof(proof.pictures[part], proof.labels[part])
        answers = onnx_answers(blob, proven.pictures, inputs)
        parity = compare(proven, reference[part], trained[part], bits, source.bank.embeddings, answers)
        drift = parity.drift(GATES[flavour])
        if drift and not accept_drift:
            refused.append(f"the ONNX file ({flavour}) differs from torch: {'; '.join(drift)}")
            continue
        _write(out, blob, source, flavour, parity, drift)
        yield flavour, parity
    if refused:
        raise ExportError(
            f"{'. '.join(refused)}. {'It was' if len(refused) == 1 else 'They were'} not written. Take another flavour, or "
            f"say --accept-drift, and the file will say so too"
        )


def _checked(source: Source, model: str | None) -> str:
    name = model or source.bank.model
    facts = model_facts(name)
    if facts.digest != source.bank.model_digest:
        raise ExportError(
            f"model {name!r} has weights {facts.digest[:12]}, the federation used {source.bank.model_digest[:12]}"
        )
    return name


def _merged(name: str, source: Source) -> nn.Module:
    tower: nn.Module = load_image_tower(name, 32)
    merge(tower, source.adapter, scale(source.shape))
    return tower.eval()


def _build(flavour: Flavour, tower: nn.Module, source: Source, preprocessing: Preprocessing, proof: Proof) -> bytes:
    encoder = _encoder(flavour, tower, source, preprocessing, proof)
    del encoder.graph.value_info[:]  # of the types and shapes before a flavour was made of it
    before = preprocessing_graph(preprocessing, encoder.ir_version)
    after = classifier_graph(source.bank.embeddings, source.bank.logit_scale, encoder.ir_version)
    model = join(before, encoder, after)
    inscribe(model, _facts(source, flavour, []))
    blob = bytes(model.SerializeToString(deterministic=True))
    del model, encoder  # of a large tower each copy counts, and the checker makes some
    onnx.checker.check_model(blob, full_check=True)
    return blob


def _encoder(
    flavour: Flavour, tower: nn.Module, source: Source, preprocessing: Preprocessing, proof: Proof
) -> onnx.ModelProto:
    match flavour:
        case "fp32":
            return trace(tower)
        case "fp16":
            return half(trace(tower))
        case "int8":
            return int8_dynamic(trace(tower))
        case "int8-qdq":
            return int8_static(trace(tower), list(pixel_batches(preprocessing, proof.pictures[::2])))
        case "int4":
            return int4(trace(tower))
        case "fused":
            return trace_fused(tower)
        case "adapter":
            return trace_with_factors(tower, layers(source.adapter))


def _write(out: Path, blob: bytes, source: Source, flavour: Flavour, parity: Parity, drift: list[str]) -> None:
    facts = _facts(source, flavour, drift)
    if drift:
        model = onnx.load_from_string(blob)
        inscribe(model, facts)
        blob = bytes(model.SerializeToString(deterministic=True))
    report = {"parity": asdict(parity), "gate": asdict(GATES[flavour]), "bytes": len(blob), **facts}
    write_atomic(out, blob)
    if flavour == "adapter":
        write_atomic(out.with_suffix(ADAPTER_SUFFIX), own_adapter(source))
    write_atomic(out.with_suffix(".json"), json.dumps(report, indent=2).encode())


def own_adapter(source: Source) -> bytes:
    """Return the source's adapter as a file for the flavour `adapter` of its base; raises ExportError."""
    return adapter_file(source.adapter, scale(source.shape), source.bank.model_digest, source.round)


def _facts(source: Source, flavour: Flavour, drift: list[str]) -> dict[str, Any]:
    facts = {**provenance(source, flavour), "drift_accepted": drift}
    if flavour == "adapter":  # the graph is of no round: its adapters are
        return {**facts, "adapter_sha256": None, "lora": about(source.adapter, source.bank.model_digest)}
    return facts


def _quantised_embeddings(name: str, bits: int, source: Source, proof: Proof, preprocessing: Preprocessing) -> FloatArray:
    """Return what the tower that was trained says: quantised base, adapter beside it."""
    model = attach(load_image_tower(name, bits), load_sizes(name), "vision", source.shape)
    load_adapter(model, source.adapter)
    return torch_embeddings(model, preprocessing, proof.pictures)
