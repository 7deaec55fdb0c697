"""Releases such as 36.4.3, and ranges of them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from hardware_profiles.facts import Frozen


def release(text: str) -> tuple[int, ...]:
    """Return a release's numbers, in the order that they are compared in; raises ValueError."""
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6}){0,3}", text):
        raise ValueError(f"{text!r} is no release such as 36.4.3")
    return tuple(int(part) for part in text.split("."))


def _checked(text: str) -> str:
    if text:
        release(text)
    return text


Release = Annotated[str, AfterValidator(_checked)]


class Range(Frozen):
    """From a release on, and below another; an empty end is open. 36.4.3 is below 36.5 and 37, and 36.4 is below it."""

    since: Release = ""
    below: Release = ""

    def __contains__(self, found: str) -> bool:
        """Whether a release is in the range; raises ValueError."""
        numbers = release(found)
        return (not self.since or release(self.since) <= numbers) and (not self.below or numbers < release(self.below))

    def __str__(self) -> str:
        since, below = (f"from {self.since} on" if self.since else ""), (f"below {self.below}" if self.below else "")
        return ", ".join(part for part in (since, below) if part) or "any"
