"""What the recipe does against updates that are too large, and counts that are too high (docs/security.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Limit = Annotated[float, Field(ge=1)]


class Defence(BaseModel):
    """Limits in multiples of the round's median (`inf`: none), and what share of the clients may be malicious.

    `norm_limit` is for the size of adapters; what is above it is set aside ("reject") or scaled down ("clip").
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    norm_limit: Limit = 4.0
    over_limit: Literal["reject", "clip"] = "reject"
    sample_cap: Limit = 4.0
    malicious_share: Annotated[float, Field(ge=0, lt=0.5)] = 0.2

    def malicious(self, clients: int) -> int:
        """Return f, how many of so many clients may be malicious."""
        return int(self.malicious_share * clients)
