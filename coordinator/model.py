"""The coordinator's half of the model behind one door: in this process, or in one of its own (model_process.py).

Whoever holds a `Model` imports no torch: it takes a quarter of a gigabyte, and seconds to load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from clip_lora.shapes import Shapes, Sizes
from coordinator.recipe import TextTraining
from coordinator.text_samples import TextLoss, TextSamples
from protocol.messages import Adapter, TextBank

if TYPE_CHECKING:
    from coordinator.text_side import TextSide


class Model(Protocol):
    """What the coordinator asks of CLIP."""

    def sizes(self) -> Sizes:
        """Return how large the towers are; raises ModelError."""

    def bank(self, classes: Sequence[str], templates: Sequence[str]) -> TextBank:
        """Return the first class bank; raises ModelError."""

    def begin(self, bank: TextBank, how: TextTraining, seed: int) -> Shapes:
        """Make ready to train the text side; return the shapes of its adapter. Raises ModelError."""

    def teach(self, samples: TextSamples, start: Adapter | None, version: int) -> tuple[TextBank, Adapter, TextLoss]:
        """Train the text side from an adapter, or anew; return the class bank of this version that comes of it."""

    def close(self) -> None:
        """Let go of what is in memory: there is no more to ask."""


class LocalModel:
    """The model in this process; what it needs is imported with the first question."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._text: TextSide | None = None

    def sizes(self) -> Sizes:
        """Return how large the towers are; raises ModelError."""
        from clip_lora.towers import load_sizes

        return load_sizes(self._name)

    def bank(self, classes: Sequence[str], templates: Sequence[str]) -> TextBank:
        """Return the first class bank; raises ModelError."""
        from coordinator.text_bank import make_bank

        return make_bank(self._name, classes, templates)

    def begin(self, bank: TextBank, how: TextTraining, seed: int) -> Shapes:
        """Make ready to train the text side; return the shapes of its adapter. Raises ModelError."""
        from coordinator.text_side import TextSide

        self._text = TextSide(bank, how, seed)
        return self._text.shapes

    def teach(self, samples: TextSamples, start: Adapter | None, version: int) -> tuple[TextBank, Adapter, TextLoss]:
        """Train the text side from an adapter, or anew; return the class bank of this version that comes of it."""
        assert self._text is not None
        return self._text.teach(samples, start, version)

    def close(self) -> None:
        """Let go of what is in memory: there is no more to ask."""
        self._text = None
