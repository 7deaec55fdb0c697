"""Image encoders by model, quantisation and LoRA shape: each is loaded once, and many clients of a process may share it."""

from __future__ import annotations

from collections import OrderedDict

from edge_client.encoder import ImageEncoder
from edge_client.frozen import HiddenStore
from protocol.messages import Recipe

Key = tuple[object, ...]


class Encoders:
    """The encoders in memory, at most `limit`; the one used longest ago makes way. A device needs one."""

    def __init__(self, limit: int = 1) -> None:
        self._limit = limit
        self._store = HiddenStore()  # of all: what is frozen does not depend on the factors' shape
        self._loaded: OrderedDict[Key, ImageEncoder] = OrderedDict()

    def get(self, model: str, bits: int, device: str, recipe: Recipe, dtype: str = "auto") -> ImageEncoder:
        """Return an encoder with factors of the recipe's shape, of whatever values were loaded last. Raises ModelError."""
        key = (model, bits, device, dtype, recipe.rank, recipe.alpha, recipe.projections, recipe.first_block)
        if key not in self._loaded:
            while len(self._loaded) >= self._limit:
                self._loaded.popitem(last=False)
            self._loaded[key] = ImageEncoder(model, bits, device, recipe, self._store, dtype)
        self._loaded.move_to_end(key)
        return self._loaded[key]
