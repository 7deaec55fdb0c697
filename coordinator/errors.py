"""How a federation stops."""

from __future__ import annotations


class FederationError(RuntimeError):
    """A federation that cannot go on: nobody came, or its state belongs to another one. The message names the cure."""
