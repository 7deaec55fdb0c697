"""Tiny-clip's configuration, fresh towers, random adapters, and copies of the model's folder to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig

from clip_lora.algebra import Adapter
from clip_lora.shapes import Shapes
from clip_lora.towers import load_sizes, locate, one_thread

RandomAdapter = Callable[..., Adapter]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny-clip gains nothing from a second thread, and waits for it long when other work has the core."""
    with one_thread():
        yield


@pytest.fixture(scope="session")
def config() -> CLIPConfig:
    return load_sizes("tiny-clip")


@pytest.fixture(scope="session")
def random_adapter() -> RandomAdapter:
    """Both factors away from zero, as after training: B A is about as large as `size`."""

    def make(shapes: Shapes, seed: int = 0, size: float = 0.05) -> Adapter:
        rng = np.random.default_rng(seed)
        return {name: rng.normal(0.0, size, shape).astype(np.float32) for name, shape in shapes.items()}

    return make


@pytest.fixture(scope="session")
def pictures() -> torch.Tensor:
    """Four normalised pictures, (4, 3, 64, 64)."""
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    """A folder with tiny-clip's files, to be changed by a test."""
    return Path(shutil.copytree(locate("tiny-clip"), tmp_path / "model"))
