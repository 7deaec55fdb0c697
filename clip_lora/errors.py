"""How the model fails."""

from __future__ import annotations


class ModelError(RuntimeError):
    """A model that cannot be loaded, or an adapter that does not fit it; the message says what to do."""
