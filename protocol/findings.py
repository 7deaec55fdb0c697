"""What an examination finds, of a broker or of a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail", "unknown"]


@dataclass(frozen=True)
class Finding:
    """One thing that was measured; `cure` says what to do unless it is ok."""

    name: str
    measured: str
    state: State = "ok"
    cure: str = ""


def first_line(error: BaseException) -> str:
    """Return what an error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
