"""Every flavour against torch, on digits and on real photographs of odd sizes; what each file holds; and the gates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from clip_lora.lora import merge
from clip_lora.preprocess import load_preprocessing
from clip_lora.shapes import scale
from clip_lora.towers import load_image_tower
from export.artefact import export_artefact, export_artefacts
from export.errors import ExportError
from export.flavours import FLAVOURS, GATES, Flavour, Gate
from export.graph import CLASS_EMBEDDINGS, IMAGES
from export.lora import factors
from export.metadata import METADATA, Source
from export.parity import Parity, Proof, torch_embeddings
from protocol.messages import FloatArray
from tests.export.conftest import Exported
from tests.export.making import RECIPE, bank_of, photographs

each = pytest.mark.parametrize("flavour", FLAVOURS)


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


def inputs(flavour: Flavour, source: Source) -> dict[str, FloatArray]:
    """What a flavour is given besides the picture to be the source's model."""
    return factors(source.adapter, scale(source.shape)) if flavour == "adapter" else {}


def metadata(path: Path) -> dict[str, object]:
    model = onnx.load(path)
    return json.loads({entry.key: entry.value for entry in model.metadata_props}[METADATA])


@each
def test_a_flavour_says_what_transformers_processor_and_torch_say(
    flavour: Flavour, all_flavours: Exported, source: Source
) -> None:
    tower = load_image_tower("tiny-clip", 32)
    merge(tower, source.adapter, scale(source.shape))
    wanted = torch_embeddings(tower.eval(), load_preprocessing("tiny-clip"), photographs())
    running = session(all_flavours.files[flavour])
    for picture, embed in zip(photographs(), wanted, strict=True):
        (said,) = running.run(["image_embeds"], {IMAGES: np.asarray(picture)[None], **inputs(flavour, source)})
        assert np.linalg.norm(said[0]) == pytest.approx(1.0, abs=1e-5)
        assert float(said[0] @ embed) >= GATES[flavour].cosine, picture.size


@each
def test_the_report_beside_a_file_says_what_was_measured(flavour: Flavour, all_flavours: Exported, proof: Proof) -> None:
    path, parity = all_flavours.files[flavour], all_flavours.parities[flavour]
    report = json.loads(path.with_suffix(".json").read_text())
    part = slice(1, None, 2) if flavour == "int8-qdq" else slice(None)  # the others have calibrated it
    assert report["parity"]["pictures"] == len(proof.pictures[part]) == parity.pictures
    assert report["parity"]["labelled"] == parity.labelled == int((proof.known[part] >= 0).sum())
    assert report["gate"]["cosine"] == GATES[flavour].cosine <= report["parity"]["cosine_min"]
    assert parity.accuracy is not None
    assert parity.torch_accuracy is not None
    assert parity.accuracy >= parity.torch_accuracy - 0.005
    assert report["bytes"] == path.stat().st_size
    assert report["drift_accepted"] == []


@each
def test_a_file_says_inside_what_it_is(flavour: Flavour, all_flavours: Exported, source: Source) -> None:
    facts = metadata(all_flavours.files[flavour])
    assert facts["flavour"] == flavour
    assert facts["labels"] == list(source.bank.classes)
    assert facts["templates"] == list(source.bank.templates)
    assert facts["logit_scale"] == source.bank.logit_scale
    assert (facts["model"], facts["model_digest"]) == ("tiny-clip", source.bank.model_digest)
    assert (facts["federation"], facts["round"], facts["client"]) == ("lab", 3, None)
    assert facts["licence"] == "apache-2.0"
    assert {"torch", "transformers", "onnx", "onnxruntime"} == set(facts["versions"])  # type: ignore[call-overload]
    assert (facts["adapter_sha256"] is None) == (flavour == "adapter")


@each
def test_a_file_passes_the_checker_and_opens_in_old_runtimes(flavour: Flavour, all_flavours: Exported) -> None:
    model = onnx.load(all_flavours.files[flavour])
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert model.ir_version <= 10  # what ONNX Runtime 1.18 reads
    assert {(item.domain, item.version) for item in model.opset_import} <= {("", 18), ("com.microsoft", 1)}
    assert not any(value.external_data for value in model.graph.initializer)


