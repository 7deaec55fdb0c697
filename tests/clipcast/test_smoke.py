"""What a release's smoke answer is made of: a real export, run by onnxruntime on a picture that fits a manifest."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from clip_lora.shapes import adapter_shapes, initial_adapter
from clip_lora.towers import load_sizes
from clipcast.smoke import MOST_PICTURE, answer, small_picture, smoke_of
from coordinator.text_bank import make_bank
from edge_client.errors import InferenceError
from export.artefact import export_artefact
from export.metadata import METADATA, Source
from export.parity import Proof
from protocol.messages import Recipe, TextBank
from protocol.release.smoke import unpack_embedding
from tests.export.making import trained_adapter

CLASSES = ("a flower", "a temple")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A temple and a flower."""
    folder, found = tmp_path_factory.mktemp("photographs"), {}
    for name, pixels in zip(("temple", "flower"), load_sample_images().images, strict=True):
        found[name] = folder / f"{name}.png"
        Image.fromarray(pixels).save(found[name])
    return found


@pytest.fixture(scope="session")
def bank() -> TextBank:
    return make_bank("tiny-clip", CLASSES, ("a photo of {}",))


@pytest.fixture(scope="session")
def artefact(bank: TextBank, photographs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(rank=1)
    adapter = initial_adapter(adapter_shapes(load_sizes("tiny-clip"), "vision", recipe), 0)
    out = tmp_path_factory.mktemp("artefact") / "model.onnx"
    export_artefact(Source(bank, adapter, recipe, "lab", 0), Proof([Image.open(photographs["flower"])]), 32, out)
    return out


def changed(artefact: Path, name: str, change) -> Path:
    model = onnx.load(artefact)
    change(model)
    out = artefact.with_name(name)
    onnx.save(model, out)
    return out


def facts_changed(artefact: Path, name: str, **facts: object) -> Path:
    def change(model: onnx.ModelProto) -> None:
        (entry,) = [entry for entry in model.metadata_props if entry.key == METADATA]
        entry.value = json.dumps(json.loads(entry.value) | facts)

    return changed(artefact, name, change)


@pytest.mark.parametrize("name", ["temple", "flower"])
def test_the_answer_is_what_the_artefact_says_to_the_picture_that_travels(artefact, photographs, name) -> None:
    smoke = smoke_of(artefact, None, None, photographs[name], CLASSES)
    assert len(smoke.picture) <= MOST_PICTURE
    with Image.open(io.BytesIO(base64.b64decode(smoke.picture))) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        pixels = np.asarray(picture)
    session = onnxruntime.InferenceSession(artefact)
    probabilities, embeds = session.run(["probabilities", "image_embeds"], {"images": pixels[None]})
    assert smoke.label == CLASSES[int(probabilities[0].argmax())]
    assert float(unpack_embedding(smoke.embedding) @ embeds[0]) > 0.9999
    assert smoke.label == f"a {name}"  # which tiny-clip knows


@pytest.mark.parametrize("size", [(1, 1), (300, 10), (400, 300), (64, 64)])
def test_any_picture_becomes_small_enough(tmp_path: Path, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    noise.save(tmp_path / "noise.png")
    text, pixels = small_picture(tmp_path / "noise.png")
    assert len(text) <= MOST_PICTURE
    with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
        np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_a_picture_that_devices_would_refuse_is_refused_here(tmp_path: Path) -> None:
    """Made smaller it would have two rows of 224 pixels."""
    Image.new("RGB", (900, 9)).save(tmp_path / "narrow.png")
    with pytest.raises(InferenceError, match="one side is over 100 times the other"):
        small_picture(tmp_path / "narrow.png")


def test_without_a_picture_there_is_a_drawing_always_the_same() -> None:
    (text, pixels), (again, _) = small_picture(None), small_picture(None)
    assert text == again
    assert pixels.shape == (64, 64, 3)
    assert len(text) < MOST_PICTURE


def test_other_classes_are_given_by_a_bank(artefact: Path, photographs: dict[str, Path]) -> None:
    bank = make_bank("tiny-clip", ("a dog", "a flower", "a car"), ("a photo of {}",))
    smoke = smoke_of(artefact, None, bank, photographs["flower"], CLASSES)
    assert smoke.label == "a flower"
    said = answer(artefact, None, bank, small_picture(photographs["flower"])[1])
    assert said.labels == bank.classes
    assert said.probabilities.sum() == pytest.approx(1.0, abs=1e-5)


def test_an_adapter_changes_the_answer(bank: TextBank, photographs, tmp_path: Path) -> None:
    recipe, out = Recipe(rank=1), tmp_path / "model.onnx"
    adapter = trained_adapter("tiny-clip", recipe, spread=0.2)
    proof = Proof([Image.open(photographs["flower"])])
    export_artefact(Source(bank, adapter, recipe, "lab", 0), proof, 32, out, flavour="adapter")
    pixels = small_picture(photographs["flower"])[1]
    plain, other = (answer(out, path, None, pixels) for path in (None, out.with_suffix(".onnx_adapter")))
    assert float(plain.embedding @ other.embedding) < 0.99


def test_what_cannot_be_released_is_said(artefact: Path, bank: TextBank, photographs, tmp_path) -> None:
    flower = photographs["flower"]

    def refused(
        words: str, model: Path, picture: Path | None = flower, with_bank=None, adapter=None, classes=CLASSES
    ) -> None:
        with pytest.raises(InferenceError, match=words):
            smoke_of(model, adapter, with_bank, picture, classes)

    refused("the artefact's classes are a flower, a temple, the federation's a, b", artefact, classes=("a", "b"))
    refused("no such picture", artefact, tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    refused("cannot be read as a picture", artefact, tmp_path / "text.png")
    refused("onnxruntime cannot load it", tmp_path / "text.png")
    refused("not exported by clipcast", changed(artefact, "bare.onnx", lambda model: model.ClearField("metadata_props")))
    refused("names 0 classes and answers with 2", facts_changed(artefact, "nameless.onnx", labels=[]), classes=())
    refused(
        "names 3 classes and answers with 2",
        facts_changed(artefact, "three.onnx", labels=["x", "y", "z"]),
        classes=("x", "y", "z"),
    )
    foreign = TextBank(**{**vars(bank), "model_digest": "0" * 64})
    refused("their embeddings mean nothing", artefact, with_bank=foreign)
    (tmp_path / "none.onnx_adapter").write_bytes(b"no adapter")
    refused("takes no adapter", artefact, adapter=tmp_path / "none.onnx_adapter")


def test_an_answer_that_is_not_finite_or_hardly_one_is_refused(artefact: Path, photographs) -> None:
    def spoil(value: float):
        def change(model: onnx.ModelProto) -> None:
            (scale,) = [i for i in model.graph.initializer if i.name == "logit_scale"]
            scale.CopyFrom(onnx.numpy_helper.from_array(np.array(value, np.float32), "logit_scale"))

        return change

    for name, value, words in (("nan", np.nan, "not finite"), ("flat", 1e-3, "can hardly tell")):
        with pytest.raises(InferenceError, match=words):
            smoke_of(changed(artefact, f"{name}.onnx", spoil(value)), None, None, photographs["flower"], CLASSES)
