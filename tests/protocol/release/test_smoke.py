"""An embedding's direction survives its way in a manifest."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from protocol.errors import WireError
from protocol.release.manifests import Smoke
from protocol.release.smoke import pack_embedding, unpack_embedding

embeddings = arrays(np.float32, st.integers(2, 1024), elements=st.floats(-1e6, 1e6, width=32)).filter(
    lambda array: np.abs(array).max() > 1e-6
)


@given(embeddings)
@settings(deadline=None, max_examples=200)
def test_the_direction_survives(embedding) -> None:
    packed = pack_embedding(embedding)
    back = unpack_embedding(packed)
    assert np.linalg.norm(back) == pytest.approx(1.0, abs=1e-5)
    assert pack_embedding(back) == packed
    largest = np.abs(embedding).max()
    steps = np.abs(np.frombuffer(base64.b64decode(packed), np.int8) - embedding.astype(np.float64) / largest * 127)
    assert steps.max() <= 0.5 + 1e-4
    assert Smoke(picture="AAAA", label="fox", embedding=packed + "AAAA").embedding.startswith(packed)


def test_an_embedding_of_clips_size_keeps_its_cosine() -> None:
    for width in (512, 768, 1024):
        embedding = np.random.default_rng(width).normal(size=width).astype(np.float32)
        cosine = float(unpack_embedding(pack_embedding(embedding)) @ (embedding / np.linalg.norm(embedding)))
        assert cosine > 0.9999
        assert len(pack_embedding(embedding)) <= 2800


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_what_has_no_direction_is_refused(value: float) -> None:
    with pytest.raises(WireError, match="no direction"):
        pack_embedding(np.full(4, value, np.float32))


@pytest.mark.parametrize("text", ["AAAA", "A", "????"])
def test_what_is_no_embedding_is_refused(text: str) -> None:
    with pytest.raises(WireError, match="embedding"):
        unpack_embedding(text)
