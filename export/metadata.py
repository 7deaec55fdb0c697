"""What an artefact says of itself, inside the file: what it answers with, where it comes from, what made it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import onnx
import onnxruntime
import torch
import transformers

from clip_lora.shapes import LoraShape
from export.flavours import Flavour
from export.graph import OPSET
from protocol.codec import encode_adapter, sha256
from protocol.messages import Adapter, TextBank

METADATA = "clipcast"
EXPORTERS: dict[Flavour, str] = {"fused": "torch.onnx (TorchScript), onnxruntime.transformers"}
DYNAMO = "torch.onnx (dynamo)"


@dataclass(frozen=True)
class Source:
    """What an artefact is made from.

    `client` is the device whose own adapter it is, None for the global one; it, `round` and `federation` are provenance
    only. `revision` is the base model's commit on its hub and `licence` its licence, None where nobody said.
    """

    bank: TextBank
    adapter: Adapter
    shape: LoraShape
    federation: str
    round: int
    client: str | None = None
    revision: str | None = None
    licence: str | None = None


def provenance(source: Source, flavour: Flavour) -> dict[str, Any]:
    """Return what the file and its report have in common."""
    return {
        "labels": list(source.bank.classes),
        "templates": list(source.bank.templates),
        "logit_scale": source.bank.logit_scale,
        "model": source.bank.model,
        "model_digest": source.bank.model_digest,
        "model_revision": source.revision,
        "licence": source.licence,
        "federation": source.federation,
        "round": source.round,
        "client": source.client,
        "adapter_sha256": sha256(encode_adapter(source.adapter)),
        "flavour": flavour,
        "exporter": EXPORTERS.get(flavour, DYNAMO),
        "opset": OPSET,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }


def inscribe(model: onnx.ModelProto, facts: dict[str, Any]) -> None:
    """Write facts into a model, in the place of those that it may have."""
    for entry in [entry for entry in model.metadata_props if entry.key == METADATA]:
        model.metadata_props.remove(entry)
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(facts, sort_keys=True)
