"""The ways the wire fails.

KeyFileError: a key or a sequence of ours cannot be read or kept (the operator's business).
WireError: what arrived, or what was to be sent, is not of the protocol (the sender's fault; a value for most callers).
BusError: the broker cannot be reached or refuses us (the operator's business).
"""

from __future__ import annotations


class WireError(ValueError):
    """Bytes, a topic or a message that the protocol does not allow."""


class BusError(RuntimeError):
    """The broker is unreachable, refuses the connection, or cannot carry a message."""


class Refused(WireError):  # noqa: N818 - the gate's verdict, not a failure of ours
    """A message that the gate does not let in; `verdict` names the reason (docs/operations.md)."""

    def __init__(self, verdict: str, detail: str) -> None:
        super().__init__(detail)
        self.verdict = verdict


class KeyFileError(RuntimeError):
    """A file with a key or a sequence number that cannot be read or kept."""
