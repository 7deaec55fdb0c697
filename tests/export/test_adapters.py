"""The adapter flavour: one session, many adapters, each a small file; by onnxruntime's own LoRA feature."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from clip_lora.algebra import Adapter, layers
from clip_lora.lora import merge
from clip_lora.preprocess import load_preprocessing
from clip_lora.shapes import scale
from clip_lora.towers import load_image_tower
from export.artefact import ADAPTER_SUFFIX
from export.errors import ExportError
from export.graph import IMAGES
from export.lora import adapter_file, base_number
from export.metadata import Source
from export.parity import torch_embeddings
from protocol.messages import FloatArray, Recipe
from tests.export.conftest import Exported
from tests.export.making import photographs, trained_adapter
from tests.export.test_flavours import metadata, session

PICTURE = np.asarray(photographs()[4])[None]


def merged(adapter: Adapter, recipe: Recipe) -> FloatArray:
    """What torch says with the adapter merged."""
    tower = load_image_tower("tiny-clip", 32)
    merge(tower, adapter, scale(recipe))
    return torch_embeddings(tower.eval(), load_preprocessing("tiny-clip"), [photographs()[4]])


loaded: list[onnxruntime.LoraAdapter] = []  # options do not keep them alive: without this the process dies


def with_adapter(path: Path) -> onnxruntime.RunOptions:
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(path))
    options.add_active_adapter(adapter)
    loaded.append(adapter)
    return options


@pytest.fixture(scope="module")
def running(all_flavours: Exported) -> onnxruntime.InferenceSession:
    return session(all_flavours.files["adapter"])


@pytest.mark.parametrize("rank", [1, 2, 4, 16])
def test_an_adapter_of_any_rank_is_the_merged_model(
    rank: int, running: onnxruntime.InferenceSession, source: Source, tmp_path: Path
) -> None:
    recipe = Recipe(rank=2).at_rank(rank)
    adapter = trained_adapter("tiny-clip", recipe, seed=rank)
    file = tmp_path / "a.onnx_adapter"
    file.write_bytes(adapter_file(adapter, scale(recipe), source.bank.model_digest, 7))
    (said,) = running.run(["image_embeds"], {IMAGES: PICTURE}, with_adapter(file))
    np.testing.assert_allclose(said, merged(adapter, recipe), atol=1e-4)


def test_without_an_adapter_it_is_the_base(running: onnxruntime.InferenceSession) -> None:
    (said,) = running.run(["image_embeds"], {IMAGES: PICTURE})
    base = torch_embeddings(load_image_tower("tiny-clip", 32).eval(), load_preprocessing("tiny-clip"), [photographs()[4]])
    np.testing.assert_allclose(said, base, atol=1e-4)


def test_one_session_serves_several_adapters_at_the_same_time(
    running: onnxruntime.InferenceSession, source: Source, tmp_path: Path
) -> None:
    recipe = Recipe(rank=2)
    adapters = [trained_adapter("tiny-clip", recipe, seed=seed) for seed in range(3)]
    options, wanted = [], []
    for index, adapter in enumerate(adapters):
        file = tmp_path / f"{index}.onnx_adapter"
        file.write_bytes(adapter_file(adapter, scale(recipe), source.bank.model_digest, index))
        options.append(with_adapter(file))
        wanted.append(merged(adapter, recipe))
    with ThreadPoolExecutor(6) as pool:
        turns = [index % 3 for index in range(60)]
        said = list(pool.map(lambda i: running.run(["image_embeds"], {IMAGES: PICTURE}, options[i])[0], turns))
    for index, embeds in zip(turns, said, strict=True):
        np.testing.assert_allclose(embeds, wanted[index], atol=1e-4)


def test_the_export_writes_its_own_adapter_beside_the_base(all_flavours: Exported, source: Source) -> None:
    base = all_flavours.files["adapter"]
    file = base.with_suffix(ADAPTER_SUFFIX)
    read = onnxruntime.AdapterFormat.read_adapter(str(file))
    facts = metadata(base)["lora"]
    assert isinstance(facts, dict)
    assert read.get_model_version() == facts["base"] == base_number(source.bank.model_digest, facts["layers"])
    assert read.get_adapter_version() == source.round
    assert facts["layers"] == layers(source.adapter)
    assert file.stat().st_size < 200_000 < base.stat().st_size


def test_another_base_has_another_number(source: Source) -> None:
    names = layers(source.adapter)
    numbers = {base_number(digest, some) for digest in ("a" * 64, "b" * 64) for some in (names, names[:-1])}
    assert len(numbers) == 4
    assert all(0 <= number < 2**31 for number in numbers)


def test_an_adapter_without_factors_is_refused() -> None:
    with pytest.raises(ExportError, match="changes nothing"):
        adapter_file({}, 1.0, "a" * 64, 1)
