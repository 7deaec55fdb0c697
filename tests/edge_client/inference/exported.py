"""One tiny-clip in the flavours that the tests of inference/ and releases/ answer with, and a real picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from sklearn.datasets import load_sample_images

from edge_client.inference.pictures import Pixels
from export.artefact import export_artefacts
from export.flavours import Flavour
from export.metadata import Source
from export.parity import Proof
from tests.export.making import RECIPE, bank_of, photographs, trained_adapter

CLASSES = ("pagoda", "flower", "car", "dog")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Flavour, Path]:
    """Files by flavour; beside the flavour adapter lies its adapter."""
    folder = tmp_path_factory.mktemp("models")
    source = Source(bank_of("tiny-clip", CLASSES), trained_adapter("tiny-clip"), RECIPE, "lab", 3)
    wanted: tuple[Flavour, ...] = ("fp32", "int8", "adapter")
    files: dict[Flavour, Path] = {flavour: folder / f"{flavour}.onnx" for flavour in wanted}
    list(export_artefacts(source, Proof(photographs()), 32, files))
    return files


@pytest.fixture(scope="session")
def photograph() -> Pixels:
    """A pagoda, 427 x 640."""
    return load_sample_images().images[0]
