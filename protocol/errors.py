"""The two ways the wire fails.

WireError: what arrived, or what was to be sent, is not of the protocol (the sender's fault; a value for most callers).
BusError: the broker cannot be reached or refuses us (the operator's business).
"""

from __future__ import annotations


class WireError(ValueError):
    """Bytes, a topic or a message that the protocol does not allow."""


class BusError(RuntimeError):
    """The broker is unreachable, refuses the connection, or cannot carry a message."""
