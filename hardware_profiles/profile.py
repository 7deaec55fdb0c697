"""A kind of device as data: schema and loader. One TOML in boards/ = one device; the file name is the profile's name.

What all boards of one processor have in common stands once, in socs/.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hardware_profiles.facts import Fact, Frozen, ProfileError, made_of, names_in, read_named
from hardware_profiles.versions import Range

BOARDS, SOCS = "boards", "socs"
Tier = Literal["train", "inference", "unsupported"]


class Identity(Frozen):
    """How a board is recognised.

    `modules` are board id and SKU as NVIDIA writes them (p3767-0005); `compatible` are whole entries of the device tree's
    list; `models` are what its model string may say, which alone proves nothing. The range of MemTotal, in MiB, is the
    nominal memory less what firmware keeps for itself: it tells modules of one kind apart.
    """

    modules: tuple[str, ...] = ()
    compatible: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    mem_total_mib: tuple[int, int] = (0, 2**31)


class Supports(Frozen):
    """What the device's arithmetic can do: in hardware, and with bitsandbytes' kernels."""

    fp16: Fact
    bf16: Fact
    int8: Fact
    nf4: Fact
    llm_int8: Fact


class Power(Frozen):
    """Power modes by name: their numbers differ from board to board and from JetPack to JetPack."""

    modes: Fact
    super_modes: Fact | None = None


class FlashConfig(Frozen):
    """A board configuration that NVIDIA's flashing tools know, and for which releases of L4T."""

    config: str
    l4t: Range
    carrier: str
    super: bool = False
    source: Annotated[str, Field(min_length=10)]
    verified: bool


class Flash(Frozen):
    """How a board is flashed: its USB id in recovery mode, NVIDIA's configurations, and what hands do before and after."""

    recovery_usb_id: Fact
    recovery: Fact | None = None
    after: Fact | None = None
    configs: tuple[FlashConfig, ...]


class Thermal(Frozen):
    """When training waits: above the first temperature until below the second, and while the supply cannot follow.

    Degrees Celsius, and throttlings for over-current within a minute. All three are our own choice.
    """

    pause_above_c: float
    resume_below_c: float
    over_current_per_minute: Annotated[int, Field(ge=0)] = 10

    @model_validator(mode="after")
    def _cools_down(self) -> Thermal:
        if self.resume_below_c >= self.pause_above_c:
            raise ValueError("resume_below_c must be below pause_above_c")
        return self


class Soc(Frozen):
    """What all boards of one processor have in common."""

    name: str
    title: str
    compatible: str
    supports: Supports
    facts: dict[str, Fact] = Field(default={})


class Profile(Frozen):
    """What training and inference take from a device; everything can be overridden in the client's TOML.

    `tier` says what clipcast does there: `train`, `inference` only, or nothing (`unsupported`); `advice` then says why and
    what to do instead. `dtype` is what the base computes in; `auto` is float32 on a CPU, bfloat16 on a GPU that has it in
    hardware, else float16. `platforms` are the names of what it may run, the newest last.
    """

    name: str
    title: str
    tier: Tier
    advice: str = ""
    soc: str = ""
    platforms: tuple[str, ...]
    device: Literal["cpu", "cuda"]
    bits: Literal[4, 8, 32]
    dtype: Literal["auto", "float32", "float16", "bfloat16"]
    batch_size: Annotated[int, Field(ge=1)]
    max_rank: Annotated[int, Field(ge=1)]
    threads: Annotated[int, Field(ge=0)]
    onnx_providers: tuple[str, ...]
    notes: str = ""
    identity: Identity = Identity()
    supports: Supports
    facts: dict[str, Fact] = Field(default={})
    power: Power | None = None
    flash: Flash | None = None
    thermal: Thermal | None = None

    @model_validator(mode="after")
    def _says_why_not(self) -> Profile:
        if (self.tier == "train") == bool(self.advice.strip()):
            raise ValueError("advice belongs to the tiers 'inference' and 'unsupported': why, and what to do instead")
        return self

    @property
    def in_dtype(self) -> Literal["float32", "float16", "bfloat16"]:
        """What the base computes in, as far as that is known without the device."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if self.device == "cpu" else "bfloat16"

    def check_trains(self) -> None:
        """Raise ProfileError, with what to do instead, if nothing can be trained on such a device."""
        if self.tier != "train":
            raise ProfileError(f"{self.title} cannot train: {self.advice}")


def names() -> list[str]:
    """Return the names of all profiles, sorted."""
    return names_in(BOARDS)


def load(name: str) -> Profile:
    """Return a profile by name, with what its processor adds; raises ProfileError with the names there are."""
    data = read_named(BOARDS, name, "profile")
    if data.get("soc"):
        soc = load_soc(str(data["soc"]))
        data = {**data, "supports": data.get("supports", soc.supports), "facts": {**soc.facts, **data.get("facts", {})}}
    return made_of(Profile, BOARDS, name, data)


def load_soc(name: str) -> Soc:
    """Return a kind of processor by name; raises ProfileError."""
    return made_of(Soc, SOCS, name, read_named(SOCS, name, "processor"))
