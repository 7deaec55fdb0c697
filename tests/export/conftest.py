from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from clip_lora.algebra import Adapter
from edge_client.data import find_pictures
from export.artefact import export_artefacts
from export.flavours import FLAVOURS, Flavour
from export.metadata import Source
from export.parity import Parity, Proof
from protocol.messages import TextBank
from tests.export.making import CLASSES, RECIPE, bank_of, photographs, trained_adapter


@dataclass(frozen=True)
class Exported:
    """All flavours of one model: files and parities."""

    files: Mapping[Flavour, Path]
    parities: Mapping[Flavour, Parity]


@pytest.fixture(scope="session")
def bank() -> TextBank:
    return bank_of("tiny-clip")


@pytest.fixture(scope="session")
def adapter() -> Adapter:
    return trained_adapter("tiny-clip")


@pytest.fixture(scope="session")
def digits() -> list[Image.Image]:
    return [picture.load() for picture in find_pictures("digits")[:12]]


@pytest.fixture(scope="session")
def source(bank: TextBank, adapter: Adapter) -> Source:
    return Source(bank, adapter, RECIPE, "lab", 3, licence="apache-2.0")


@pytest.fixture(scope="session")
def proof() -> Proof:
    """Digits with their classes, and photographs that nobody has named."""
    found = [picture for picture in find_pictures("digits")[:60] if picture.label in CLASSES]
    return Proof(
        [*(picture.load() for picture in found), *photographs()],
        [*(CLASSES.index(picture.label) for picture in found), *[-1] * len(photographs())],
    )


@pytest.fixture(scope="session")
def all_flavours(source: Source, proof: Proof, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("flavours")
    files = {flavour: folder / f"{flavour}.onnx" for flavour in FLAVOURS}
    return Exported(files, dict(export_artefacts(source, proof, 4, files)))
