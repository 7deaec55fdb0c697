"""ONNX against torch, on real digits and on photographs' odd sizes; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from clip_lora.algebra import Adapter
from clip_lora.preprocess import load_preprocessing
from export.artefact import export_artefact
from export.errors import ExportError
from export.graph import IMAGES, OPSET, PIXELS, preprocessing_graph
from export.metadata import METADATA, Source
from export.parity import Proof
from protocol.messages import TextBank
from tests.export.making import RECIPE

SIZES = [(8, 8), (64, 64), (61, 97), (500, 333), (33, 240)]


def smooth(height: int, width: int) -> Image.Image:
    """A picture with the smooth structure of a photograph."""
    rng = np.random.default_rng(height * 1000 + width)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def exported(bank: TextBank, adapter: Adapter, digits: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model.onnx"
    pictures = [*digits, *(smooth(*size) for size in SIZES)]
    parity = export_artefact(Source(bank, adapter, RECIPE, "lab", 3), Proof(pictures), 4, out)
    assert parity.cosine_min >= 0.999
    assert parity.top1_agreement == 1.0
    assert 0.97 < parity.quantised_cosine_min < 0.99999  # 4-bit differs from full precision, but not by much
    return out


@pytest.mark.parametrize("size", SIZES)
def test_the_preprocessing_graph_equals_transformers_to_a_grey_level(size: tuple[int, int]) -> None:
    preprocessing = load_preprocessing("tiny-clip")
    session = onnxruntime.InferenceSession(preprocessing_graph(preprocessing, 10).SerializeToString())
    picture = smooth(*size)
    (pixels,) = session.run([PIXELS], {IMAGES: np.asarray(picture)[None]})
    wanted = preprocessing.processor([picture], return_tensors="np")["pixel_values"]
    grey_level = 1.0 / 255.0 / min(preprocessing.std)
    assert pixels.shape == wanted.shape
    assert np.abs(pixels - wanted).max() <= 2.1 * grey_level


def test_a_batch_gives_what_single_pictures_give(exported: Path, digits: list[Image.Image]) -> None:
    session = onnxruntime.InferenceSession(exported.read_bytes())
    arrays = np.stack([np.asarray(picture.convert("RGB")) for picture in digits[:3]])
    (together,) = session.run(["image_embeds"], {IMAGES: arrays})
    apart = np.concatenate([session.run(["image_embeds"], {IMAGES: array[None]})[0] for array in arrays])
    np.testing.assert_allclose(together, apart, atol=1e-5)


def test_probabilities_are_the_softmax_of_scaled_cosines(exported: Path, bank: TextBank, digits: list[Image.Image]) -> None:
    session = onnxruntime.InferenceSession(exported.read_bytes())
    array = np.asarray(digits[0].convert("RGB"))[None]
    embeds, probabilities = session.run(["image_embeds", "probabilities"], {IMAGES: array})
    logits = torch.from_numpy(bank.logit_scale * embeds @ bank.embeddings.T)
    np.testing.assert_allclose(probabilities, torch.softmax(logits, -1).numpy(), atol=1e-5)
    assert np.linalg.norm(embeds) == pytest.approx(1.0, abs=1e-5)


def test_the_file_carries_labels_provenance_and_opset(exported: Path, bank: TextBank) -> None:
    model = onnx.load(exported)
    facts = json.loads({entry.key: entry.value for entry in model.metadata_props}[METADATA])
    assert facts["labels"] == list(bank.classes)
    assert (facts["federation"], facts["round"], facts["model_digest"]) == ("lab", 3, bank.model_digest)
    assert next(item.version for item in model.opset_import if item.domain == "") == OPSET
    assert not any(entry.external_data for entry in model.graph.initializer)
    report = json.loads(exported.with_suffix(".json").read_text())
    assert report["parity"]["pictures"] == 12 + len(SIZES)


def test_a_model_that_differs_from_torch_is_not_written(
    bank: TextBank, adapter: Adapter, digits: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another mean in the graph is what a wrong preprocessing looks like.
    def wrong(preprocessing, ir_version):
        shifted = type(preprocessing)(64, 64, (0.0, 0.9, 0.1), preprocessing.std, preprocessing.processor)
        return preprocessing_graph(shifted, ir_version)

    monkeypatch.setattr("export.artefact.preprocessing_graph", wrong)
    with pytest.raises(ExportError, match="differs from torch: cosine"):
        export_artefact(Source(bank, adapter, RECIPE, "lab", 3), Proof(digits), 4, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_export_without_pictures_is_refused(bank: TextBank, adapter: Adapter, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no pictures"):
        export_artefact(Source(bank, adapter, RECIPE, "lab", 3), Proof([]), 4, tmp_path / "model.onnx")


def test_export_from_other_weights_than_the_federations_is_refused(
    bank: TextBank, adapter: Adapter, digits: list[Image.Image], tmp_path: Path
) -> None:
    foreign = TextBank(**{**vars(bank), "model_digest": "0" * 64})
    with pytest.raises(ExportError, match="the federation used 000000000000"):
        export_artefact(Source(foreign, adapter, RECIPE, "lab", 3), Proof(digits), 4, tmp_path / "model.onnx")
