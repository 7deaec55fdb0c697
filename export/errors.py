"""How an export fails."""

from __future__ import annotations


class ExportError(RuntimeError):
    """A model that cannot be exported faithfully; nothing was written. The message says what was measured."""
