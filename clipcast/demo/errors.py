"""How the demo fails, apart from what its processes report."""

from __future__ import annotations


class DemoError(RuntimeError):
    """A process of the demo ended early; the message shows the end of its log."""
