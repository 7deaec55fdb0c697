"""ViT-B/32 and ViT-L/14 in their real shapes, with random weights: cosines, sizes, memory of the export and of serving."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from export.artefact import export_artefacts
from export.flavours import FLAVOURS, GATES, Flavour
from export.metadata import Source
from export.parity import Proof
from tests.edge_client.inference.serving import answer_many, serving
from tests.export.making import RECIPE, VIT_B_32, VIT_L_14, bank_of, photographs, save_random_clip, trained_adapter

PROGRAM = """
import json, resource, sys
from pathlib import Path
from export.artefact import export_artefacts
from export.metadata import Source
from export.parity import Proof
from tests.export.making import RECIPE, bank_of, photographs, trained_adapter
folder, flavours = Path(sys.argv[1]), sys.argv[2].split(",")
model = str(folder / "clip")
source = Source(bank_of(model), trained_adapter(model), RECIPE, "lab", 1)
files = {name: folder / f"{name}.onnx" for name in flavours}
found = {name: parity.cosine_min for name, parity in export_artefacts(source, Proof(photographs()), 4, files, model)}
print(json.dumps({"cosines": found, "peak_kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def exported(folder: Path, *flavours: Flavour) -> dict[str, dict[str, float]]:
    """Export in a process of its own; return the worst cosines, and its peak of memory in kB."""
    command = [sys.executable, "-c", PROGRAM, str(folder), ",".join(flavours)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def vit_b_32(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, dict[str, float]]]]:
    """A folder with fp32.onnx and int8.onnx, half a gigabyte while this module runs, and what was measured."""
    folder = tmp_path_factory.mktemp("vit-b-32")
    save_random_clip(folder / "clip", VIT_B_32)
    yield folder, exported(folder, "fp32", "int8")
    for path in folder.glob("*.onnx"):
        path.unlink()


@pytest.mark.slow
def test_vit_b_32_is_exported_within_3_gb_and_int8_is_small(vit_b_32: tuple[Path, dict[str, dict[str, float]]]) -> None:
    folder, found = vit_b_32
    assert found["peak_kb"] * 1024 < 3e9  # type: ignore[operator]
    assert all(cosine >= GATES[name].cosine for name, cosine in found["cosines"].items())  # type: ignore[index]
    assert (folder / "int8.onnx").stat().st_size <= 0.27 * (folder / "fp32.onnx").stat().st_size


@pytest.mark.slow
def test_serving_vit_b_32_in_int8_takes_at_most_400_mb(vit_b_32: tuple[Path, dict[str, dict[str, float]]]) -> None:
    folder, _ = vit_b_32
    with serving(folder / "int8.onnx") as service:
        answer_many(service)
        assert service.memory("VmRSS") <= 400
        assert service.memory("VmHWM") <= 400


@pytest.mark.slow
def test_vit_l_14_in_its_real_width_with_two_blocks(tmp_path: Path) -> None:
    """All 24 blocks take minutes and gigabytes for each flavour, and are alike."""
    save_random_clip(tmp_path / "clip", replace(VIT_L_14, blocks=2))
    model = str(tmp_path / "clip")
    source = Source(bank_of(model), trained_adapter(model), RECIPE, "lab", 1)
    files: dict[Flavour, Path] = {flavour: tmp_path / f"{flavour}.onnx" for flavour in FLAVOURS}
    for flavour, parity in export_artefacts(source, Proof(photographs()), 4, files, model):
        assert parity.cosine_min >= GATES[flavour].cosine, flavour