def test_fewer_bits_make_smaller_files(all_flavours: Exported) -> None:
    size = {flavour: path.stat().st_size for flavour, path in all_flavours.files.items()}
    assert size["fp16"] < 0.55 * size["fp32"]
    assert size["int8"] < 0.32 * size["fp32"]  # norms and position embeddings weigh more in a tiny model
    assert size["int4"] < size["int8"]


def test_the_fused_flavour_has_fused_attention_and_the_quantised_ones_their_own_operators(all_flavours: Exported) -> None:
    def count(flavour: Flavour, operator: str) -> int:
        return sum(node.op_type == operator for node in onnx.load(all_flavours.files[flavour]).graph.node)

    assert count("fused", "Attention") == 6
    assert count("int8", "MatMulInteger") >= 6 * 6
    assert count("int8-qdq", "QuantizeLinear") >= 6 * 6
    assert count("int4", "MatMulNBits") >= 6 * 6


@each
def test_other_classes_of_any_number_need_no_other_export(flavour: Flavour, all_flavours: Exported, source: Source) -> None:
    other = bank_of("tiny-clip", ("cat", "dog", "aeroplane", "ship", "frog"))
    running = session(all_flavours.files[flavour])
    picture = {IMAGES: np.asarray(photographs()[4])[None], **inputs(flavour, source)}
    embeds, shares = running.run(["image_embeds", "probabilities"], {**picture, CLASS_EMBEDDINGS: other.embeddings})
    logits = source.bank.logit_scale * embeds @ other.embeddings.T
    wanted = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert shares.shape == (1, 5)
    np.testing.assert_allclose(shares, wanted, atol=1e-4)
    (own,) = running.run(["probabilities"], picture)
    assert own.shape == (1, 3)


@each
def test_a_batch_of_equal_sizes_gives_what_single_pictures_give(flavour: Flavour, all_flavours: Exported) -> None:
    running = session(all_flavours.files[flavour])
    whole = np.asarray(photographs()[4])
    arrays = np.stack([whole, whole[::-1], whole[:, ::-1]])
    (together,) = running.run(["image_embeds"], {IMAGES: arrays})
    apart = np.concatenate([running.run(["image_embeds"], {IMAGES: array[None]})[0] for array in arrays])
    # Activations are quantised over the whole batch: its neighbours show in a picture's last bits.
    assert ((together * apart).sum(axis=1) >= (0.999 if flavour in ("int8", "int4") else 0.99999)).all()


def test_below_its_gate_a_flavour_is_not_written_unless_drift_is_accepted(
    source: Source, proof: Proof, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GATES, "int4", Gate(0.99999))
    out = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match=r"\(int4\) differs from torch: cosine 0\.9.* It was not written.*--accept-drift"):
        export_artefact(source, proof, 4, out, flavour="int4")
    assert not list(tmp_path.iterdir())
    parity = export_artefact(source, proof, 4, out, flavour="int4", accept_drift=True)
    (said,) = metadata(out)["drift_accepted"]  # type: ignore[misc]
    assert said == f"cosine {parity.cosine_min:.6f} on the worst of {parity.pictures} pictures, 0.99999 is required"
    assert json.loads(out.with_suffix(".json").read_text())["drift_accepted"] == [said]


def test_the_gate_knows_cosine_accuracy_and_what_is_not_a_number() -> None:
    def parity(cosine: float, accuracy: float | None, wanted: float | None) -> Parity:
        return Parity(200, 1.0, cosine, 1.0, 200, accuracy, wanted, 4, 1.0, 1.0)

    gate = Gate(0.99)
    assert parity(0.99, 0.9, 0.905).drift(gate) == []
    assert parity(0.99, None, None).drift(gate) == []
    assert "cosine 0.989900" in parity(0.9899, 0.9, 0.9).drift(gate)[0]
    assert "cosine nan" in parity(float("nan"), 0.9, 0.9).drift(gate)[0]
    assert "accuracy 89.0% on 200 pictures where torch has 90.0%" in parity(1.0, 0.89, 0.9).drift(gate)[0]


def test_flavours_before_and_after_one_that_drifts_are_written(
    source: Source, proof: Proof, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GATES, "int4", Gate(0.99999))
    files: dict[Flavour, Path] = {name: tmp_path / f"{name}.onnx" for name in ("fp32", "int4", "fp16")}
    with pytest.raises(ExportError, match="int4"):
        list(export_artefacts(Source(source.bank, source.adapter, RECIPE, "lab", 3), proof, 32, files))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp16.json", "fp16.onnx", "fp32.json", "fp32.onnx"]
