"""How a federation stops."""

from __future__ import annotations


class FederationError(RuntimeError):
    """A federation that cannot go on: nobody came, or its state belongs to another one. The message names the cure."""


class NotKeptError(FederationError):
    """The disk or the database does not take what has to be kept before the federation goes on; it may a little later."""
