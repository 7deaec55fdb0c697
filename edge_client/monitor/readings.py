"""What a board says of itself at one moment; whatever it does not say is None."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace


@dataclass(frozen=True)
class Readings:
    """Temperatures in degrees Celsius by zone, power in W, loads 0 to 1, memory in MiB, events since the board started."""

    temperatures_c: dict[str, float] = field(default_factory=dict)
    power_w: float | None = None
    gpu_load: float | None = None
    gpu_mhz: float | None = None
    memory_available_mib: int | None = None
    memory_total_mib: int | None = None
    swap_used_mib: int | None = None
    over_current_events: int | None = None
    power_mode: str | None = None

    @property
    def hottest_c(self) -> float | None:
        """The temperature of the hottest zone."""
        return max(self.temperatures_c.values(), default=None)

    def or_else(self, other: Readings) -> Readings:
        """Return these, and for what they do not say the other's."""
        missing = {f.name: getattr(other, f.name) for f in fields(self) if getattr(self, f.name) in (None, {})}
        return replace(self, **missing)
